"""The reward: predicts the score of a workflow on a prompt, without rendering."""
