"""LoRA (arXiv 2106.09685) on any torch model, for tuning a generator.

An adapted layer computes W x + b + (alpha / rank) B A x; switched off, it computes W x + b as if it
had never been touched, so the base's velocity needs no second copy of the weights. A and B are
float32 whatever the frozen weights are; products are made in the type of the layer's input, as
under autocast, so that backward keeps no float32 copy of it.

Shapes: R = rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowloom.generator.lora_config import LoRAConfig

# Up to this ratio of weights in W to weights in A and B, adding B A to a float32 W is cheaper than
# two more products with every token: 0.28 s for forward and backward of 160 pictures against 0.35
# s on the shapes world (and 0.39 s with PEFT, 0.28 s with all weights tuned and none adapted).
_MAX_FUSED_RATIO = 8
_PARTS = ("lora_A", "lora_B")


class AdaptedLinear(nn.Linear):
    """A linear layer with a low-rank update; made of a `nn.Linear` in place by `adapt`."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    """alpha / rank."""
    is_on: bool

    @classmethod
    def adapt(cls, layer: nn.Linear, config: LoRAConfig, generator: torch.Generator) -> None:
        """Turn a layer into this class: same weights, same names, and A ~ N(0, 1 / in), B = 0."""
        layer.__class__ = cls
        assert isinstance(layer, AdaptedLinear)
        down = torch.randn(config.rank, layer.in_features, generator=generator)
        device = layer.weight.device
        layer.lora_A = nn.Parameter((down / layer.in_features**0.5).to(device))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, config.rank, device=device))
        layer.scale = config.alpha / config.rank
        layer.is_on = True

    def delta(self) -> Tensor:
        """(alpha / rank) B A, `[out, in]`, float32."""
        return self.scale * (self.lora_B @ self.lora_A)

    def forward(self, input: Tensor) -> Tensor:
        """Apply W, and B A where it is on."""
        if not self.is_on:
            return F.linear(input, self.weight, self.bias)
        low_rank = self.lora_A.numel() + self.lora_B.numel()
        fused = self.weight.numel() <= _MAX_FUSED_RATIO * low_rank
        if fused and self.weight.dtype == input.dtype == torch.float32:
            weight = torch.addmm(self.weight, self.lora_B, self.lora_A, alpha=self.scale)
            return F.linear(input, weight, self.bias)
        hidden = F.linear(input, self.lora_A.to(input.dtype))
        change = F.linear(hidden, (self.scale * self.lora_B).to(input.dtype))
        return F.linear(input, self.weight, self.bias) + change


class Adapter:
    """The LoRA of one model."""

    def __init__(self, model: nn.Module, config: LoRAConfig, seed: int):
        """Freeze the model and adapt its named layers in place; nothing changes yet, as B is 0.

        Args:
            model: Any model; paths of its modules and names of its own weights stay as they are.
            config: Rank, scale and layers.
            seed: Seed of A.

        Raises:
            ValueError: A target is the end of no linear module's path, or the model has a LoRA.
        """
        paths = _paths(model, config)
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        self.config, self.model = config, model
        self.layers: dict[str, AdaptedLinear] = {}
        for path in paths:
            layer = model.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            AdaptedLinear.adapt(layer, config, generator)
            assert isinstance(layer, AdaptedLinear)
            self.layers[path] = layer

    def parameters(self) -> list[nn.Parameter]:
        """What is tuned: A and B of every layer."""
        return [getattr(layer, part) for layer in self.layers.values() for part in _PARTS]

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model as it was before, to the bit.

        What gradient checkpoints repeat in backward is computed as the switch stands then.
        """
        before = {path: layer.is_on for path, layer in self.layers.items()}
        self._switch(dict.fromkeys(self.layers, False))
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, is_on: Mapping[str, bool]) -> None:
        for path, layer in self.layers.items():
            layer.is_on = is_on[path]

    def state_dict(self) -> dict[str, Tensor]:
        """`<module path>.lora_A.weight` `[R, in]` and `.lora_B.weight` `[out, R]`, detached."""
        return {
            f"{path}.{part}.weight": getattr(layer, part).detach()
            for path, layer in self.layers.items()
            for part in _PARTS
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of `state_dict`.

        Raises:
            ValueError: A key is missing or unexpected, or a shape does not fit.
        """
        own = self.state_dict()
        check_tensors("adapter", tensors, {key: tuple(value.shape) for key, value in own.items()})
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(tensors[key])

    def merged(self) -> dict[str, Tensor]:
        """The model's own state with the LoRA added: what `model.state_dict()` was before.

        Sums are made in float32 and rounded to the model's type once.
        """
        weights = {}
        for name, value in self.model.state_dict().items():
            path, _, last = name.rpartition(".")
            if path in self.layers and last in _PARTS:
                continue
            if path in self.layers and last == "weight":
                with torch.no_grad():
                    value = (value.float() + self.layers[path].delta()).to(value.dtype)
            weights[name] = value
        return weights


def check_tensors(
    where: str, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare names and shapes of tensors with those expected; one line says all that differs.

    Raises:
        ValueError: Keys are missing, unexpected or of another shape.
    """
    wrong = [
        f"{key} {tuple(tensors[key].shape)} for {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    faults = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of another shape": wrong,
    }
    said = [f"{len(keys)} {what} ({keys[0]}, ...)" for what, keys in faults.items() if keys]
    if said:
        raise ValueError(f"{where}: got keys {'; '.join(said)}, expected {len(expected)} tensors")


def _paths(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Paths of the linear modules that a config names, in the model's order."""
    found: dict[str, list[str]] = {target: [] for target in config.target_modules}
    skipped = tuple(f"{path}." for path in config.skip_modules)
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            raise ValueError(f"adapter: got a model with a LoRA at {path}, expected one without")
        # Subclasses compute something else.
        if type(module) is nn.Linear and not f"{path}.".startswith(skipped):
            for target, paths in found.items():
                if f".{path}".endswith(f".{target}"):
                    paths.append(path)
    for target, paths in found.items():
        if not paths:
            raise ValueError(
                f"target_modules: got {target!r}, expected the end of a linear module's path in "
                f"{type(model).__name__}"
            )
    chosen = {path for paths in found.values() for path in paths}
    return [path for path, _ in model.named_modules() if path in chosen]
