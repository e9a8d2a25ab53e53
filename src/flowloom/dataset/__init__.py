"""Prompts, prompt-workflow pairs and prompt-workflow-score triplets."""
