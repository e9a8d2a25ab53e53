"""What `build_triplets` renders, round by round: a function of configuration and earlier scores.

Round r holds: the panel's round r; in round 0 the random cells (pairs) and the wild ones, in round
r > 0 the evolved cells number r - 1; in the last round the calibration cells.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from flowloom.dataset.config import BuildTripletsConfig
from flowloom.dataset.prompts import Concept, concept_of, draw_prompts
from flowloom.dataset.workflows import (
    draw_wild_workflows,
    edited,
    make_grammar,
    panel_workflows,
    variations,
    writable,
)
from flowloom.shapes.prompts import PromptSpec
from flowloom.workflow import Catalogue, Workflow

SHRINK_RENDERS = 4.0
"""Renders that a prior mean counts for: variance of noise over that of workflows, (.3 / .15)^2."""
SHRINK_FILES = 4.0
"""The same for the mean over workflows with the same model files."""
NEARNESS = 0.3
"""Weight of a render for a concept that differs in one part."""


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
    """`train` or `calibration`."""
    origin: str
    """`panel`, `random` (a pair), `wild` or `evolved`."""
    seeds: tuple[int, ...]
    """Seeds to render."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A cell with its scores, one per seed."""

    cell: Cell
    scores: tuple[float, ...]


class Plan:
    """Decides the cells of each round."""

    def __init__(
        self,
        config: BuildTripletsConfig,
        catalogue: Catalogue,
        pairs: Mapping[str, Sequence[Workflow]],
    ):
        """Draw prompts and build the grammar.

        Args:
            config: What to render.
            catalogue: What there is to render with.
            pairs: Workflows of each train prompt.

        Raises:
            ValueError: The pairs are of other prompts than the train list.
        """
        self.config = config
        self.catalogue = catalogue
        self.grammar = make_grammar(catalogue, config.budget)
        lists = config.prompts
        self.train = draw_prompts("train", lists.num_train, lists.kinds, lists.seed)
        self.calibration = draw_prompts(
            "calibration", lists.num_calibration, lists.kinds, lists.seed
        )
        texts = [spec.text for spec in self.train]
        if set(pairs) != set(texts):
            raise ValueError(
                f"prompts: got pairs of {len(pairs)} prompts that are not the {len(texts)} train "
                "prompts of this configuration; expected equal `prompts` in both stages"
            )
        self.pairs = {
            text: [flow.canonical(catalogue) for flow in pairs[text][: config.random_cells]]
            for text in texts
        }
        # Seeds used so far by (prompt, fingerprint): no render twice.
        self._taken: Counter[tuple[str, str]] = Counter()
        self.num_rounds = max(len(config.panel.num_prompts), 1 + len(config.evolved_cells))

    def cells(self, number: int, history: Sequence[Rendered]) -> list[Cell]:
        """Cells of round `number`, given all rendered ones of the rounds before."""
        config = self.config
        rng = np.random.default_rng((config.seed, number))
        self._taken = Counter()
        for rendered in history:
            self._taken[rendered.cell.spec.text, rendered.cell.fingerprint] += len(rendered.scores)
        cells = self._panel(number, history)
        if number == 0:
            specs = [spec for spec in self.train for _ in self.pairs[spec.text]]
            flows = [flow for spec in self.train for flow in self.pairs[spec.text]]
            cells += self._cells(specs, flows, "train", "random", 1)
            specs = [spec for spec in self.train for _ in range(config.wild_cells)]
            flows = draw_wild_workflows(self.grammar, config.prior, len(specs), config.seed)
            flows = [flow.canonical(self.catalogue) for flow in flows]
            cells += self._cells(specs, flows, "train", "wild", 1)
        elif number <= len(config.evolved_cells):
            last = number == len(config.evolved_cells)
            count, seeds = config.evolved_cells[number - 1], config.evolved_seeds[number - 1]
            specs = [spec for spec in self.train for _ in range(count)]
            kept = 1.0 if last else config.kept_frac
            flows = self._evolved(specs, history, rng, kept)
            cells += self._cells(specs, flows, "train", "evolved", seeds)
        if number == self.num_rounds - 1:
            cells += self._calibration(history, rng)
        return cells

    def best_fixed(self, history: Sequence[Rendered]) -> tuple[Workflow, list[dict]]:
        """The panel's workflow with the best mean over the prompts of the last round.

        Returns:
            The workflow, and a row of statistics for each one of the last round, best first.
        """
        panel = self.config.panel
        first = sum(panel.num_prompts[:-1])
        last = {spec.text for spec in self.train[first : first + panel.num_prompts[-1]]}
        rows = _panel_means(r for r in history if r.cell.spec.text in last)
        return rows[0]["workflow"], rows

    def _panel(self, number: int, history: Sequence[Rendered]) -> list[Cell]:
        panel = self.config.panel
        if number >= len(panel.num_prompts):
            return []
        if number == 0:
            flows = writable(panel_workflows(self.catalogue, panel), self.grammar)
        else:
            ranked = [row["workflow"] for row in _panel_means(history)]
            flows = ranked[: panel.num_kept[number - 1]]
            if number == 1:
                for flow in ranked[: panel.num_varied]:
                    flows += variations(flow, self.grammar)
        flows = list({flow.template_fingerprint(): flow for flow in flows}.values())
        first = sum(panel.num_prompts[:number])
        specs = self.train[first : first + panel.num_prompts[number]]
        grid = [(spec, flow) for flow in flows for spec in specs]
        return self._cells([s for s, _ in grid], [f for _, f in grid], "train", "panel", 1)

    def _calibration(self, history: Sequence[Rendered], rng: np.random.Generator) -> list[Cell]:
        config = self.config
        specs = [spec for spec in self.calibration for _ in range(config.calibration_cells)]
        pairs = [flow for flows in self.pairs.values() for flow in flows]
        drawn = [pairs[k] for k in rng.integers(len(pairs), size=len(specs))]
        evolved = self._evolved(specs, history, rng, 0.5)
        flows = [pair[k % 2] for k, pair in enumerate(zip(drawn, evolved, strict=True))]
        seeds = config.calibration_seeds
        cells = self._cells(specs[::2], flows[::2], "calibration", "random", seeds)
        return cells + self._cells(specs[1::2], flows[1::2], "calibration", "evolved", seeds)

    def _evolved(
        self,
        specs: Sequence[PromptSpec],
        history: Sequence[Rendered],
        rng: np.random.Generator,
        kept_frac: float,
    ) -> list[Workflow]:
        """A workflow per prompt: one of its concept's best so far, kept or edited."""
        ranked = rank_by_concept(history)
        flows, edit = [], []
        seen: dict[tuple[str, int], None] = {}
        for place, spec in enumerate(specs):
            concept = concept_of(spec)
            if concept not in ranked:
                # Every train concept was rendered in round 0; a calibration one takes the nearest.
                near = max(sorted(ranked), key=lambda other: nearness(concept, other))
                ranked[concept] = ranked[near]
            parents = ranked[concept][: self.config.num_parents]
            # Better ones more often: a place's weight falls to a quarter over the list.
            weights = 0.25 ** (np.arange(len(parents)) / max(len(parents) - 1, 1))
            order = rng.choice(len(parents), len(parents), False, weights / weights.sum())
            # No parent twice for a prompt as long as there are others.
            pick = next((int(k) for k in order if (spec.text, int(k)) not in seen), int(order[0]))
            seen[spec.text, pick] = None
            flows.append(parents[pick])
            if rng.random() >= kept_frac:
                edit.append(place)
        changed = edited([flows[place] for place in edit], self.grammar, rng)
        for place, flow in zip(edit, changed, strict=True):
            flows[place] = flow
        return flows

    def _cells(
        self,
        specs: Sequence[PromptSpec],
        flows: Sequence[Workflow],
        split: str,
        origin: str,
        num_seeds: int,
    ) -> list[Cell]:
        cells = []
        for spec, flow in zip(specs, flows, strict=True):
            fingerprint = flow.template_fingerprint()
            # The panel compares workflows on common noise; elsewhere fresh noise teaches more.
            name = "panel" if origin == "panel" else fingerprint
            taken = self._taken[spec.text, fingerprint]
            self._taken[spec.text, fingerprint] += num_seeds
            seeds = tuple(
                render_seed(self.config.seed, spec.text, name, taken + k) for k in range(num_seeds)
            )
            cells.append(Cell(spec, flow, fingerprint, split, origin, seeds))
        return cells


