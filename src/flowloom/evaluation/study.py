"""One trained designer under study: what every policy and every setting designs, kept in files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowloom.dataset.triplets import load, load_prompts, load_unrendered_prompts
from flowloom.designer.baselines import stored_policies
from flowloom.designer.design import Designer
from flowloom.evaluation import sweeps
from flowloom.evaluation.config import EvaluateConfig
from flowloom.evaluation.diversity import Known
from flowloom.evaluation.frame import Choice, make_frame
from flowloom.evaluation.policies import (
    Conditioned,
    Draw,
    choices_of,
    choose,
    draw_of,
    grammar_of,
    sample,
)
from flowloom.evaluation.scores import ScoreBook
from flowloom.evaluation.unrendered import check_designs
from flowloom.runs import Run, input_digest, write_json
from flowloom.workflow import Workflow

SAMPLED = ("sft", "grpo_unguided", "grpo")
POLICIES = (
    "random", "best_fixed", "retrieval",
    *(f"{who}{more}" for who in SAMPLED for more in ("_one", "", "_cold_one", "_cold", "_greedy")),
)  # fmt: skip
CONDITIONED = ("conditioned_one", "conditioned")
GUIDANCES = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0, 3.0)
TEMPERATURES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2)
IN_WEIGHTS = (1.5, 2.0, 3.0)
CHECKED = (0.0, 1.0, 1.5, 3.0)
"""Guidance of the designs that are checked for validity."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    prompts: int = 350
    """Held-out prompts of the policies and sweeps, as many as there are at most."""
    seeds: int = 4
    """Renders per prompt and policy."""
    oracle_prompts: int = 100
    """Held-out prompts of the oracle."""
    oracle_seeds: int = 64
    """Renders per prompt for the oracle, half to choose and half to score."""
    unique: int = 500
    """Prompts that distinct workflows are counted on, one design each."""
    designs: int = 10_000
    """Designs checked for validity at each weight."""
    rendered: int = 1000
    """Of these rendered, of all weights together."""


class Study:
    """A set of artifacts, its designs and the scores of all."""

    def __init__(self, parts: dict[str, Path], sizes: Sizes, out: Path):
        """Load the designer; what an earlier process left in `out` is found there.

        Args:
            parts: Folders by name: `catalogue`, `triplets`, `designer`, `adapter`, `reward`, and
                `conditioned` where there is one.
            sizes: How much is measured.
            out: Keeps designs, and scores of all studies.
        """
        self.parts, self.sizes = parts, sizes
        held_out = load_prompts(parts["triplets"])
        number = min(sizes.prompts, len(held_out))
        self.config = EvaluateConfig(num_prompts=number, num_seeds=sizes.seeds)
        self.frame = make_frame(self.config, held_out)
        number = min(sizes.oracle_prompts, number)
        # Noise of its own: the oracle has not seen that of the other tables.
        halves = EvaluateConfig(num_prompts=number, num_seeds=sizes.oracle_seeds, seed=1)
        self.halves = make_frame(halves, held_out)
        more = [*held_out, *load_unrendered_prompts(parts["triplets"])]
        self.prompts = list(dict.fromkeys(row["prompt"] for row in more))[: sizes.unique]
        self.prompts = [*self.frame.prompts, *self.prompts[len(self.frame.prompts) :]]

        stored = stored_policies(parts["triplets"])
        self.designer = Designer.from_parts(
            parts["catalogue"], parts["designer"], parts["adapter"], parts["reward"], stored
        )
        self.conditioned = None
        self.policies = POLICIES
        if "conditioned" in parts:
            self.conditioned = Conditioned.load(parts["conditioned"])
            self.policies = POLICIES + CONDITIONED
        texts = dict.fromkeys(load(parts["triplets"], "train")["workflow"])
        self.known = Known(Workflow.from_api(json.loads(text)) for text in texts)
        key = "-".join(input_digest(path)[:6] for path in parts.values())
        self.run = Run("guidance", out / f"set-{key}")
        self.run.work.mkdir(exist_ok=True)
        scores = Run("guidance", out / "scores")
        scores.work.mkdir(exist_ok=True)
        self.book = ScoreBook(scores, parts["catalogue"])

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once and kept in a file."""
        sizes = "-".join(str(value) for value in dataclasses.astuple(self.sizes))
        path = self.run.work / f"{name}-{sizes}.json"
        if not path.is_file():
            write_json(path, make())
        return json.loads(path.read_text())

    def singles(self, name: str, draw: Callable[[], list[list[int]]]) -> list[Choice]:
        """One design for each of `prompts`."""

        def make() -> list[list[Any]]:
            return [c.to_row() for c in choices_of(self.designer, self.prompts, draw())]

        return [Choice.from_row(row) for row in self.kept(name, make)]

    def designs(self) -> dict[str, list[Choice]]:
        """Of every policy; those that write one have it for all `prompts`, else for the frame."""
        found = {}
        for name in self.policies:
            draw = draw_of(name, self.config)
            if draw.num == 1 and draw.who in ("grpo", "sft", "conditioned"):
                found[name] = self.singles(name, lambda draw=draw: self._sample(draw))
            else:
                rows = self.kept(name, lambda draw=draw: [c.to_row() for c in self._choose(draw)])
                found[name] = [Choice.from_row(row) for row in rows]
        return found

    def points(self) -> dict[sweeps.Point, list[Choice]]:
        """Of every point of the sweeps."""
        seed = self.config.seed
        return {
            point: self.singles(
                point.name.replace(" ", "-"),
                lambda point=point: sweeps.sample_point(self.designer, point, self.prompts, seed),
            )
            for point in sweeps.points_of(GUIDANCES, TEMPERATURES, IN_WEIGHTS)
        }

    def checked(self) -> dict[str, dict[str, Any]]:
        """Many designs at each weight: how many are valid, and tokens of some, to render."""
        grammar = grammar_of(self.designer)
        share = self.sizes.rendered // len(CHECKED)

        def make() -> dict[str, dict[str, Any]]:
            found = {}
            for weight in CHECKED:
                prompts = [self.prompts[k % len(self.prompts)] for k in range(self.sizes.designs)]
                rows = sample(self.designer, Draw("grpo", guidance=weight), prompts, 7)
                shown = choices_of(self.designer, prompts[:share], rows[:share])
                counts = check_designs(rows, grammar)
                found[f"{weight:g}"] = {**counts, "shown": [c.to_row() for c in shown]}
            return found

        return self.kept("checked", make)

    def _sample(self, draw: Draw) -> list[list[int]]:
        return sample(self.designer, draw, self.prompts, self.config.seed, self.conditioned)

    def _choose(self, draw: Draw) -> list[Choice]:
        prompts = self.frame.prompts
        return choose(self.designer, draw, prompts, self.config.seed, self.conditioned)
