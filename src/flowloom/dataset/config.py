"""Configurations of the dataset stages: `build_pairs` and `build_triplets`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from flowloom.config import check
from flowloom.runs import input_digest
from flowloom.shapes.prompts import KINDS


def digest_of(name: str, path: str | None) -> str | None:
    """Digest of an input that a configuration names; None where it names none.

    Raises:
        ValueError: Nothing is there; names the field.
    """
    if path is None:
        return None
    check(Path(path).exists(), name, path, "an existing file or folder")
    return input_digest(Path(path))


def check_part(part: str) -> tuple[int, int]:
    """The numbers of `k/N`.

    Raises:
        ValueError: It is none.
    """
    k, separator, num = part.partition("/")
    fits = bool(separator) and k.isdecimal() and num.isdecimal() and int(k) < int(num)
    check(fits, "part", part, "k/N with 0 <= k < N, such as 0/4")
    return int(k), int(num)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Prompt lists; splits are made by meaning, so no wording of a test prompt is trained on."""

    kinds: tuple[str, ...] = KINDS
    """Kinds of prompts, each as often as the others."""
    num_train: int = 560
    """Prompts of the train split."""
    num_calibration: int = 84
    """Prompts of the calibration split."""
    num_test: int = 350
    """Held-out prompts in `prompts.json`, for evaluation."""
    num_unrendered: int = 2000
    """Train prompts in `unrendered_prompts.json`, for policy optimisation: a policy that sees the
    same few prompts again and again keys on their wording."""
    seed: int = 0
    """Seed of the lists."""
    prompts_file: str | None = None
    """A person's prompts (.txt, .csv or .jsonl) in place of drawn ones; the numbers are then the
    most that are taken, and kinds and seed say nothing. Off is None."""
    prompts_digest: str | None = dataclasses.field(init=False, default=None)
    """MD5 of that file, found when the configuration is made: a run is known by the content."""

    def __post_init__(self) -> None:
        """Check the fields, and digest the file."""
        object.__setattr__(self, "prompts_digest", digest_of("prompts_file", self.prompts_file))
        check(bool(self.kinds), "kinds", self.kinds, "at least one kind")
        for name in ("num_train", "num_calibration", "num_test", "num_unrendered"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """What random workflows look like: the shipped token weights, with some replaced."""

    budget: int = 64
    """Most tokens of a workflow."""
    steps: tuple[int, ...] = (4, 6, 8, 12, 16, 20)
    """Numbers of steps that get a weight of their own; none leaves the shipped ones."""
    steps_weights: tuple[float, ...] = (3.0, 3.0, 3.0, 1.0, 0.3, 0.1)
    """Their weights; few steps, since rendering costs in proportion."""
    heun_weight: float | None = 0.25
    """Weight of the sampler heun against 1 for euler: it costs twice as much per step. None leaves
    the shipped one."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(self.budget >= 16, "budget", self.budget, ">= 16")
        same = len(self.steps) == len(self.steps_weights)
        check(same, "steps_weights", self.steps_weights, f"{len(self.steps)} weights, as in steps")
        positive = min(self.steps_weights, default=1.0) > 0
        check(positive, "steps_weights", self.steps_weights, "weights > 0")
        heun = self.heun_weight
        check(heun is None or heun > 0, "heun_weight", heun, "> 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildPairsConfig:
    """`build_pairs`: prompts with valid workflows, the prior that SFT learns first."""

    prompts: PromptsConfig = PromptsConfig()
    """Prompt lists; the train split and held-out prompts are used."""
    prior: PriorConfig = PriorConfig()
    """What random workflows look like."""
    num_pairs: int = 4400
    """Pairs of all splits together; no prompt twice with workflows that are nearly the same."""
    mutated_frac: float = 0.3
    """Share that are small edits of sane workflows; the others are drawn from the grammar."""
    held_out_frac: float = 0.05
    """Share with a held-out prompt."""
    workflows_file: str | None = None
    """A person's workflows: a file (.json, .jsonl, .png) or a folder, in the API or the editor's
    format. Half of the edits start from them, and `given_frac` are they as they are. Off is
    None."""
    workflows_digest: str | None = dataclasses.field(init=False, default=None)
    """Digest of these, found when the configuration is made: a run is known by the content."""
    given_frac: float = 0.1
    """Share that are workflows of `workflows_file` as they are; nothing without it."""
    like_given: bool = False
    """Whether what is drawn from the grammar follows `workflows_file`, as `flowloom sample --like`
    does, in place of `prior`; nothing without it."""
    skip_invalid: bool = False
    """Whether workflows of `workflows_file` that cannot be used are named and left out; else they
    are an error."""
    shard_size: int = 10_000
    """Pairs per shard, the unit of work and of resuming."""
    num_processes: int = 2
    """Worker processes, of no use for a single shard; changes no result."""
    part: str | None = None
    """`k/N`, k from 0: draw only every N-th shard from number k on, for a run with the input
    `parts`. All is None."""
    seed: int = 0
    """Seed of workflows and their prompts."""

    def __post_init__(self) -> None:
        """Check the fields, and digest the workflows."""
        digest = digest_of("workflows_file", self.workflows_file)
        object.__setattr__(self, "workflows_digest", digest)
        for name in ("num_pairs", "shard_size", "num_processes"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("mutated_frac", "held_out_frac", "given_frac"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        if self.workflows_file is not None:
            total = self.mutated_frac + self.given_frac
            check(total <= 1, "mutated_frac + given_frac", total, "at most 1")
        if self.part is not None:
            check_part(self.part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PanelConfig:
    """Sane base workflows rendered on common prompts and noises; best_fixed is chosen among them.

    Successive halving: every round has fresh prompts, and the better workflows go on. After the
    first round small variations of the best join.
    """

    settings: tuple[str, ...] = ("4/2.0", "8/1.5", "8/3.0")
    """Steps / guidance tried with every checkpoint."""
    lora_settings: tuple[str, ...] = ("8/2.5",)
    """Steps / guidance tried with every checkpoint and LoRA at strength 1."""
    num_prompts: tuple[int, ...] = (36, 40, 128)
    """Train prompts of each round, one seed each, none of them used in an earlier round."""
    num_kept: tuple[int, ...] = (6, 6)
    """Workflows that go on after each round but the last."""
    num_varied: int = 2
    """Of these, how many are varied (steps, guidance, scheduler, ...) after the first round."""

    def __post_init__(self) -> None:
        """Check the fields."""
        rounds = len(self.num_prompts)
        check(rounds >= 1, "num_prompts", self.num_prompts, "at least one round")
        fits = len(self.num_kept) == rounds - 1
        check(fits, "num_kept", self.num_kept, f"{rounds - 1} numbers, one less than num_prompts")
        for number in (*self.num_prompts, *self.num_kept):
            check(number >= 1, "num_prompts, num_kept", number, ">= 1")
        check(bool(self.settings), "settings", self.settings, "at least one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildTripletsConfig:
    """`build_triplets`: prompts x workflows x seeds, rendered and scored.

    One render says little: its noise (sd about .3) hides most of the difference between workflows
    (.1 to .25). For learning a reward, many cells with one seed each teach more than few cells with
    many, since the network averages over similar cells; choosing among cells of one prompt wants
    several seeds. So random cells have one seed, later rounds of evolved cells more (the last one
    at least 4), and calibration cells 4. What is claimed is measured by `evaluate` with more.
    """

    mode: Literal["rounds", "plain"] = "rounds"
    """`rounds`: each round is planned from the scores of those before. `plain`: one round of pairs
    times seeds, the panel's first round, wild and calibration cells, so that nothing waits for a
    score; nothing is evolved."""
    prompts: PromptsConfig = PromptsConfig()
    """Prompt lists; the train split must be the one of the pairs."""
    panel: PanelConfig = PanelConfig()
    """The workflows that best_fixed is chosen from."""
    random_cells: int = 5
    """Pairs rendered per train prompt (as far as there are)."""
    random_seeds: int = 1
    """Seeds of each of these."""
    wild_cells: int = 2
    """Valid but often senseless workflows per train prompt, one seed each: the reward must know
    that they are bad, or the policy finds out that it does not."""
    prior: PriorConfig = PriorConfig()
    """Step counts and samplers of the wild workflows."""
    evolved_cells: tuple[int, ...] = (3, 2, 1)
    """Evolved workflows per train prompt, by round: edits of what looked best on prompts of the
    same concept so far, or (`kept_frac`) that itself."""
    evolved_seeds: tuple[int, ...] = (1, 2, 4)
    """Seeds of each evolved cell, by round."""
    num_parents: int = 12
    """Workflows per concept that edits start from."""
    kept_frac: float = 0.3
    """Share of evolved cells that take a parent as it is; all of the last round's."""
    calibration_cells: int = 4
    """Workflows per calibration prompt: half from any pairs, half evolved."""
    calibration_seeds: int = 4
    """Seeds of each of these."""
    held_out_seeds: int = 2
    """Seeds of each cell with a held-out workflow, which joins the train cells, pairs and edits
    among which it turned up: it is rendered, and never trained on."""
    num_designed: int = 2000
    """With the inputs `earlier` and `proposals`, which take the place of all other cells: most
    designs on train prompts that are rendered."""
    designed_by: Literal["spread", "random"] = "spread"
    """Which of the proposals: those on which the reward's members disagree most, or any."""
    designed_seeds: int = 1
    """Seeds of each of these."""
    budget: int = 64
    """Most tokens of an edited workflow."""
    rubric: str = "shapes"
    """How pictures are scored."""
    num_processes: int = 2
    """Render workers; changes no result."""
    shard_size: int = 128
    """Renders per shard, the unit of work and of resuming. It fixes the batches, and so the last
    bits of the scores."""
    rows_per_file: int = 100_000
    """Most rows of a Parquet file."""
    part: str | None = None
    """`k/N`, k from 0: render only every N-th shard from number k on, for a run with the input
    `parts`. All is None."""
    seed: int = 0
    """Seed of workflows and noise."""

    def __post_init__(self) -> None:
        """Check the fields."""
        same = len(self.evolved_cells) == len(self.evolved_seeds)
        check(same, "evolved_seeds", self.evolved_seeds, f"{len(self.evolved_cells)} numbers")
        for number in (*self.evolved_cells, *self.evolved_seeds):
            check(number >= 1, "evolved_cells, evolved_seeds", number, ">= 1")
        for name in (
            *("random_cells", "random_seeds", "num_parents", "calibration_cells"),
            *("calibration_seeds", "held_out_seeds", "num_processes", "shard_size"),
            *("rows_per_file", "num_designed", "designed_seeds"),
        ):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        check(self.wild_cells >= 0, "wild_cells", self.wild_cells, ">= 0")
        check(0 <= self.kept_frac <= 1, "kept_frac", self.kept_frac, "in [0, 1]")
        if self.part is not None:
            check_part(self.part)
        needed, there = sum(self.panel_prompts), self.prompts.num_train
        check(needed <= there, "panel.num_prompts", needed, f"a sum of at most {there} (num_train)")

    @property
    def panel_prompts(self) -> tuple[int, ...]:
        """Prompts that the panel is rendered on, by round."""
        return self.panel.num_prompts[:1] if self.mode == "plain" else self.panel.num_prompts
