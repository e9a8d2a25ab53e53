"""One batch of sampler runs: every step's network calls of all rows in one call.

A row calls the network once per conditioning it needs and per text of it that is active. What is
called for which row is laid out once and kept until rows finish or a text's time range opens or
closes; the texts' keys and values are computed once per batch.

Shapes: B rows, N of them running, M network calls, C channels, H x W pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from flowloom.render import conditioning, guidance, samplers
from flowloom.render.conditioning import Text, Texts
from flowloom.render.guidance import Guider
from flowloom.render.schedules import percent_to_sigma
from flowloom.shapes.model import ShapesModel, TextKeys, flops_per_call

MAX_LAYOUTS = 8
"""Arrangements of network calls that are kept."""
ROUNDING = 1e-6
"""Times that differ by less are equal: samplers count in float32."""


@dataclasses.dataclass(frozen=True, eq=False)
class SamplerTask:
    """A sampler run that waits for its batch."""

    guider: Guider
    latent_CHW: Tensor
    """What it starts from, before noise."""
    seed: int
    add_noise: bool
    """Whether noise is added at the start; fresh noise of a sampler comes from the seed anyway."""
    sampler: str
    """One of `samplers.SAMPLERS`."""
    times: tuple[float, ...]
    """Schedule of at least two times."""
    num_outputs: int
    """1 for the latent, 2 for the last denoised picture as well."""

    @property
    def group(self) -> tuple:
        """Tasks with equal groups may share a batch: they have one model and equal lengths."""
        guider = self.guider
        slots = max(text.num_slots for texts in guider.conditionings for text in texts)
        return (guider.model.weights, tuple(self.latent_CHW.shape), self.sampler, slots)


@dataclasses.dataclass(frozen=True, eq=False)
class Sampled:
    """What a sampler run leaves behind."""

    latent_CHW: Tensor
    """Scaled by 1 / (1 - t) where the run ends at a time t > 0."""
    denoised_CHW: Tensor
    """The last step's denoised picture."""
    flops: int
    """Multiply-adds times two of its network calls."""


def noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of one job: a function of its seed and shape alone."""
    generator = torch.Generator().manual_seed(seed % 2**64)
    return torch.randn(tuple(shape), generator=generator)


def step_seed(seed: int, step: int) -> int:
    """Seed of a step's fresh noise: far from any seed that another sampler may start from."""
    digest = hashlib.sha256(f"{seed % 2**64} step {step}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def run(model: ShapesModel, tasks: Sequence[SamplerTask]) -> list[Sampled]:
    """Run tasks of one group.

    Raises:
        ValueError: A text's width is not the model's.
        FloatingPointError: A picture is not finite.
    """
    latent_BCHW = torch.stack([task.latent_CHW for task in tasks])
    shape = latent_BCHW.shape[1:]
    noise_BCHW = torch.stack(
        [
            noise(task.seed, shape) if task.add_noise else torch.zeros_like(task.latent_CHW)
            for task in tasks
        ]
    )
    start_B, end_B = (torch.tensor([task.times[k] for task in tasks]) for k in (0, -1))
    x_BCHW = samplers.add_noise(latent_BCHW, noise_BCHW, start_B)
    denoiser = _Denoiser(model, tasks)

    def fresh(row: int, step: int) -> Tensor:
        return noise(step_seed(tasks[row].seed, step), shape)

    times = [task.times for task in tasks]
    x_BCHW, denoised_BCHW = samplers.sample(denoiser, x_BCHW, times, tasks[0].sampler, fresh)
    x_BCHW = samplers.leave(x_BCHW, end_B)
    return [
        Sampled(x, denoised, flops)
        for x, denoised, flops in zip(x_BCHW, denoised_BCHW, denoiser.flops_B.tolist(), strict=True)
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class _Layout:
    """Which network calls make the predictions of some running rows.

    Predictions are numbered conditioning by conditioning: first all rows' first.
    """

    positions_M: Tensor | slice
    """Row of each call, as a position among the running ones."""
    keys: TextKeys | None
    """Text of each call; None where there is no call at all."""
    mean: tuple[Tensor, Tensor] | None
    """Prediction of each call and its weight in it; None where each prediction is one call."""
    num_predictions: int
    """How many predictions there are."""
    slots: tuple[Tensor | slice, ...]
    """By conditioning: the running rows' predictions."""
    guiders: guidance.Rows
    flops_B: np.ndarray
    """What the calls cost each row of the batch."""


class _Denoiser:
    """Denoised pictures of a batch, as samplers ask for them; counts what they cost."""

    def __init__(self, model: ShapesModel, tasks: Sequence[SamplerTask]):
        self._model, self._guiders = model, [task.guider for task in tasks]
        texts = {
            id(text): text
            for guider in self._guiders
            for conditioned in guider.conditionings
            for text in conditioned
        }
        self._number = {name: number for number, name in enumerate(texts)}
        _check_widths(model, texts.values())
        self._keys = model.text_keys(conditioning.stack(list(texts.values())))
        height, width = tasks[0].latent_CHW.shape[1:]
        self._flops = {
            slots: flops_per_call(model.config, (height, width), slots)
            for slots in {text.num_slots for text in texts.values()}
        }
        self._is_bounded = any(text.is_bounded for text in texts.values())
        self._layouts: dict[tuple, _Layout] = {}
        self.flops_B = np.zeros(len(tasks), np.int64)

    def __call__(self, x_NCHW: Tensor, t_N: Tensor, rows_N: Tensor) -> Tensor:
        """Predict, combine each row's texts, guide."""
        rows = rows_N.tolist()
        active = tuple(
            self._active(self._guiders[row], t)
            for row, t in zip(rows, t_N.tolist() if self._is_bounded else rows, strict=True)
        )
        layout = self._layouts.get((tuple(rows), active))
        if layout is None:
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[tuple(rows), active] = self._lay_out(rows, active)
        self.flops_B += layout.flops_B
        at = layout.positions_M
        if layout.keys is None:
            return torch.zeros_like(x_NCHW)
        out = self._model(x_NCHW[at], t_N[at], layout.keys)
        if layout.mean is not None:
            prediction_M, weight_M = layout.mean
            sums = out.new_zeros(layout.num_predictions, *out.shape[1:])
            out = sums.index_add_(0, prediction_M, out * weight_M[:, None, None, None])
        return layout.guiders.apply(x_NCHW, [out[slot] for slot in layout.slots])

    def _active(self, guider: Guider, t: float) -> tuple[tuple[Text, ...], ...]:
        """By conditioning: the texts that take part at time t; both ends belong to a range."""
        if not self._is_bounded:
            return guider.conditionings
        shift = guider.model.shift
        return tuple(
            tuple(
                text
                for text in texts
                if not text.is_bounded
                or percent_to_sigma(text.end, shift) - ROUNDING
                <= t
                <= percent_to_sigma(text.start, shift) + ROUNDING
            )
            for texts in guider.conditionings
        )

    def _lay_out(self, rows: Sequence[int], active: Sequence[tuple[Texts, ...]]) -> _Layout:
        positions, numbers, prediction_of, times, num_calls = [], [], [], [], []
        flops_B = np.zeros_like(self.flops_B)
        slots: list[Tensor | slice] = []
        for slot in range(max(len(conditionings) for conditionings in active)):
            first = len(num_calls)
            predictions = [0] * len(rows)  # where a row lacks the conditioning, any will do
            for position, conditionings in enumerate(active):
                if slot >= len(conditionings):
                    continue
                predictions[position] = len(num_calls)
                for text in conditionings[slot]:
                    positions.append(position)
                    numbers.append(self._number[id(text)])
                    prediction_of.append(len(num_calls))
                    times.append(text.times)
                    flops_B[rows[position]] += self._flops[text.num_slots]
                num_calls.append(len(conditionings[slot]))
            complete = len(num_calls) - first == len(rows)
            slots.append(slice(first, len(num_calls)) if complete else torch.tensor(predictions))
        mean = None
        if any(count != 1 for count in num_calls):
            prediction_M = torch.tensor(prediction_of, dtype=torch.long)
            times_M = torch.tensor(times, dtype=torch.float32)
            total_P = times_M.new_zeros(len(num_calls)).index_add_(0, prediction_M, times_M)
            mean = prediction_M, times_M / total_P[prediction_M]
        all_once = positions == list(range(len(rows)))
        return _Layout(
            positions_M=slice(None) if all_once else torch.tensor(positions, dtype=torch.long),
            keys=self._keys[torch.tensor(numbers)] if numbers else None,
            mean=mean,
            num_predictions=len(num_calls),
            slots=tuple(slots),
            guiders=guidance.Rows([self._guiders[row] for row in rows]),
            flops_B=flops_B,
        )


def _check_widths(model: ShapesModel, texts: Iterable[Text]) -> None:
    width = model.config.width
    for text in texts:
        if len(text.pooled_D) != width:
            raise ValueError(
                f"conditioning: got a text of width {len(text.pooled_D)}, expected {width}: it was "
                "encoded for a model of another size"
            )
