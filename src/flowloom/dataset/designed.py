"""A round of triplets that renders what a policy designed; it joins the triplets of earlier rounds.

The reward is the limit of policy optimisation, and least known where the policy goes. So between
two rounds of it some of its designs are rendered, by default those on which the reward's members
disagree most.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowloom.dataset.cells import CALIBRATION, Cell, Rendered, Template, render_seed
from flowloom.dataset.config import BuildTripletsConfig
from flowloom.dataset.prompts import Prompt
from flowloom.dataset.splits import HELD_OUT_WORKFLOW, TRAIN
from flowloom.dataset.tables import read_table
from flowloom.workflow import Catalogue, Workflow

PROPOSALS_FILE = "proposals.parquet"
"""Designs to choose from, with prompt, split, workflow, fingerprint and spread at least."""
ORIGIN = "designed"


class DesignedPlan:
    """One round: proposals for train prompts, and for calibration prompts beside them."""

    num_rounds = 1

    def __init__(
        self,
        config: BuildTripletsConfig,
        catalogue: Catalogue,
        proposals: Path,
        earlier: Path,
        rows: dict[str, list[Any]],
        prompts: Sequence[Prompt],
    ):
        """Choose what to render.

        Args:
            config: How many, by what order, with how many seeds.
            catalogue: What there is to render with.
            proposals: Folder with `proposals.parquet`.
            earlier: Folder of `build_triplets` that the round joins.
            rows: Its rows.
            prompts: Every prompt that a proposal may be for.

        Raises:
            ValueError: There are no proposals, or one is for a prompt of none of the lists.
        """
        self.config, self.catalogue, self.earlier = config, catalogue, earlier
        path = proposals / PROPOSALS_FILE
        if not path.is_file():
            raise ValueError(
                f"proposals: got {str(proposals)!r}, expected a folder of train_grpo with "
                f"{PROPOSALS_FILE} (its field num_proposals)"
            )
        columns = read_table(path)
        spec_of = {prompt.text: prompt.shapes() for prompt in prompts}
        unknown = next((text for text in columns["prompt"] if text not in spec_of), None)
        if unknown is not None:
            raise ValueError(
                f"proposals: got a design for {unknown!r}, expected prompts of this "
                "configuration's lists"
            )
        taken = Counter(zip(rows["prompt"], rows["fingerprint"], strict=True))
        self._cells = []
        for split, number, seeds in (
            (TRAIN, config.num_designed, config.designed_seeds),
            (CALIBRATION, None, config.calibration_seeds),
        ):
            for place in self._order(columns, split)[:number]:
                text, name = columns["prompt"][place], columns["fingerprint"][place]
                flow = Workflow.from_api(json.loads(columns["workflow"][place]))
                template = Template(flow.canonical(catalogue), name)
                first = taken[text, name]
                kept = HELD_OUT_WORKFLOW if split == TRAIN and template.held_out else split
                numbers = range(first, first + seeds)
                drawn = tuple(render_seed(config.seed, text, name, k) for k in numbers)
                self._cells.append(Cell(spec_of[text], flow, name, kept, ORIGIN, drawn))

    def cells(self, number: int, history: Sequence[Rendered]) -> list[Cell]:
        """The cells of the only round, 0; `history` says nothing about them."""
        assert number == 0, history
        return self._cells

    def best_fixed(self, history: Sequence[Rendered]) -> tuple[Workflow, list[dict]]:
        """That of the earlier rounds, with their statistics; `history` has no panel."""
        del history
        best = Workflow.from_api(json.loads((self.earlier / "best_fixed.json").read_text()))
        card = json.loads((self.earlier / "card.json").read_text())
        return best, card["best_fixed"]

    def _order(self, columns: dict[str, list[Any]], split: str) -> list[int]:
        """Rows of a split: the most uncertain first, or in random order."""
        places = [k for k, value in enumerate(columns["split"]) if value == split]
        if self.config.designed_by == "random":
            return np.random.default_rng((self.config.seed, 3)).permutation(places).tolist()
        return sorted(places, key=lambda k: (-columns["spread"][k], k))
