"""How much memory the tuning of an SD3 takes, known before anything is loaded.

The models are built on torch's meta device, where tensors have shapes and types and no bytes, and
the passes of a run are run there: `LiveBytes` counts every allocation that torch would make and its
end, so a peak has weights' casts, temporaries, saved activations, what checkpoints recompute and
gradients in it. Attention is counted as its fused kernels have it: without the matrix of scores.

What a device needs beyond that (its context, the allocator's gaps) is left as a share of it.

Shapes: B rows, C channels, H x W latent pixels, S prompt positions, E and P their widths.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowloom.generator.adapters import Adapter
from flowloom.generator.config import FDFOConfig, TuneGeneratorConfig
from flowloom.generator.sd3 import TIMESTEPS, choose_device, find_pipeline, latent_shape
from flowloom.generator.sd3_layout import REWARD_WEIGHTS, SD3Layout, read_layout
from flowloom.score.config import RubricConfig, ShapesConfig

MAX_FRAC = 0.92
"""Share of a device that tensors may take; the rest is its context and gaps between tensors."""
GB = 1e9
CLIP_POSITIONS = 77


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes by phase and part."""

    phases: Mapping[str, Mapping[str, int]]
    """On the device: for each phase of a run, all parts that are there at its peak."""
    host: Mapping[str, int]
    """In the host's memory, beside the programs."""

    @property
    def peak(self) -> int:
        """Bytes on the device in the worst phase."""
        return max(sum(parts.values()) for parts in self.phases.values())

    def lines(self) -> list[str]:
        """The parts in words, in GB (1e9 bytes)."""
        rows = []
        for phase, parts in (*self.phases.items(), ("host", self.host)):
            listed = ", ".join(f"{part} {size / GB:.2f}" for part, size in parts.items())
            rows.append(f"{phase}: {sum(parts.values()) / GB:.2f} GB ({listed})")
        return rows


def check_fits(estimate: Estimate, device_bytes: int) -> None:
    """Refuse a run that will not fit.

    Raises:
        ValueError: The peak is more than `MAX_FRAC` of the device; names the parts of the worst
            phase, largest first, and what makes the largest that can be helped smaller.
    """
    allowed = int(MAX_FRAC * device_bytes)
    if estimate.peak <= allowed:
        return
    phase = max(estimate.phases, key=lambda name: sum(estimate.phases[name].values()))
    parts = sorted(estimate.phases[phase].items(), key=lambda item: -item[1])
    listed = ", ".join(f"{part} {size / GB:.1f}" for part, size in parts if size > 0.01 * GB)
    cure = next((_CURES[part] for part, _ in parts if part in _CURES), "a larger device")
    raise ValueError(
        f"memory: got {estimate.peak / GB:.1f} GB while it will {phase} ({listed}), expected at "
        f"most {allowed / GB:.1f} of the device's {device_bytes / GB:.1f} GB; lower {cure}"
    )


_CURES = {
    "training pass": "units_per_pass, sd3.size, or set sd3.gradient_checkpointing",
    "sampling pass": "sample_rows or sd3.size",
    "decoding pass": "sd3.decode_batch_size or sd3.size",
    "rewards": "the rubric's models, or put them on another device",
    "text encoders": "sd3.use_t5 to false",
}


