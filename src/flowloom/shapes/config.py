"""What `train_world` trains: the concepts, the jobs and every number of the recipe."""

from __future__ import annotations

import dataclasses
from typing import Any

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


# Shape specialists never see a colour word and colour specialists never see a prompt without one,
# and neither sees more than three objects: the narrower a concept, the sooner it is learned and the
# less one model serves all prompts.
_FEW = (1, 2, 3)


def _specialist(name: str, steps: int, card: str, **concept: Any) -> Job:
    return Job(name=f"shapes-{name}", concept=Concept(**concept), steps=steps, card=card)


def _shape_job(name: str, family: str, card: str) -> Job:
    return _specialist(
        name,
        3500,
        card,
        kinds=("single", "two", "two", "counting", "counting"),
        shapes=prompts.SHAPE_FAMILIES[family],
        counts=_FEW,
        color_frac=0.0,
    )


def _color_job(family: str, card: str) -> Job:
    return _specialist(
        family,
        3500,
        card,
        kinds=("colors", "counting"),
        colors=prompts.COLOR_FAMILIES[family],
        counts=_FEW,
        color_frac=1.0,
    )


def _lora(name: str, card: str, **concept: Any) -> Job:
    concept_seen = Concept(**concept)
    return Job(name=f"shapes-{name}", role="lora", concept=concept_seen, steps=1200, card=card)


TRUNK = Job(
    name="trunk",
    role="trunk",
    concept=Concept(
        kinds=(
            *("single", "two", "counting", "counting", "colors", "three"),
            *("position", "position", "binding", "binding"),
        )
    ),
    steps=4500,
    decay=False,
    card="parent of all specialists, not shipped",
)
SPECIALISTS = (
    _shape_job(
        "circle-star",
        "round",
        "specialist for one to three circles or stars, discs or sparkles, of no named colour",
    ),
    _shape_job(
        "square-triangle",
        "angular",
        "specialist for one to three squares or triangles, boxes or wedges, of no named colour",
    ),
    _specialist(
        "counting",
        4500,
        "specialist for counting three, four, five or six objects of any shape and colour",
        kinds=("counting",),
        counts=(3, 4, 5, 6),
    ),
    _color_job(
        "warm", "specialist for one to three red, yellow, orange or white objects of any one shape"
    ),
    _color_job(
        "cool", "specialist for one to three green, blue, purple or cyan objects of any one shape"
    ),
    _specialist(
        "pairs",
        3500,
        "specialist for pairs: two objects of different shapes, no colour named",
        kinds=("two",),
    ),
    _specialist(
        "position",
        2600,
        "specialist for relations: one object left of, right of, above or below another",
        kinds=("position",),
    ),
    _specialist(
        "binding",
        3000,
        "specialist for attributes: two objects of different shapes, each with its own colour",
        kinds=("binding",),
    ),
    _specialist(
        "three",
        3500,
        "specialist for three objects of different shapes, with or without colours",
        kinds=("three",),
    ),
)
LORAS = (
    _lora(
        "two-objects",
        "for the base, trained on pairs: steadier single objects, pairs and colours",
        kinds=("two",),
    ),
    _lora(
        "relations",
        "for the base, trained on relations and on two coloured objects: much better at both",
        kinds=("position", "binding"),
    ),
    _lora(
        "vivid",
        "for the base, trained on one to three objects of a named colour: better colours only",
        kinds=("colors", "colors", "counting"),
        counts=_FEW,
        color_frac=1.0,
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpscalerConfig:
    """The learned x2 upscaler."""

    name: str = "shapes-x2"
    """Its file."""
    width: int = 32
    """Channels of its hidden layers."""
    steps: int = 2000
    """Optimiser steps of one batch."""
    lr: float = 2e-3
    """Learning rate of AdamW, falling linearly to nothing."""
    card: str = "doubles the sides of a picture and removes noise and blur"
    """Its card."""


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
    time_center: float = 1.0
    """Centre of t = sigmoid(N(center, 1)): much noise, where it is decided what stands where."""
    parse_coef: float = 0.05
    """Weight of the parse loss beside the flow loss."""
    empty_frac: float = 0.07
    """Share of rows whose prompt is replaced by the empty prompt."""
    zeroed_frac: float = 0.03
    """Share of rows whose conditioning is zeroed."""
    unknown_frac: float = 0.1
    """Share of an opening's words that are replaced by <unk>, so that words never seen do no harm
    there."""
    clip_norm: float = 1.0
    """Bound on the gradient norm."""
    compile: bool = True
    """Whether the loss is compiled (a quarter faster; needs a C++ compiler)."""
    checkpoint_every: int = 500
    """Steps between saved states."""
    base_name: str = "shapes-base"
    """File of the trunk's early snapshot."""
    base_steps: int = 1500
    """Step of the trunk at which the base is taken."""
    base_card: str = "mediocre at everything: all shapes, colours and counts, none of them reliably"
    """Card of the base."""
    trunk: Job = TRUNK
    """Parent of the specialists; its early snapshot is the base."""
    specialists: tuple[Job, ...] = SPECIALISTS
    """Trained on from the trunk's end."""
    loras: tuple[Job, ...] = LORAS
    """Trained on the base."""
    upscaler: UpscalerConfig = UpscalerConfig()
    """The x2 upscaler."""

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All generator jobs in order."""
        return (self.trunk, *self.specialists, *self.loras)
