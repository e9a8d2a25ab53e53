"""The cells of a dataset of triplets: a workflow on a prompt, with the seeds to render."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

from flowloom.dataset.splits import TRAIN, is_held_out_workflow
from flowloom.shapes.prompts import PromptSpec
from flowloom.workflow import Workflow

CALIBRATION = "calibration"


@dataclasses.dataclass(frozen=True)
class Template:
    """A workflow with places for prompt, negative text and seeds."""

    workflow: Workflow
    """In canonical form."""
    fingerprint: str
    """Its template fingerprint."""

    @staticmethod
    def of(workflow: Workflow) -> Template:
        """The template of a workflow in canonical form."""
        return Template(workflow, workflow.template_fingerprint())

    @property
    def held_out(self) -> bool:
        """Whether it is never trained on."""
        return is_held_out_workflow(self.fingerprint)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One workflow on one prompt."""

    spec: PromptSpec
    """The prompt."""
    workflow: Workflow
    """Template, in canonical form."""
    fingerprint: str
    """Template fingerprint."""
    split: str
    """`train`, `held_out_workflow` (on a train prompt) or `calibration`."""
    origin: str
    """`panel`, `random` (a pair), `wild` or `evolved`."""
    seeds: tuple[int, ...]
    """Seeds to render."""

    @property
    def steers(self) -> bool:
        """Whether the next round's plan looks at its scores."""
        return self.split == TRAIN or self.origin == "panel"


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A cell with its scores."""

    cell: Cell
    scores: tuple[float, ...]
    """One per seed; none where the cell steers nothing."""


Pairs = Mapping[str, Sequence[Template]]
"""Workflows of each train prompt."""


def render_seed(seed: int, prompt: str, name: str, number: int) -> int:
    """Seed of one render, below 2^48 so that every reader holds it exactly."""
    digest = hashlib.sha256(f"{seed}|{prompt}|{name}|{number}".encode()).digest()
    return int.from_bytes(digest[:6], "big")
