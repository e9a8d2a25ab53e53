"""One epoch's pictures: drawn part by part, scored meanwhile, shared by the processes.

Shapes: P prompts, K pictures per prompt, B = P * K rows of all processes, b rows of this one,
J terms of the score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowloom.generator.evaluation import OUT_OF_RANGE
from flowloom.generator.method import Method
from flowloom.generator.velocity import Generator
from flowloom.processes import Processes
from flowloom.score.rubric import Rubric

_MESSAGE_BYTES = 400


@dataclasses.dataclass(frozen=True)
class Share:
    """The prompts of an epoch that this process has: a run of neighbours."""

    processes: Processes
    """The group."""
    num_prompts: int
    """P."""
    num_branches: int
    """K."""

    @property
    def prompts(self) -> range:
        """Indices of this process's prompts."""
        parts = np.array_split(np.arange(self.num_prompts), self.processes.num)
        own = parts[self.processes.rank]
        return range(int(own[0]), int(own[-1]) + 1)

    def whole(self, values_b: Tensor) -> Tensor:
        """The rows of all processes `[B, ...]`, put together from those of each."""
        K, own = self.num_branches, self.prompts
        whole_B = values_b.new_zeros(self.num_prompts * K, *values_b.shape[1:])
        whole_B[own.start * K : own.stop * K] = values_b
        return self.processes.sum(whole_B)


@dataclasses.dataclass(frozen=True)
class Part:
    """What was drawn at once."""

    prompts: range
    """Indices of its prompts among those of the epoch."""
    paths: Any
    """What the method's rollout returned."""


def roll_out(
    flow: Generator,
    method: Method,
    rubric: Rubric,
    prompts: Sequence[str],
    seeds: Sequence[int],
    share: Share,
    sample_rows: int,
    epoch: int,
) -> tuple[list[Part], Tensor, Tensor]:
    """Draw and score the pictures of an epoch.

    Args:
        flow: What is tuned.
        method: How its pictures are drawn.
        rubric: Scores them, in a thread beside the drawing.
        prompts: All P of the epoch.
        seeds: One per prompt.
        share: Whose pictures are this process's.
        sample_rows: Pictures drawn at once, rounded down to whole prompts.
        epoch: Named in errors.

    Returns:
        The parts of this process; scores of all processes `[B, 1 + J]`, the total first, then the
        standardised terms; and the share of wild values of each row of this process, `[b]`.

    Raises:
        FloatingPointError: A picture or a score is not finite; names the epoch.
        RuntimeError: Drawing or scoring failed, here or in another process; names both.
    """
    own, size = share.prompts, max(sample_rows // method.num_branches, 1)
    parts: list[Part] = []
    wild: list[Tensor] = []
    scores, failure = None, None
    # All is caught: other processes wait for this one, and must hear why it does not come.
    try:
        with ThreadPoolExecutor(1) as pool:
            scored: list[Future[Tensor]] = []
            for first in range(own.start, own.stop, size):
                some = range(first, min(first + size, own.stop))
                texts = prompts[some.start : some.stop]
                paths = method.roll_out(flow, texts, seeds[some.start : some.stop])
                images_BCHW = flow.decode(paths.images_BCHW)
                scored.append(pool.submit(score, rubric, list(paths.prompts_B), images_BCHW))
                wild.append((images_BCHW.abs() > OUT_OF_RANGE).float().flatten(1).mean(1))
                parts.append(Part(some, paths))
            scores = torch.cat([future.result() for future in scored])
    except Exception as error:
        failure = error
    raise_together(share.processes, failure, f"epoch {epoch}")
    assert scores is not None
    return parts, share.whole(scores), torch.cat(wild)


def score(rubric: Rubric, prompts: Sequence[str], images_BCHW: Tensor) -> Tensor:
    """Scores of pictures as the renderer would hand them on, clamped to [-1, 1]; `[B, 1 + J]`.

    The total comes first, then the standardised terms.
    """
    rows = rubric.score(prompts, list(images_BCHW.clamp(-1, 1).numpy()))
    columns = [np.array([row["score"] for row in rows])]
    for term in rubric.terms:
        columns.append(term.standardised(np.array([row[term.name] for row in rows])))
    return torch.from_numpy(np.stack(columns, 1)).float()


def raise_together(processes: Processes, failure: Exception | None, where: str) -> None:
    """Raise in every process if one has failed.

    Raises:
        FloatingPointError: This process failed with one; says where.
        RuntimeError: This process or another failed; says which and why.
    """
    kind = FloatingPointError if isinstance(failure, FloatingPointError) else RuntimeError
    if processes.num == 1:
        if failure is not None:
            raise kind(f"{where}: {failure}") from failure
        return
    said_RN = torch.zeros(processes.num, _MESSAGE_BYTES, dtype=torch.long)
    if failure is not None:
        text = f"{type(failure).__name__}: {failure}".encode()[:_MESSAGE_BYTES]
        said_RN[processes.rank, : len(text)] = torch.tensor(list(text))
    said_RN = processes.sum(said_RN)
    reasons = [
        f"process {rank}: " + bytes(row).decode(errors="ignore").rstrip("\0")
        for rank, row in enumerate(said_RN.tolist())
        if any(row)
    ]
    if reasons:
        raise kind(f"{where}: {'; '.join(reasons)}") from failure