def estimate(
    config: TuneGeneratorConfig,
    layout: SD3Layout,
    *,
    rewards: Mapping[str, int] | None = None,
    num_processes: int = 1,
) -> Estimate:
    """Memory of one process of a run, by parts.

    Args:
        config: The run; it must tune a pipeline.
        layout: The pipeline's sizes.
        rewards: Bytes of the models that score, by name, where they share the device.
        num_processes: Processes that share an epoch's pictures.
    """
    assert config.sd3 is not None, "only a pipeline is estimated"
    assert config.lora is not None, "checked by the configuration"
    sd3, guided = config.sd3, 1 if config.guidance is None else 2
    weights = getattr(torch, sd3.dtype)
    transformer = build_transformer(layout, weights)
    frozen = tensor_bytes(transformer)
    adapter = Adapter(transformer, config.lora, seed=0)
    tuned = sum(weight.numel() * weight.element_size() for weight in adapter.parameters())
    if sd3.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    vae = build_vae(layout)
    shape = latent_shape(sd3, transformer.config, vae.config)
    positions = CLIP_POSITIONS + sd3.num_t5_tokens

    branches = config.method.num_branches
    rows = rows_per_pass(config)
    wants_base = config.method.kl_coef > 0
    resident = {
        "transformer": frozen,
        "autoencoder": tensor_bytes(vae),
        "adapters": tuned,
        "gradients": tuned,
        "optimiser": 2 * tuned,
        "rewards": sum((rewards or {}).values()),
    }
    sampled = sampling_bytes(transformer, guided * config.sample_rows, shape, positions)
    trained = training_bytes(transformer, adapter, guided * rows, shape, positions, wants_base)
    phases = {
        "encode prompts": {
            "text encoders": text_bytes(layout, weights, sd3.use_t5),
        },
        "sample and score": resident
        | {
            "sampling pass": sampled,
            "decoding pass": decoding_bytes(vae, sd3.decode_batch_size, shape),
        },
        # AdamW makes a few temporaries of the adapters' size.
        "train": resident | {"training pass": trained, "optimiser step": 2 * tuned},
    }
    images = -(-config.images_per_epoch // branches // num_processes) * branches
    state = shape[0] * shape[1] * shape[2] * torch.float32.itemsize
    # Of every step the state, and what the method compares with: a velocity or a mean.
    host = {"paths": images * config.num_steps * 2 * state, "latents": 2 * images * state}
    pixels = 3 * sd3.size**2 * torch.float32.itemsize
    host["pictures"] = 2 * config.sample_rows * pixels
    return Estimate(phases, host)


def check_device(config: TuneGeneratorConfig) -> None:
    """Refuse a run that this process's GPU will not hold; on a CPU nothing is checked.

    Raises:
        ValueError: See `check_fits`; or the pipeline is not to be had.
    """
    assert config.sd3 is not None, "only a pipeline is estimated"
    device = choose_device(config.sd3.device)
    if device.type == "cuda":
        layout = read_layout(find_pipeline(config.sd3))
        found = estimate(config, layout, rewards=reward_bytes(config.rubric))
        check_fits(found, torch.cuda.get_device_properties(device).total_memory)


def reward_bytes(rubric: str | RubricConfig) -> dict[str, int]:
    """Bytes of the models that score, by name; those whose size is not known are left out.

    A folder's is that of its weight files, a hub name's is in `sd3_layout.REWARD_WEIGHTS`. What
    they compute on a picture is not counted.
    """
    found = {}
    for term in () if isinstance(rubric, str) else rubric.terms:
        scorer = term.scorer
        if isinstance(scorer, ShapesConfig):
            continue
        name = scorer.model
        files = list(Path(name).expanduser().glob("*.safetensors"))
        if files:
            found[name] = sum(file.stat().st_size for file in files)
        elif name in REWARD_WEIGHTS:
            found[name] = REWARD_WEIGHTS[name] * getattr(torch, scorer.dtype).itemsize
    return found


def rows_per_pass(config: TuneGeneratorConfig) -> int:
    """Rows of a backward pass: a unit of FDFO is all branches of a noise, of Flow-GRPO one."""
    per_unit = config.method.num_branches if isinstance(config.method, FDFOConfig) else 1
    if config.units_per_pass is not None:
        return config.units_per_pass * per_unit
    return -(-config.images_per_epoch * config.num_steps // config.num_minibatches)


def build_transformer(layout: SD3Layout, dtype: torch.dtype) -> Any:
    """The transformer on the meta device, frozen."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model: Any = SD3Transformer2DModel.from_config(dict(layout.transformer))
    return nn.Module.to(model, dtype).eval().requires_grad_(False)


def build_vae(layout: SD3Layout) -> Any:
    """The autoencoder on the meta device, frozen, float32."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        model: Any = AutoencoderKL.from_config(dict(layout.vae))
    return model.eval().requires_grad_(False)


def text_bytes(layout: SD3Layout, dtype: torch.dtype, use_t5: bool) -> int:
    """Weights of the text encoders; what they compute beside is small."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    total = 0
    for config in layout.text_encoders:
        is_t5 = "d_model" in config
        if is_t5 and not use_t5:
            continue
        with torch.device("meta"):
            if is_t5:
                model = T5EncoderModel(T5Config(**config))
            else:
                model = CLIPTextModelWithProjection(CLIPTextConfig(**config))
        total += tensor_bytes(nn.Module.to(model, dtype))
    return total


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and of the buffers that are stored; what is tied counts once."""
    different = {id(value): value for value in model.state_dict(keep_vars=True).values()}
    return sum(value.numel() * value.element_size() for value in different.values())


def sampling_bytes(
    transformer: Any, num_rows: int, shape: tuple[int, int, int], positions: int
) -> int:
    """Peak of a velocity without gradients, inputs included."""
    with counting() as live, torch.no_grad():
        run_transformer(transformer, num_rows, shape, positions)
    return live.peak


def training_bytes(
    transformer: Any,
    adapter: Adapter,
    num_rows: int,
    shape: tuple[int, int, int],
    positions: int,
    wants_base: bool,
) -> int:
    """Peak of velocity, base velocity and backward pass, inputs included, gradients not.

    Args:
        transformer: On the meta device, adapted.
        adapter: Its adapters.
        num_rows: Rows of the pass, doubled where guidance does.
        shape: Of the latents.
        positions: Of a prompt's context.
        wants_base: Whether the loss also asks for the base's velocity.
    """
    for weight in adapter.parameters():
        weight.grad = torch.empty_like(weight)
    with counting() as live:
        v_BCHW = run_transformer(transformer, num_rows, shape, positions)
        if wants_base:
            with torch.no_grad(), adapter.off():
                run_transformer(transformer, num_rows, shape, positions)
        v_BCHW.sum().backward()
    for weight in adapter.parameters():
        weight.grad = None
    return live.peak


def decoding_bytes(vae: Any, num_rows: int, shape: tuple[int, int, int]) -> int:
    """Peak of decoding, latents and pictures included."""
    with counting() as live, torch.no_grad():
        vae.decode(torch.empty(num_rows, *shape, device="meta"), return_dict=False)
    return live.peak


def run_transformer(
    transformer: Any, num_rows: int, shape: tuple[int, int, int], positions: int
) -> Tensor:
    """The transformer on inputs of so many rows, where it is and in its type."""
    like = {"device": transformer.device, "dtype": transformer.dtype}
    sizes = transformer.config
    return transformer(
        hidden_states=torch.zeros(num_rows, *shape, **like),
        timestep=torch.full((num_rows,), TIMESTEPS / 2, device=transformer.device),
        encoder_hidden_states=torch.zeros(num_rows, positions, sizes.joint_attention_dim, **like),
        pooled_projections=torch.zeros(num_rows, sizes.pooled_projection_dim, **like),
        return_dict=False,
    )[0]


class LiveBytes(TorchDispatchMode):
    """Counts bytes of tensors that come to be while it is on, and of those still there."""

    def __init__(self):
        """Begin at 0."""
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; storages that no input had are new."""
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given and storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, size: int) -> None:
        self.live -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


@contextmanager
def counting() -> Iterator[LiveBytes]:
    """Count with attention by a kernel that keeps no scores; the meta device takes another."""
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _fused_attention
    try:
        with LiveBytes() as live:
            yield live
    finally:
        F.scaled_dot_product_attention = plain


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
