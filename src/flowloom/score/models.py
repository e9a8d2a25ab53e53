"""Frozen models that score pictures: loaded on first use, shared in a process, freed by `close`.

Two scorers whose model, revision, type and device are the same hold one copy between them; it goes
when the last of them is closed. Pictures are prepared with PIL on the CPU on every machine, so that
a score does not depend on which libraries are installed.
"""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from flowloom.progress import no_progress_bars
from flowloom.score.config import ModelConfig

if TYPE_CHECKING:
    from PIL.Image import Image

LoadedT = TypeVar("LoadedT")
_SHARED: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
_LOCK = threading.RLock()


class ModelScorer(ABC):
    """A `Scorer` with a model, for terms that take pictures as they are."""

    def __init__(self, batch_size: int):
        """Take how many pictures are scored at once; nothing is loaded yet."""
        self._batch_size = batch_size
        self._loaded: Any = None

    def __call__(
        self, prompts: Sequence[str], images: Sequence[Tensor], flops_B: np.ndarray
    ) -> np.ndarray:
        """One value per picture, float64.

        Args:
            prompts: One per picture.
            images: `[3, H, W]` in [-1, 1]; what is beyond is cut off.
            flops_B: Not used.

        Raises:
            ValueError: The model cannot be loaded, or a prompt is not one the scorer can judge.
            FloatingPointError: A picture is not finite.
            RuntimeError: The model broke down; names the first prompt of the batch.
        """
        if not prompts:
            return np.zeros(0)
        with _LOCK:
            if self._loaded is None:
                self._loaded = self.load()
        pictures = [to_pil(image, text) for image, text in zip(images, prompts, strict=True)]
        values = []
        for first in range(0, len(prompts), self._batch_size):
            part = slice(first, first + self._batch_size)
            with torch.inference_mode():
                values.append(self.values(self._loaded, prompts[part], pictures[part]))
        return np.concatenate(values).astype(np.float64)

    def close(self) -> None:
        """Let go of the model; the next call loads it again."""
        self._loaded = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @abstractmethod
    def load(self) -> Any:
        """What `values` needs."""

    @abstractmethod
    def values(self, loaded: Any, prompts: Sequence[str], pictures: Sequence[Image]) -> np.ndarray:
        """`[B]` values of one batch."""


def shared(key: tuple, load: Callable[[], LoadedT]) -> LoadedT:
    """What `load` gives, once per key for as long as somebody holds it."""
    with _LOCK:
        found = _SHARED.get(key)
        if found is None:
            found = _SHARED[key] = load()
        return found


def to_pil(image_CHW: Tensor, prompt: str) -> Image:
    """A picture `[3, H, W]` in [-1, 1] as 8-bit RGB.

    Raises:
        FloatingPointError: It is not finite; names its prompt.
    """
    from PIL import Image

    if not torch.isfinite(image_CHW).all():
        raise FloatingPointError(f"the picture is not finite for {prompt!r}")
    bytes_HWC = ((image_CHW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(bytes_HWC.cpu().numpy(), "RGB")


def read_part(factory: Any, config: ModelConfig, what: str, **options: Any) -> Any:
    """A part of a model by the `from_pretrained` of its transformers class.

    Args:
        factory: The class.
        config: Where it is.
        what: What it is, for the error.
        options: Passed on.

    Raises:
        ValueError: The folder lacks it, or the hub does not have it or cannot be reached.
    """
    source = config.model
    if source.startswith(("/", "./", "../", "~")) and not Path(source).expanduser().is_dir():
        raise ValueError(f"model: got {source!r}, expected an existing folder or a name on the hub")
    folder = Path(source).expanduser()
    try:
        with no_progress_bars("transformers"):
            return factory.from_pretrained(
                str(folder) if folder.is_dir() else source, revision=config.revision, **options
            )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        raise ValueError(f"{source}: expected {what}, got: {reason}") from error


def read_model(factory: Any, config: ModelConfig, what: str) -> Any:
    """A frozen model on its device, in evaluation mode; see `read_part`."""
    model = read_part(factory, config, what, dtype=getattr(torch, config.dtype))
    return model.to(device_of(config)).eval().requires_grad_(False)


def check_tokenizer(tokenizer: Any, text_config: Any, config: ModelConfig) -> None:
    """Make sure that a tokenizer has its words: without its file it is made with hardly any.

    Raises:
        ValueError: It has less than half of what the model reads (some models are padded).
    """
    got, expected = len(tokenizer), text_config.vocab_size
    if 2 * got < expected:
        raise ValueError(
            f"{config.model}: expected a tokenizer of {expected} words, got: {got}; is its "
            "tokenizer.json (or vocab.json and merges.txt) there?"
        )


def device_of(config: ModelConfig) -> str:
    """The device of a configuration; `auto` is this process's GPU under torchrun."""
    if config.device != "auto":
        return config.device
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
