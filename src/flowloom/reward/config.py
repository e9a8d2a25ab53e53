"""Configurations of the reward's stages: `train_reward` and `calibrate_reward`."""

from __future__ import annotations

import dataclasses

from flowloom.config import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Size of a member: a bidirectional encoder over prompt words and workflow nodes."""

    width: int = 64
    """Width of every vector."""
    num_layers: int = 1
    """Blocks over nodes; the prompt has one of its own."""
    num_heads: int = 4
    """Attention heads; divides `width`."""
    mlp_ratio: int = 2
    """Hidden width of an MLP per width."""
    num_prompt_tokens: int = 16
    """Prompt positions; a longer prompt is cut."""

    def __post_init__(self) -> None:
        """Check the fields."""
        for field in dataclasses.fields(self):
            check(getattr(self, field.name) >= 1, field.name, getattr(self, field.name), ">= 1")
        divides = self.width % self.num_heads == 0
        check(divides, "width", self.width, f"a multiple of num_heads = {self.num_heads}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """The two gates: ridge penalties by sort of fact, in renders; None leaves a sort out."""

    word: float | None = 0.1
    """A word of the prompt."""
    file_word: float | None = 0.1
    """A base model with a word of the prompt, or with any."""
    extra_word: float | None = 5.0
    """Another file with these: a LoRA, say, which changes what a base can draw but little."""
    row: float | None = 3.0
    """What a node is or has: class, value, link."""
    file_row: float | None = 20.0
    """A file with what a node is or has: many, and each seen seldom."""

    def __post_init__(self) -> None:
        """Check the fields."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check(value is None or value > 0, field.name, value, "> 0 or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """`train_reward`: one member of the ensemble, by regression on single renders."""

    member: int = 0
    """Which member: members differ in initial weights, order of data and, with `bootstrap`, in the
    prompts that their gates are fitted on."""
    seed: int = 0
    """Seed of the ensemble; a member draws from (seed, member, epoch)."""
    gates: GatesConfig = GatesConfig()
    """The part that is solved in one go."""
    bootstrap: bool = False
    """Fit the gates on prompts drawn with replacement: members differ more, and each is a
    little worse."""
    deep_share: float = 0.5
    """Share of the network in the logit of the gate `works`; 1 leaves that gate's facts out, 0 the
    network."""
    network: NetworkConfig = NetworkConfig()
    """Size."""
    num_steps: int = 400
    """Optimiser steps of the network."""
    prompts_per_step: int = 16
    """Groups of rows of one prompt per step; each prompt is encoded once."""
    rows_per_prompt: int = 8
    """Most rows of a group."""
    lr: float = 3e-3
    """Peak learning rate of AdamW; falls linearly to 0."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    dropout: float = 0.1
    """Share of features dropped before the head and inside MLPs while training."""
    regression_coef: float = 1.0
    """Weight of the regression in the network's loss."""
    pair_coef: float = 0.0
    """Weight of a pairwise loss within prompts beside it; 0 leaves it out."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    checkpoint_every: int = 100
    """Steps between checkpoints of an unfinished run."""
    num_threads: int = 1
    """Torch threads; part of the configuration since it may change the last bits."""

    def __post_init__(self) -> None:
        """Check the fields."""
        positive = ("num_steps", "prompts_per_step", "rows_per_prompt", "checkpoint_every")
        for name in (*positive, "num_threads"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("lr", "grad_clip"):
            check(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        for name in ("member", "warmup_steps", "weight_decay", "regression_coef", "pair_coef"):
            check(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        check(0 <= self.deep_share <= 1, "deep_share", self.deep_share, "in [0, 1]")
        check(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """`calibrate_reward`: members to one ensemble with units, pessimism and honest intervals."""

    beta: float = 0.5
    """Pessimism: the reward is mean - beta * std over the members, in standardised units."""
    coverage: float = 0.9
    """Share of single renders that an interval shall contain."""
    familiar_frac: float = 0.95
    """Share of calibration cells on which the members agree well enough to be called familiar."""
    num_bins: int = 4
    """Ranges of the prediction that get intervals of their own."""
    num_threads: int = 1
    """Torch threads; part of the configuration since it may change the last bits."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(self.beta >= 0, "beta", self.beta, ">= 0")
        for name in ("coverage", "familiar_frac"):
            check(0 < getattr(self, name) < 1, name, getattr(self, name), "in (0, 1)")
        check(self.num_bins >= 1, "num_bins", self.num_bins, ">= 1")
        check(self.num_threads >= 1, "num_threads", self.num_threads, ">= 1")
