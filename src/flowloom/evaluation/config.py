"""Configurations of the stages `evaluate` and `report`."""

from __future__ import annotations

import dataclasses

from flowloom.config import check

CANDIDATE = "grpo"
"""The policy that is registered and that the gate judges: GRPO with guidance."""
CHAMPION = "champion"
"""The policy the registry serves now; compared where one is given."""
CONDITIONED = "conditioned"
"""SFT on scores; compared where such a designer is given."""
POLICIES = (
    "grpo",
    "best_fixed",
    "sft",
    "grpo_unguided",
    "sft_cold",
    "retrieval",
    "random",
    "grpo_one",
    "sft_one",
)
"""The policies compared unless said otherwise; all names are in `flowloom.evaluation.policies`."""
_SAMPLED = ("grpo_unguided", "grpo", "sft", CONDITIONED)
_STORED = ("retrieval", "best_fixed", "random")


def parse_policy(name: str) -> tuple[str, str, bool]:
    """Who designs, `cold`, `greedy` or nothing, and whether a single design is written.

    Raises:
        ValueError: No policy has this name.
    """
    if name in _STORED:
        return name, "", True
    for who in _SAMPLED:
        rest = name.removeprefix(who)
        if name.startswith(who) and rest in ("", "_one", "_cold", "_cold_one", "_greedy"):
            single = rest.endswith("_one") or rest == "_greedy"
            return who, rest.removesuffix("_one").removeprefix("_"), single
    sampled = ", ".join(_SAMPLED)
    expected = f"one of {', '.join(_STORED)}, or {sampled} with _one, _cold, _cold_one or _greedy"
    raise ValueError(f"policies: got {name!r}, expected {expected}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`evaluate`: policies compared by rendering the same held-out prompts with the same noise."""

    seed: int = 0
    """Seed of designs, render noise and resampling."""
    policies: tuple[str, ...] = POLICIES
    """Policies to compare; grpo and best_fixed must be among them. `conditioned` joins them where
    its designer is given."""
    num_prompts: int = 192
    """Held-out prompts, the same number of each kind as far as there are."""
    num_seeds: int = 2
    """Renders per prompt and policy; each (prompt, seed) has its own noise, shared by policies."""
    num_designs: int = 4
    """Designs per prompt of a policy that writes several; the best by predicted score is rendered,
    as `flowloom design --n` would list it first. Policies named `_one` or `_greedy` write one."""
    guidance: float = 1.5
    """Extrapolation weight of grpo; written into the registered model as its default."""
    cold_temperature: float = 0.5
    """Temperature of sft_cold and other cold policies, the cheap rivals of guidance."""
    num_unrendered: int = 5000
    """Designs checked for validity, decoding and diversity without rendering."""
    num_unique: int = 500
    """Single designs, one per prompt, that every sampling policy's distinct workflows are counted
    among, at most `num_unrendered`; none is rendered."""
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
            parse_policy(name)
        for name in (CANDIDATE, "best_fixed"):
            check(name in self.policies, "policies", self.policies, f"a list that has {name}")
        whole = ("num_prompts", "num_seeds", "num_designs", "num_resamples", "chunk_size")
        for name in (*whole, "num_processes", "num_threads"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("num_unrendered", "num_unique", "num_grid_prompts", "guidance", "seed"):
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

    @property
    def wanted_inputs(self) -> tuple[str, ...]:
        """Optional inputs of the stage that a command which makes what is missing makes."""
        return ("evaluation", "generator")