def render_seed(seed: int, prompt: str, name: str, number: int) -> int:
    """Seed of one render, below 2^48 so that every reader holds it exactly."""
    digest = hashlib.sha256(f"{seed}|{prompt}|{name}|{number}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def rank_by_concept(history: Iterable[Rendered]) -> dict[Concept, list[Workflow]]:
    """Workflows for each concept among the train cells, best first, by shrunk mean score.

    With w the nearness of a render's concept to the one ranked for (1 for the same, `NEARNESS` for
    every part that differs) and s its score, a workflow's value is

        (sum w s + SHRINK_RENDERS m) / (sum w + SHRINK_RENDERS),

    where m is the same mean over all workflows with the same model files, drawn toward the mean of
    everything by SHRINK_FILES. So what was rendered for one concept speaks, weakly, for others.
    """
    # Per concept and workflow: number and sum of scores.
    counts: dict[Concept, dict[str, np.ndarray]] = defaultdict(lambda: defaultdict(_nothing))
    flow_of: dict[str, Workflow] = {}
    for rendered in history:
        cell = rendered.cell
        if cell.split == "train":
            flow_of.setdefault(cell.fingerprint, cell.workflow)
            seen = np.array([len(rendered.scores), sum(rendered.scores)])
            counts[concept_of(cell.spec)][cell.fingerprint] += seen
    files = {fingerprint: files_of(flow) for fingerprint, flow in flow_of.items()}
    return {concept: _rank(concept, counts, flow_of, files) for concept in counts}


def nearness(one: Concept, other: Concept) -> float:
    """`NEARNESS` to the power of the number of parts in which two concepts differ."""
    return NEARNESS ** sum(a != b for a, b in zip(one, other, strict=True))


def _rank(
    concept: Concept,
    counts: Mapping[Concept, Mapping[str, np.ndarray]],
    flow_of: Mapping[str, Workflow],
    files: Mapping[str, tuple[str, ...]],
) -> list[Workflow]:
    total: dict[str, np.ndarray] = defaultdict(_nothing)
    by_files: dict[tuple[str, ...], np.ndarray] = defaultdict(_nothing)
    for other, seen in counts.items():
        weight = nearness(concept, other)
        for fingerprint, count_sum in seen.items():
            total[fingerprint] += weight * count_sum
            by_files[files[fingerprint]] += weight * count_sum
    everything = sum(by_files.values(), _nothing())
    mean = everything[1] / everything[0]
    prior = {name: _shrunk(seen, mean, SHRINK_FILES) for name, seen in by_files.items()}
    value = {f: _shrunk(seen, prior[files[f]], SHRINK_RENDERS) for f, seen in total.items()}
    return [flow_of[f] for f in sorted(value, key=lambda f: (-value[f], f))]


def _nothing() -> np.ndarray:
    return np.zeros(2)


def _shrunk(count_sum: np.ndarray, toward: float, weight: float) -> float:
    return float((count_sum[1] + weight * toward) / (count_sum[0] + weight))


def files_of(workflow: Workflow) -> tuple[str, ...]:
    """Model files a workflow loads, sorted."""
    names = ("ckpt_name", "lora_name")
    values = (node.inputs.get(name) for node in workflow.nodes.values() for name in names)
    return tuple(sorted(str(value) for value in values if value is not None))


def _panel_means(history: Iterable[Rendered]) -> list[dict]:
    """Panel workflows with their mean over panel renders, best first."""
    scores: dict[str, list[float]] = defaultdict(list)
    flow_of: dict[str, Workflow] = {}
    for rendered in history:
        if rendered.cell.origin == "panel":
            fingerprint = rendered.cell.fingerprint
            flow_of.setdefault(fingerprint, rendered.cell.workflow)
            scores[fingerprint] += rendered.scores
    rows = [
        {
            "workflow": flow_of[fingerprint],
            "fingerprint": fingerprint,
            "mean": float(np.mean(values)),
            "num_renders": len(values),
        }
        for fingerprint, values in scores.items()
    ]
    return sorted(rows, key=lambda row: (-row["mean"], row["fingerprint"]))
