"""Stable Diffusion 3 and 3.5 (medium and large) of diffusers, as a generator that can be tuned.

    x_t = (1 - t) x0 + t eps over the autoencoder's latents,   v(x, t) = transformer(x, 1000 t)

The transformer is frozen and carries a LoRA in float32, the only thing with gradients; switched
off, it is the base again, so both velocities share one copy of the weights. States and velocities
live in the host's memory in float32: a rollout keeps thousands of them, and one is small beside
what the transformer computes from it. Its times are to be shifted by 3, as those it was trained
with (arXiv 2403.03206): `TIME_SHIFT`.

Shapes: B rows, C latent channels, H x W latent pixels, S positions and E width of the prompt's
context, P width of its pooled part.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowloom.generator.adapters import Adapter
from flowloom.generator.lora_config import LoRAConfig
from flowloom.generator.sd3_config import SD3Config
from flowloom.generator.sd3_text import PromptEmbeddings
from flowloom.processes import Processes
from flowloom.progress import no_progress_bars
from flowloom.runs import home

TIME_SHIFT = 3.0
TIMESTEPS = 1000
TRANSFORMER_PREFIX = "transformer"


class SD3Flow:
    """The velocity of an SD3 transformer with a LoRA, guided where a scale is given."""

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        embeddings: PromptEmbeddings,
        config: SD3Config,
        lora: LoRAConfig,
        *,
        guidance: float | None = None,
        seed: int = 0,
    ):
        """Put a generator together; `load_sd3` reads its parts.

        Args:
            transformer: An SD3Transformer2DModel, from now on frozen and adapted in place.
            vae: Its AutoencoderKL.
            embeddings: Of the prompts that will be asked for, prepared.
            config: How it runs.
            lora: The adapters.
            guidance: Scale w: v = v_empty + w (v_prompt - v_empty); None leaves v_prompt.
            seed: Of the adapters.

        Raises:
            ValueError: Pictures of this size are larger than the transformer's positions, or the
                LoRA's layers are not in it.
        """
        self.transformer, self.vae, self.embeddings = transformer, vae, embeddings
        self.config, self.guidance = config, guidance
        self.shape = latent_shape(config, transformer.config, vae.config)
        self.adapter = Adapter(transformer, lora, seed)
        vae.requires_grad_(False)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()

    @property
    def device(self) -> torch.device:
        """Where states are expected: the host, wherever the transformer is."""
        return torch.device("cpu")

    def with_guidance(self, guidance: float | None) -> SD3Flow:
        """The same generator, sharing its weights, with another guidance scale; None: without."""
        view = copy.copy(self)
        view.guidance = guidance
        return view

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode the prompts that will be asked for, where they are not on disk yet."""
        self.embeddings.prepare(prompts)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is tuned."""
        return iter(self.adapter.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The LoRA, `<path in the transformer>.lora_A.weight` and `.lora_B.weight`."""
        return self.adapter.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        self.adapter.load_state_dict(state)

    def velocity(self, x_BCHW: Tensor, t_B: Tensor, prompts: Sequence[str]) -> Tensor:
        """v(x, t | prompt), float32, on the device of `x_BCHW`."""
        context_BSE, pooled_BP = self.embeddings(prompts)
        if self.guidance is None:
            return self._velocity(x_BCHW, t_B, context_BSE, pooled_BP)
        empty_BSE, empty_BP = self.embeddings.empty(len(prompts))
        v_2BCHW = self._velocity(
            torch.cat([x_BCHW, x_BCHW]),
            torch.cat([t_B, t_B]),
            torch.cat([empty_BSE, context_BSE]),
            torch.cat([empty_BP, pooled_BP]),
        )
        v_empty, v_prompt = v_2BCHW.chunk(2)
        return v_empty + self.guidance * (v_prompt - v_empty)

    @torch.no_grad()
    def base_velocity(self, x_BCHW: Tensor, t_B: Tensor, prompts: Sequence[str]) -> Tensor:
        """The velocity before tuning, guided alike; without gradients."""
        with self.adapter.off():
            return self.velocity(x_BCHW, t_B, prompts)

    @torch.no_grad()
    def decode(self, x_BCHW: Tensor) -> Tensor:
        """Pictures `[B, 3, 8 H, 8 W]` in [-1, 1], float32 on the CPU, not clamped."""
        latents_BCHW = x_BCHW / self.vae.config.scaling_factor + self.vae.config.shift_factor
        pictures = [
            self.vae.decode(part.to(self.vae.device), return_dict=False)[0].cpu()
            for part in latents_BCHW.float().split(self.config.decode_batch_size)
        ]
        return torch.cat(pictures)

    def _velocity(
        self, x_BCHW: Tensor, t_B: Tensor, context_BSE: Tensor, pooled_BP: Tensor
    ) -> Tensor:
        device, dtype = self.transformer.device, self.transformer.dtype
        v_BCHW = self.transformer(
            hidden_states=x_BCHW.to(device, dtype),
            timestep=(t_B * TIMESTEPS).to(device),
            encoder_hidden_states=context_BSE,
            pooled_projections=pooled_BP,
            return_dict=False,
        )[0]
        return v_BCHW.to(x_BCHW.device, torch.float32)


