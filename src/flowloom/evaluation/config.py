"""Configurations of the stages `evaluate` and `report`."""

from __future__ import annotations

import dataclasses

from flowloom.config import check

CANDIDATE = "grpo"
"""The policy that is registered and that the gate judges: GRPO with guidance."""
CHAMPION = "champion"
"""The policy the registry serves now; compared where one is given."""
POLICIES = ("grpo", "best_fixed", "sft", "grpo_unguided", "sft_cold", "retrieval", "random")
"""The policies a comparison may hold; see `flowloom.evaluation.evaluate`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`evaluate`: policies compared by rendering the same held-out prompts with the same noise."""

    seed: int = 0
    """Seed of designs, render noise and resampling."""
    policies: tuple[str, ...] = POLICIES
    """Policies to compare; grpo and best_fixed must be among them."""
    num_prompts: int = 192
    """Held-out prompts, the same number of each kind as far as there are."""
    num_seeds: int = 2
    """Renders per prompt and policy; each (prompt, seed) has its own noise, shared by policies."""
    num_designs: int = 4
    """Designs a policy writes per prompt; the best by predicted score is rendered, as `flowloom
    design --n` would list it first."""
    guidance: float = 1.5
    """Extrapolation weight of grpo; written into the registered model as its default."""
    cold_temperature: float = 0.5
    """Temperature of sft_cold, the cheap rival of guidance."""
    num_unrendered: int = 5000
    """Designs checked for validity, decoding and diversity without rendering."""
    rubric: str = "shapes"
    """How pictures are scored."""
    num_resamples: int = 10_000
    """Bootstrap resamples."""
    level: float = 0.95
    """Confidence of the intervals."""
    num_grid_prompts: int = 8
    """Prompts shown in the grid, spread over the kinds."""
    chunk_size: int = 128
    """Renders per chunk: the unit of resuming; fixes the batches."""
    num_processes: int = 2
    """Processes that render; results do not depend on it."""
    num_threads: int = 1
    """Torch threads of this process."""

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in self.policies:
            check(name in POLICIES, "policies", name, f"one of {', '.join(POLICIES)}")
        for name in (CANDIDATE, "best_fixed"):
            check(name in self.policies, "policies", self.policies, f"a list that has {name}")
        whole = ("num_prompts", "num_seeds", "num_designs", "num_resamples", "chunk_size")
        for name in (*whole, "num_processes", "num_threads"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("num_unrendered", "num_grid_prompts", "guidance", "seed"):
            check(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        check(self.cold_temperature > 0, "cold_temperature", self.cold_temperature, "> 0")
        check(0 < self.level < 1, "level", self.level, "between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """`report`: one HTML file without external resources."""

    title: str = "flowloom"
    """Heading of the page."""
    num_examples: int = 8
    """Prompts shown with their workflows and pictures."""
    num_render_seeds: int = 2
    """Pictures per prompt and policy."""

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("num_examples", "num_render_seeds"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
