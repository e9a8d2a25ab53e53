"""What `build_triplets` renders, round by round: a function of configuration and earlier scores.

Round r holds: the panel's round r; in round 0 the random cells (pairs) and the wild ones, in round
r > 0 the evolved cells number r - 1; a share of the calibration cells with pairs, and in the last
round those with evolved workflows. The mode `plain` has one round, and nothing evolved.

A workflow that is held out by its fingerprint is rendered where it turns up, and something else
is trained on in its place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from flowloom.dataset.cells import CALIBRATION, Cell, Pairs, Rendered, Template, render_seed
from flowloom.dataset.config import BuildTripletsConfig
from flowloom.dataset.prompts import concept_of, list_prompts
from flowloom.dataset.ranking import nearness, panel_means, rank_by_concept
from flowloom.dataset.splits import HELD_OUT_WORKFLOW, TRAIN, WORKFLOW_FRAC
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


class Plan:
    """Decides the cells of each round."""

    def __init__(self, config: BuildTripletsConfig, catalogue: Catalogue, pairs: Pairs):
        """List prompts and build the grammar.

        Args:
            config: What to render.
            catalogue: What there is to render with.
            pairs: What `build_pairs` made of each train prompt, held-out workflows included.

        Raises:
            ValueError: The pairs are of other prompts than the train list, or that is too short for
                the panel.
        """
        self.config = config
        self.catalogue = catalogue
        self.grammar = make_grammar(catalogue, config.budget)
        self.train = [prompt.shapes() for prompt in list_prompts(config.prompts, "train")]
        self.calibration = [p.shapes() for p in list_prompts(config.prompts, "calibration")]
        texts = [spec.text for spec in self.train]
        if set(pairs) != set(texts):
            raise ValueError(
                f"prompts: got pairs of {len(pairs)} prompts that are not the {len(texts)} train "
                "prompts of this configuration; expected equal `prompts` in both stages"
            )
        if sum(config.panel_prompts) > len(texts):
            raise ValueError(
                f"panel.num_prompts: got a sum of {sum(config.panel_prompts)}, expected at most "
                f"{len(texts)}, the train prompts"
            )
        kept = {text: [pair for pair in pairs[text] if not pair.held_out] for text in texts}
        self.pairs = {text: flows[: config.random_cells] for text, flows in kept.items()}
        self.held_out_pairs = self._held_out(pairs)
        # Seeds used so far by (prompt, fingerprint): no render twice.
        self._taken: Counter[tuple[str, str]] = Counter()
        rounds = max(len(config.panel.num_prompts), 1 + len(config.evolved_cells))
        self.num_rounds = 1 if config.mode == "plain" else rounds

    def cells(self, number: int, history: Sequence[Rendered]) -> list[Cell]:
        """Cells of round `number`, given all cells of the rounds before."""
        config = self.config
        rng = np.random.default_rng((config.seed, number))
        self._taken = Counter()
        for rendered in history:
            cell = rendered.cell
            self._taken[cell.spec.text, cell.fingerprint] += len(cell.seeds)
        cells = self._panel(number, history)
        if number == 0:
            drawn = [(spec, flow) for spec in self.train for flow in self.pairs[spec.text]]
            cells += self._cells(drawn, TRAIN, "random", config.random_seeds)
            cells += self._cells(self.held_out_pairs, HELD_OUT_WORKFLOW, "random")
            wild, held_out = self._wild()
            cells += self._cells(wild, TRAIN, "wild", 1)
            cells += self._cells(held_out, HELD_OUT_WORKFLOW, "wild")
        elif number <= len(config.evolved_cells):
            last = number == len(config.evolved_cells)
            count, seeds = config.evolved_cells[number - 1], config.evolved_seeds[number - 1]
            specs = [spec for spec in self.train for _ in range(count)]
            kept = 1.0 if last else config.kept_frac
            evolved, held_out = self.evolved(specs, history, rng, kept)
            cells += self._cells(evolved, TRAIN, "evolved", seeds)
            cells += self._cells(held_out, HELD_OUT_WORKFLOW, "evolved")
        return cells + self._calibration(number, history, rng)

    def best_fixed(self, history: Sequence[Rendered]) -> tuple[Workflow, list[dict]]:
        """The panel's workflow with the best mean over the prompts of the last round.

        Returns:
            The workflow, and a row of statistics for each one of the last round, best first.
        """
        sizes = self.config.panel_prompts
        first = sum(sizes[:-1])
        last = {spec.text for spec in self.train[first : first + sizes[-1]]}
        rows = panel_means(r for r in history if r.cell.spec.text in last)
        return rows[0]["workflow"], rows

    def _held_out(self, pairs: Pairs) -> list[tuple[PromptSpec, Template]]:
        """Pairs with a held-out workflow, as many as there would be among the random cells."""
        columns = [[(s, p) for p in pairs[s.text] if p.held_out] for s in self.train]
        deepest = max(map(len, columns), default=0)
        in_turn = [rows[k] for k in range(deepest) for rows in columns if k < len(rows)]
        return in_turn[: round(WORKFLOW_FRAC * self.config.random_cells * len(self.train))]

    def _wild(self) -> tuple[list[tuple[PromptSpec, Template]], ...]:
        """Wild workflows of each train prompt, and the held-out ones that were drawn between."""
        config = self.config
        specs = [spec for spec in self.train for _ in range(config.wild_cells)]
        num = math.ceil(len(specs) * (1 + 2 * WORKFLOW_FRAC)) + 16
        while True:
            drawn = draw_wild_workflows(self.grammar, config.prior, num, config.seed)
            kept: list[tuple[PromptSpec, Template]] = []
            held_out: list[tuple[PromptSpec, Template]] = []
            for workflow in drawn:
                if len(kept) == len(specs):
                    return kept, held_out
                template = Template.of(workflow.canonical(self.catalogue))
                (held_out if template.held_out else kept).append((specs[len(kept)], template))
            num *= 2

    def _panel(self, number: int, history: Sequence[Rendered]) -> list[Cell]:
        panel, sizes = self.config.panel, self.config.panel_prompts
        if number >= len(sizes):
            return []
        if number == 0:
            flows = writable(panel_workflows(self.catalogue, panel), self.grammar)
        else:
            ranked = [row["workflow"] for row in panel_means(history)]
            flows = ranked[: panel.num_kept[number - 1]]
            if number == 1:
                for flow in ranked[: panel.num_varied]:
                    flows += variations(flow, self.grammar)
        templates = list({t.fingerprint: t for t in map(Template.of, flows)}.values())
        first = sum(sizes[:number])
        specs = self.train[first : first + sizes[number]]
        # A held-out one may turn out the best fixed workflow; its scores are not trained on.
        return [
            cell
            for template in templates
            for cell in self._cells(
                [(spec, template) for spec in specs],
                HELD_OUT_WORKFLOW if template.held_out else TRAIN,
                "panel",
                1,
            )
        ]

    def _calibration(
        self, number: int, history: Sequence[Rendered], rng: np.random.Generator
    ) -> list[Cell]:
        """This round's share of the cells with pairs; the evolved half comes last.

        They steer nothing, so they are rendered while the next round is planned.
        """
        config, seeds = self.config, self.config.calibration_seeds
        specs = [spec for spec in self.calibration for _ in range(config.calibration_cells)]
        drawn = specs if config.mode == "plain" else specs[::2]
        pairs = [flow for flows in self.pairs.values() for flow in flows]
        places = np.random.default_rng((config.seed, 0, 1)).integers(len(pairs), size=len(drawn))
        cells = [(spec, pairs[k]) for spec, k in zip(drawn, places, strict=True)]
        cells = self._cells(cells[number :: self.num_rounds], CALIBRATION, "random", seeds)
        if number == self.num_rounds - 1 and config.mode == "rounds":
            evolved, _ = self.evolved(specs[1::2], history, rng, 0.5, part=False)
            cells += self._cells(evolved, CALIBRATION, "evolved", seeds)
        return cells

    def evolved(
        self,
        specs: Sequence[PromptSpec],
        history: Sequence[Rendered],
        rng: np.random.Generator,
        kept_frac: float,
        part: bool = True,
    ) -> tuple[list[tuple[PromptSpec, Template]], ...]:
        """A workflow per prompt: one of its concept's best so far, kept or edited.

        With `part`, an edit that is held out goes to a second list, and its parent to the first.
        """
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
        changed = edited([flows[place].workflow for place in edit], self.grammar, rng)
        held_out = []
        for place, template in zip(edit, map(Template.of, changed), strict=True):
            if part and template.held_out:
                held_out.append((specs[place], template))
            else:
                flows[place] = template
        return list(zip(specs, flows, strict=True)), held_out

    def _cells(
        self,
        chosen: Iterable[tuple[PromptSpec, Template]],
        split: str,
        origin: str,
        num_seeds: int | None = None,
    ) -> list[Cell]:
        num_seeds = self.config.held_out_seeds if num_seeds is None else num_seeds
        cells = []
        for spec, template in chosen:
            fingerprint = template.fingerprint
            # The panel compares workflows on common noise; elsewhere fresh noise teaches more.
            name = "panel" if origin == "panel" else fingerprint
            taken = self._taken[spec.text, fingerprint]
            self._taken[spec.text, fingerprint] += num_seeds
            seeds = tuple(
                render_seed(self.config.seed, spec.text, name, taken + k) for k in range(num_seeds)
            )
            cells.append(Cell(spec, template.workflow, fingerprint, split, origin, seeds))
        return cells
