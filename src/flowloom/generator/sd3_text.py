"""Embeddings of prompts for SD3: encoded once, kept on disk by prompt, the encoders freed.

Two CLIP text encoders give the hidden states of their last layer but one, side by side and padded
with zeros to the width of the third one, T5, whose states follow. Their pooled outputs, side by
side, are the second input of the transformer (arXiv 2403.03206, figure 2).

Shapes: B prompts, S positions, E width of the context, P width of the pooled part.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from flowloom.generator.sd3_config import SD3Config

_CLIP, _T5 = ("", "_2"), "_3"


class PromptEmbeddings:
    """The embeddings of one model, by prompt; `prepare` first, then call."""

    def __init__(self, model_dir: Path, config: SD3Config, cache_dir: Path, device: torch.device):
        """Take the pipeline's folder, and the folder that embeddings are kept in."""
        self.model_dir, self.config, self.device = model_dir, config, device
        self.cache_dir = cache_dir
        self._fingerprint = _fingerprint(model_dir, config)
        self._last: tuple[tuple[str, ...], tuple[Tensor, Tensor]] | None = None
        self._empty: tuple[Tensor, Tensor] | None = None

    def prepare(self, prompts: Sequence[str]) -> int:
        """Encode those prompts that are not on disk yet, and the empty one.

        The text encoders are loaded only if there is something to encode, and gone afterwards.

        Returns:
            How many were encoded.

        Raises:
            ValueError: An encoder is missing in the folder.
        """
        different = dict.fromkeys(["", *prompts])
        missing = [text for text in different if not self._path(text).is_file()]
        if missing:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            self._encode_and_free(missing)
        return len(missing)

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context `[B, S, E]` and pooled `[B, P]` on the device.

        Raises:
            ValueError: A prompt was not prepared.
        """
        key = tuple(prompts)
        # A rollout asks for the same rows at every step.
        if self._last is None or self._last[0] != key:
            different = list(dict.fromkeys(key))
            rows = torch.tensor([different.index(text) for text in key], device=self.device)
            contexts, pools = zip(*map(self._read, different), strict=True)
            self._last = key, (torch.stack(contexts)[rows], torch.stack(pools)[rows])
        return self._last[1]

    def empty(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """The same of the empty prompt, for so many rows."""
        if self._empty is None:
            self._empty = self._read("")
        context_SE, pooled_P = self._empty
        return context_SE.expand(num_rows, -1, -1), pooled_P.expand(num_rows, -1)

    def _read(self, prompt: str) -> tuple[Tensor, Tensor]:
        path = self._path(prompt)
        if not path.is_file():
            raise ValueError(f"prompt: got {prompt!r}, expected one that was encoded beforehand")
        read = safetensors.torch.load_file(path, device=str(self.device))
        return read["context"], read["pooled"]

    def _path(self, prompt: str) -> Path:
        digest = hashlib.sha256(f"{self._fingerprint}\n{prompt}".encode()).hexdigest()
        return self.cache_dir / f"{digest[:32]}.safetensors"

    def _encode_and_free(self, prompts: Sequence[str]) -> None:
        encoders = TextEncoders(self.model_dir, self.config, self.device)
        freed = [weakref.ref(model) for model in encoders.models]
        size = self.config.text_batch_size
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            for text, context_SE, pooled_P in zip(batch, *encoders(batch), strict=True):
                _write(self._path(text), {"context": context_SE, "pooled": pooled_P})
        del encoders
        gc.collect()
        assert all(model() is None for model in freed), "a text encoder is still held"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class TextEncoders:
    """Two CLIP text encoders and, where it is used, T5, with their tokenizers."""

    def __init__(self, model_dir: Path, config: SD3Config, device: torch.device):
        """Load them from the pipeline's folder.

        Raises:
            ValueError: One is missing or cannot be read.
        """
        from transformers import (
            CLIPTextModelWithProjection,
            CLIPTokenizer,
            T5EncoderModel,
            T5Tokenizer,
        )

        self.config, self.device = config, device
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.width = json.loads((model_dir / "transformer" / "config.json").read_text())[
            "joint_attention_dim"
        ]
        wanted: list[tuple[str, Any, Any]] = [
            (suffix, CLIPTokenizer, CLIPTextModelWithProjection) for suffix in _CLIP
        ]
        if config.use_t5:
            wanted.append((_T5, T5Tokenizer, T5EncoderModel))
        self.tokenizers, self.models = [], []
        for suffix, tokenizer, model in wanted:
            self.tokenizers.append(_load_part(tokenizer, model_dir, f"tokenizer{suffix}"))
            read = _load_part(model, model_dir, f"text_encoder{suffix}", dtype=self.dtype)
            self.models.append(read.to(device).eval())

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context `[B, S, E]` and pooled `[B, P]`, on the CPU, in the encoders' type."""
        contexts, pools = [], []
        for index in range(len(_CLIP)):
            # Both CLIPs read as many positions as the first one knows.
            ids_BS = self._ids(index, prompts, self.tokenizers[0].model_max_length)
            output = self.models[index](ids_BS, output_hidden_states=True)
            contexts.append(output.hidden_states[-2])
            pools.append(output[0])
        clip_BSE = torch.cat(contexts, -1)
        clip_BSE = F.pad(clip_BSE, (0, self.width - clip_BSE.shape[-1]))
        if self.config.use_t5:
            ids_BS = self._ids(len(_CLIP), prompts, self.config.num_t5_tokens)
            t5_BSE = self.models[-1](ids_BS)[0]
        else:
            t5_BSE = clip_BSE.new_zeros(len(prompts), self.config.num_t5_tokens, self.width)
        context_BSE = torch.cat([clip_BSE, t5_BSE], 1).to(self.dtype)
        return context_BSE.cpu(), torch.cat(pools, -1).to(self.dtype).cpu()

    def _ids(self, index: int, prompts: Sequence[str], length: int) -> Tensor:
        tokens = self.tokenizers[index](
            list(prompts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self.device)


def _load_part(kind: Any, model_dir: Path, name: str, **options: Any) -> Any:
    """One part of a pipeline's folder.

    Raises:
        ValueError: It is missing or cannot be read.
    """
    if not (model_dir / name).is_dir():
        hint = ", or use_t5 = false" if name.endswith(_T5) else ""
        raise ValueError(f"{model_dir}: got no folder {name}, expected one{hint}")
    try:
        return kind.from_pretrained(model_dir / name, **options)
    except (OSError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{model_dir / name}: expected a {kind.__name__}, got: {reason}"
        ) from error


def _fingerprint(model_dir: Path, config: SD3Config) -> str:
    """What an embedding depends on beside its prompt: the encoders' files, by size and date."""
    suffixes = (*_CLIP, _T5) if config.use_t5 else _CLIP
    files = []
    for suffix in suffixes:
        for folder in (f"tokenizer{suffix}", f"text_encoder{suffix}"):
            found = sorted(path for path in (model_dir / folder).rglob("*") if path.is_file())
            for path in found:
                stat = path.stat()
                files.append([str(path.relative_to(model_dir)), stat.st_size, stat.st_mtime_ns])
    facts = [config.dtype, config.use_t5, config.num_t5_tokens, files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file so that another process sees none or all of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(whole, partial)
    partial.replace(path)
