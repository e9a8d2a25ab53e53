"""LoRA (arXiv 2106.09685) on a frozen language model, at any strength per row of a batch.

An adapted layer computes W x + s (alpha / rank) B A x, where the strength s of a row is 1 (on), 0
(off: the reference) or any w (weights extrapolated through the tuned model, arXiv 2601.04670). One
batch may hold rows of several strengths. PEFT's own mixed batches (`adapter_names`) know on and off
only, and refuse to train.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from flowloom.designer.config import LoRAConfig

NAME = "designer"
WEIGHTS_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


class Adapter:
    """The LoRA of one model, shared by all policies that look at it."""

    def __init__(self, model: nn.Module, config: LoRAConfig, seed: int):
        """Adapt the model in place; B starts at 0, so that nothing changes yet.

        Args:
            model: Any transformers model; its own weights are frozen.
            config: Rank, scale and layers.
            seed: Seed of A.

        Raises:
            ValueError: No layer of the model has one of the names.
        """
        import peft
        from peft.tuners.lora import LoraLayer

        self.config = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=config.dropout,
            target_modules=list(config.target_modules),
            task_type="CAUSAL_LM",
        )
        model.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(self.config, model, NAME)
        self._strength: float | Tensor = 1.0
        self.layers: dict[str, Any] = {
            name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)
        }
        for layer in self.layers.values():
            for part in (layer.lora_A[NAME], layer.lora_B[NAME]):
                part.float().requires_grad_(True)
            layer.lora_B[NAME].register_forward_hook(self._weaken)
            # Dropout is on only where training asks for it.
            layer.eval()

    def _weaken(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * self._strength

    @contextmanager
    def at(self, strength: float | Tensor) -> Iterator[None]:
        """Use the adapter at a strength, one number or one per row (shape B 1 1)."""
        self._strength = strength
        try:
            yield
        finally:
            self._strength = 1.0

    def merged(self, model: nn.Module, strength: float) -> dict[str, Tensor]:
        """The model's own weights with the adapter added: what the model was without layers of it.

        Sums are made in float32 and rounded to the model's type once.
        """
        weights = {}
        for name, weight in model.state_dict().items():
            layer, _, rest = name.partition(".base_layer.")
            if ".lora_" in name:
                continue
            if rest == "weight":
                with torch.no_grad():
                    change = strength * self.layers[layer].get_delta_weight(NAME).float()
                    weight = (weight.float() + change).to(weight.dtype)
            weights[f"{layer}.{rest}" if rest else layer] = weight
        return weights

    def save(self, folder: Path) -> None:
        """Write the adapter as PEFT reads it."""
        weights = {
            f"{_PEFT_PREFIX}{name}.{part}.weight": getattr(layer, part)[NAME].weight
            for name, layer in self.layers.items()
            for part in ("lora_A", "lora_B")
        }
        weights = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
        safetensors.torch.save_file(weights, folder / WEIGHTS_FILE)
        self.config.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Take the weights of a folder that `save` wrote."""
        weights = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        with torch.no_grad():
            for name, layer in self.layers.items():
                for part in ("lora_A", "lora_B"):
                    weight = weights[f"{_PEFT_PREFIX}{name}.{part}.weight"]
                    getattr(layer, part)[NAME].weight.copy_(weight)
