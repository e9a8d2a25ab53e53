"""Prompt to workflow: policy, rollout under the grammar, SFT, GRPO, guidance, design."""
