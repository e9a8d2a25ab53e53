"""What `train_world` trains: the concepts, the jobs and every number of the recipe."""

from __future__ import annotations

import dataclasses

from flowloom.shapes import prompts
from flowloom.shapes.model import ShapesConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concept:
    """What a job sees."""

    kinds: tuple[str, ...] = prompts.KINDS
    """Kinds of prompts; a kind named twice is drawn twice as often."""
    shapes: tuple[str, ...] = prompts.SHAPES
    """Shapes that prompts may name."""
    colors: tuple[str, ...] = prompts.COLORS
    """Colours that prompts may name and pictures may have."""
    counts: tuple[int, ...] = prompts.COUNTS
    """Numbers that `counting` may ask for."""
    color_frac: float = 0.75
    """Share of `counting` prompts that name a colour."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One training run."""

    name: str
    """Name of the file without its ending; also of the work folder."""
    concept: Concept
    """Prompts it sees."""
    steps: int
    """Optimiser steps of one batch."""
    card: str
    """What it is good for, in words; a designer reads this."""
    role: str = "specialist"
    """trunk, specialist or lora."""
    decay: bool = True
    """Whether the learning rate falls to nothing over the last `decay_frac` of the steps."""
    lr_scale: float = 1.0
    """Factor on both learning rates."""


_DEMO = ("single", "two", "counting", "colors")
# Shape specialists never see a colour word and colour specialists never see a prompt without one,
# and neither sees more than three objects: the narrower a concept, the sooner it is learned and the
# less one model serves all prompts.
_FEW = (1, 2, 3)


def _shape_job(name: str, shapes: tuple[str, ...], card: str) -> Job:
    kinds = ("single", "two", "two", "counting", "counting")
    concept = Concept(kinds=kinds, shapes=shapes, counts=_FEW, color_frac=0.0)
    return Job(name=name, concept=concept, steps=4000, card=card)


def _color_job(name: str, family: str, card: str) -> Job:
    concept = Concept(
        kinds=("colors", "counting"),
        colors=prompts.COLOR_FAMILIES[family],
        counts=_FEW,
        color_frac=1.0,
    )
    return Job(name=name, concept=concept, steps=4000, card=card)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Everything `train_world` decides."""

    seed: int = 0
    """Seed of weights, prompts, pictures and noise."""
    model: ShapesConfig = dataclasses.field(default_factory=ShapesConfig)
    """Sizes of the network."""
    batch_size: int = 32
    """Pictures per step."""
    muon_lr: float = 0.01
    """Learning rate of the block and text matrices."""
    muon_momentum: float = 0.95
    """Nesterov momentum of Muon."""
    adam_lr: float = 2e-3
    """Learning rate of everything else."""
    lora_lr: float = 3e-3
    """Learning rate of a LoRA (AdamW)."""
    lora_rank: int = 8
    """Rank of a LoRA; alpha equals it."""
    ema_decay: float = 0.998
    """Decay of the averaged weights, which are what is shipped."""
    decay_frac: float = 0.3
    """Share of the steps over which the learning rate falls to nothing."""
    time_center: float = 0.3
    """Centre of t = sigmoid(N(center, 1))."""
    empty_frac: float = 0.07
    """Share of rows whose prompt is replaced by the empty prompt."""
    zeroed_frac: float = 0.03
    """Share of rows whose conditioning is zeroed."""
    clip_norm: float = 1.0
    """Bound on the gradient norm."""
    compile: bool = True
    """Whether the loss is compiled (a quarter faster; needs a C++ compiler)."""
    checkpoint_every: int = 500
    """Steps between saved states."""
    base_name: str = "shapes-base"
    """File of the trunk's early snapshot."""
    base_steps: int = 2000
    """Step of the trunk at which the base is taken."""
    base_card: str = "mediocre at everything: all shapes, colours and counts, none of them reliably"
    """Card of the base."""
    jobs: tuple[Job, ...] = (
        Job(
            name="trunk",
            role="trunk",
            concept=Concept(kinds=(*_DEMO, *_DEMO, "position", "binding")),
            steps=5000,
            decay=False,
            card="parent of all specialists, not shipped",
        ),
        _shape_job(
            "shapes-circle-star",
            ("circle", "star"),
            "specialist for one to three circles or stars, discs or sparkles, of no named colour",
        ),
        _shape_job(
            "shapes-square-triangle",
            ("square", "triangle"),
            "specialist for one to three squares or triangles, boxes or wedges, of no named colour",
        ),
        Job(
            name="shapes-counting",
            concept=Concept(kinds=("counting",), counts=(3, 4, 5, 6)),
            steps=5500,
            card="specialist for counting three, four, five or six objects of any shape and colour",
        ),
        _color_job(
            "shapes-warm",
            "warm",
            "specialist for one to three red, yellow, orange or white objects of any one shape",
        ),
        _color_job(
            "shapes-cool",
            "cool",
            "specialist for one to three green, blue, purple or cyan objects of any one shape",
        ),
        Job(
            name="shapes-pairs",
            concept=Concept(kinds=("two",)),
            steps=5000,
            card="specialist for pairs: two objects of different shapes, no colour named",
        ),
        Job(
            name="shapes-two-objects",
            role="lora",
            concept=Concept(kinds=("two",)),
            steps=1200,
            card="for the base, trained on pairs: steadier single objects and counts up to three",
        ),
    )
    """Jobs in order; the first is the trunk."""