def load_sd3(
    config: SD3Config,
    lora: LoRAConfig,
    prompts: Sequence[str],
    *,
    guidance: float | None = None,
    seed: int = 0,
    processes: Processes | None = None,
) -> SD3Flow:
    """Read a pipeline; text encoders only where a prompt is not on disk, and freed first.

    Args:
        config: Which pipeline, and how it runs.
        lora: The adapters.
        prompts: All prompts that will be asked for; others can be prepared later.
        guidance: Guidance scale; None for none.
        seed: Of the adapters.
        processes: Those that load it together, the first of which encodes; None: this one alone.

    Raises:
        ValueError: There is no such folder or name, a part of it is missing, or it does not fit
            the configuration.
    """
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    folder, device = find_pipeline(config), choose_device(config.device)
    cache_dir = Path(config.embeddings_dir) if config.embeddings_dir else home() / "embeddings"
    embeddings = PromptEmbeddings(folder, config, cache_dir, device)
    if processes is not None and not processes.is_first:
        processes.wait()
    embeddings.prepare(prompts)
    if processes is not None and processes.is_first:
        processes.wait()
    vae = _read(AutoencoderKL, folder, "vae", torch.float32)
    transformer = _read(
        SD3Transformer2DModel, folder, TRANSFORMER_PREFIX, getattr(torch, config.dtype)
    )
    return SD3Flow(
        transformer.to(device).eval(),
        vae.to(device).eval(),
        embeddings,
        config,
        lora,
        guidance=guidance,
        seed=seed,
    )


def latent_shape(
    config: SD3Config, transformer: Mapping[str, Any], vae: Mapping[str, Any]
) -> tuple[int, int, int]:
    """Channels, height and width of the latents of `config.size` pixels.

    Raises:
        ValueError: The transformer has fewer positions along a side.
    """
    side = config.size // 2 ** (len(vae["block_out_channels"]) - 1)
    patch, most = transformer["patch_size"], transformer["pos_embed_max_size"]
    if side % patch or side // patch > most:
        largest = most * config.size * patch // side
        raise ValueError(f"size: got {config.size} pixels, expected at most {largest} in patches")
    return transformer["in_channels"], side, side


def find_pipeline(config: SD3Config) -> Path:
    """The folder of a pipeline; one on the hub is fetched once.

    Raises:
        ValueError: There is no such folder, and the hub does not give it.
    """
    folder = Path(config.name_or_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        parts = [f"{part}/*" for part in ("transformer", "vae", "text_encoder*", "tokenizer*")]
        skipped = [] if config.use_t5 else ["text_encoder_3/*", "tokenizer_3/*"]
        try:
            found = snapshot_download(
                config.name_or_path,
                revision=config.revision,
                allow_patterns=parts,
                ignore_patterns=[*skipped, "*.fp16.*", "*.bin", "*.msgpack"],
            )
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"name_or_path: got {config.name_or_path!r}, expected a folder of an SD3 pipeline "
                f"or its name on the hub: {reason}"
            ) from error
        folder = Path(found)
    for part in (TRANSFORMER_PREFIX, "vae"):
        if not (folder / part / "config.json").is_file():
            raise ValueError(f"{folder}: got no {part}/config.json, expected an SD3 pipeline")
    return folder


def choose_device(name: str) -> torch.device:
    """The device of a name; `auto` is this process's GPU under torchrun."""
    if name != "auto":
        return torch.device(name)
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(gpu if torch.cuda.is_available() else "cpu")


def _read(kind: Any, folder: Path, part: str, dtype: torch.dtype) -> Any:
    """A part of a pipeline.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        with no_progress_bars("diffusers"):
            return kind.from_pretrained(folder / part, torch_dtype=dtype)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder / part}: expected a {kind.__name__}, got: {reason}") from error
