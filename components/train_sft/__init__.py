"""Fine-tune the designer on prompt-workflow pairs."""

from components.train_sft.component import train_sft

__all__ = ["train_sft"]
