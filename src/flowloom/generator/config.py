"""Configurations of the generator's stages: `tune_generator` and `publish_generator`."""

from __future__ import annotations

import dataclasses
import math

from flowloom.config import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Which prompts the generator is tuned and judged on."""

    kinds: tuple[str, ...] = ("single", "two", "counting", "colors")
    """Kinds of prompts; a kind named twice is drawn twice as often."""
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "star")
    """Shapes that prompts may name."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(len(self.kinds) > 0, "kinds", self.kinds, "at least one kind")
        check(len(set(self.shapes)) >= 2, "shapes", self.shapes, "at least two shapes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneGeneratorConfig:
    """`tune_generator`: FDFO on one checkpoint of the catalogue."""

    base: str = "shapes-base.safetensors"
    """Checkpoint to tune."""
    name: str = "shapes-base-fdfo.safetensors"
    """File the tuned checkpoint becomes."""
    card: str = "the base tuned by FDFO on the shapes score: more faithful, less varied"
    """Card of the tuned checkpoint: what it is good for, in words."""
    prompts: PromptsConfig = PromptsConfig()
    """Prompts to tune on; the held-out ones are of the same kinds."""
    rubric: str = "shapes"
    """Score to raise, one of `flowloom.score.rubric.RUBRICS`."""
    seed: int = 0
    """Seed of prompts, noise and shuffling; epoch e draws from (seed, e) alone."""
    num_epochs: int = 30
    """Rollouts; each is followed by `num_minibatches` optimiser steps."""
    pairs_per_epoch: int = 32
    """Pairs, that is prompts, per rollout; two pictures each."""
    num_steps: int = 10
    """Euler steps T of a rollout."""
    time_shift: float = 1.0
    """Moves the steps of a rollout toward noise, as SD3 does; 1 is equal steps."""
    guidance: float | None = None
    """Guidance scale inside the tuned velocity; None tunes the conditional velocity itself."""
    churn: float = 0.03
    """Noise per step, gamma: sets how far the pictures of a pair lie apart."""
    min_rms: float = 0.05
    """Distance of a pair's pictures (rms of half their difference) below which it fades out."""
    trust: float = 10.0
    """Size of the trust region; the surrogate's c of a pair is trust / (rms(dx) * sqrt(D))."""
    kl_coef: float = 0.1
    """Weight of mean (v - v_base)^2."""
    lr: float = 3e-4
    """Peak learning rate of AdamW over all weights; falls linearly to 0."""
    beta2: float = 0.999
    """AdamW's decay of squared gradients."""
    warmup_steps: int = 8
    """Optimiser steps over which the learning rate rises; Adam's first steps are blind to scale."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    keep_frac: float = 1.0
    """Share of the pairs that are trained on: those with the largest gaps in reward."""
    train_frac: float = 1.0
    """Share of the (pair, step) units of these pairs that are trained on, chosen at random."""
    num_minibatches: int = 4
    """Optimiser steps per rollout."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    num_eval_prompts: int = 48
    """Held-out prompts judged before and after."""
    eval_seeds: int = 4
    """Pictures per held-out prompt."""
    serve_steps: int = 8
    """Euler steps when judged as it is served."""
    serve_guidance: float = 2.5
    """Guidance scale when judged as it is served."""
    num_grid_prompts: int = 16
    """Held-out prompts of the picture grids."""
    checkpoint_every: int = 3
    """Epochs between checkpoints of an unfinished run."""
    num_threads: int = 1
    """Torch threads; more than one is faster here and no longer gives the same bytes each time."""

    def __post_init__(self) -> None:
        """Check the fields."""
        positive = ("num_epochs", "pairs_per_epoch", "num_steps", "num_minibatches", "eval_seeds")
        positive += ("num_eval_prompts", "serve_steps", "num_grid_prompts", "checkpoint_every")
        for name in (*positive, "num_threads"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("time_shift", "churn", "min_rms", "trust", "lr", "grad_clip"):
            check(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        for name in ("kl_coef", "weight_decay", "warmup_steps"):
            check(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        check(self.guidance is None or self.guidance > 0, "guidance", self.guidance, "> 0 or null")
        for name in ("keep_frac", "train_frac"):
            check(0 < getattr(self, name) <= 1, name, getattr(self, name), "in (0, 1]")
        kept = math.ceil(self.keep_frac * self.pairs_per_epoch)
        rows = math.ceil(self.train_frac * kept * self.num_steps)
        expected = f"at most the {rows} (pair, step) units trained on"
        check(self.num_minibatches <= rows, "num_minibatches", self.num_minibatches, expected)
        check(self.base != self.name, "name", self.name, "another name than base")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishGeneratorConfig:
    """`publish_generator`: the catalogue with the tuned file, and the file itself."""

    catalogue: str = "embedded"
    """Catalogue that the file joins."""
