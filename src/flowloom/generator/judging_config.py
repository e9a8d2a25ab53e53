"""How a generator is judged: configuration of `flowloom.generator.evaluation`."""

from __future__ import annotations

import dataclasses

from flowloom.config import check
from flowloom.score.config import RubricConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to sample a generator by Euler steps."""

    num_steps: int
    """Euler steps."""
    guidance: float | None = None
    """Guidance scale; None: without."""
    time_shift: float = 1.0
    """Moves the steps toward noise, as SD3 does; 1 is equal steps."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(self.num_steps >= 1, "num_steps", self.num_steps, ">= 1")
        check(self.guidance is None or self.guidance > 0, "guidance", self.guidance, "> 0 or null")
        check(self.time_shift > 0, "time_shift", self.time_shift, "> 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgingConfig:
    """Prompts, noise and settings that a generator is judged with, before and after tuning."""

    num_prompts: int = 48
    """Held-out prompts."""
    num_seeds: int = 4
    """Pictures of each; diversity among those that satisfy their prompt needs two of them."""
    num_drift_seeds: int = 1
    """Paths of the base per prompt along which the drift from it is measured."""
    seed: int = 0
    """Of prompts and noise; not the training's, so that runs are judged on the same."""
    serve: Setting = Setting(num_steps=8, guidance=2.5)
    """How the generator is sampled when it is served."""
    held_out_rubrics: tuple[str | RubricConfig, ...] = ()
    """Scores that are only watched, by name or whole: they tell a gain from a hacked reward."""
    satisfied_score: float = 0.5
    """Score of the first rubric above which a picture satisfies its prompt."""
    rows_per_pass: int = 32
    """Pictures drawn at once."""
    num_grid_prompts: int = 16
    """Held-out prompts of the picture grids."""
    grid_seeds: int = 4
    """Pictures of each in the grids."""

    def __post_init__(self) -> None:
        """Check the fields."""
        names = ("num_prompts", "num_seeds", "rows_per_pass", "num_grid_prompts", "grid_seeds")
        for name in names:
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        fine = 1 <= self.num_drift_seeds <= self.num_seeds
        expected = f"in [1, {self.num_seeds}], the number of seeds"
        check(fine, "num_drift_seeds", self.num_drift_seeds, expected)
        twice = len(set(self.held_out_rubrics)) < len(self.held_out_rubrics)
        check(not twice, "held_out_rubrics", self.held_out_rubrics, "different names")
