"""Which tokens may come next: the tables of a pushdown automaton over the code of `codec`.

`Grammar` holds what does not change while tokens are drawn; `pushdown.State` holds a batch of rows.
A token is legal where its type, family and picture size fit and everything still open can be
completed within the token budget. So whatever is drawn from the mask is a valid workflow and ends.

Without taste, the codes of a budget are exactly those of the valid workflows of one output node
that are at most as long, each once, but for these, which are never drawn:

- a linked seed or choice, a value off the grids or that is a list, a gap in a growing input (an
  element that is absent before one that is there), a link to the ninth latest node of a type or an
  older one, a node with more than 8 outputs for one link, an output node that another node reads;
- batches, pictures and steps that one sampling run may not have all at their most (`work`);
  sizes and counts linked to a node that holds a number above 1;
- near a limit on pictures: what fits the budget only by references, or only with a smaller picture
  than the cheapest way to make one gives; and what the search for a completion does not find
  before it gives up (`completion.MAX_VISITS`);
- what a class would allow if, of its outputs that fit one link, not all counted as of a family (or
  as pictures) where one does.

Several output nodes may come in any order; `encode` writes one of them. A restriction only narrows
the masks, but for what taste gives way to where nothing else is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.catalogue import Catalogue
from flowloom.workflow.codec import Codec
from flowloom.workflow.completion import Completions
from flowloom.workflow.costs import NEVER, Costs
from flowloom.workflow.literals import shown
from flowloom.workflow.passes import Passes
from flowloom.workflow.pushdown import State
from flowloom.workflow.sizes import Sizes
from flowloom.workflow.steps import SEED
from flowloom.workflow.tables import GrammarError, Tables
from flowloom.workflow.vocabulary import Vocabulary
from flowloom.workflow.work import bound_work

__all__ = ["Grammar", "GrammarError"]


class Grammar:
    """Legal next tokens for one catalogue, vocabulary, budget and restriction."""

    def __init__(
        self,
        catalogue: Catalogue,
        vocabulary: Vocabulary | None = None,
        budget: int = 64,
        *,
        classes: Iterable[str] | None = None,
        require: Mapping[str, Any] | Iterable[str] = (),
        forbid: Iterable[str] = (),
        caps: Mapping[str, int] | None = None,
        max_outputs: int = 1,
        taste: bool = True,
    ) -> None:
        """Build the tables.

        Args:
            catalogue: Node facts, files and limits.
            vocabulary: Its vocabulary, or one extended to it; built from the catalogue if left out.
            budget: Most tokens of one workflow, <eos> included.
            classes: Only these node classes; all available ones if left out.
            require: {"steps": 8, "KSampler.cfg": 2.0, "ckpt_name": "a.safetensors"} or "K=V"
                strings: every input of that name has that value.
            forbid: Class names, file names (with or without folder), or "input=value".
            caps: Most nodes of a class in one workflow, over the shipped ones.
            max_outputs: Most output nodes.
            taste: Whether the caps hold, loaders are reused and sampling passes fit together
                (`passes`) where that is possible. Without it a workflow need only be valid.

        Raises:
            GrammarError: a name is unknown, or no workflow fits.
        """
        self.catalogue = catalogue
        self.vocabulary = vocabulary or Vocabulary.build(catalogue)
        self.budget, self.max_outputs, self.taste = budget, max_outputs, taste
        self.codec = Codec(catalogue, self.vocabulary)
        self.class_names = self._choose_classes(classes)
        self.num_classes = len(self.class_names)
        self.tables = Tables(catalogue, self.vocabulary, self.codec.schema, self.class_names)
        pixels, wide = bound_work(self.tables), Sizes(self.tables)
        self.tables.restrict(require, forbid)
        self.costs = Costs(self.tables, Sizes(self.tables, wide), pixels)
        self.completions = Completions(self.tables, self.costs)
        self.passes = Passes(self.tables, self.costs)
        rules = voc.rules()
        self._fill_caps({**rules["caps"], **(caps or {})}, rules["cap_groups"])
        cheapest = self._cheapest()
        if cheapest > budget:
            said = f"require {_said(require)}, forbid {_said(forbid)}"
            got = f"this restriction of the catalogue ({said})"
            got = f"budget {budget}" if cheapest < NEVER else got
            need = (
                f"at least {cheapest} tokens" if cheapest < NEVER else "one that leaves a workflow"
            )
            raise GrammarError(f"grammar: got {got}, expected {need}")

    def start(self, batch: int) -> State:
        """`batch` rows before their first token."""
        return State(self, batch)

    def annotate(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Node index [T] and field index [T] of one sequence; see `Codec.annotate`."""
        return self.codec.annotate(tokens)

    def run(self, tokens: Sequence[int]) -> State:
        """One row after these tokens (a leading <bos> is skipped).

        Raises:
            GrammarError: one of them is illegal where it stands.
        """
        state = self.start(1)
        for token in tokens:
            if token != voc.BOS:
                state.advance(np.array([token]))
        return state

    def accepts(self, tokens: Sequence[int]) -> bool:
        """Whether the tokens are a whole workflow that this grammar can write."""
        try:
            return bool(self.run(tokens).done[0])
        except GrammarError:
            return False

    def accept_all(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """`accepts` [N] of many sequences at once (without <bos>)."""
        accepted = np.zeros(len(sequences), bool)
        alive = np.array([k for k, s in enumerate(sequences) if 0 < len(s) <= self.budget], int)
        tokens = np.full((len(sequences), self.budget), voc.PAD, np.int64)
        for k in alive:
            tokens[k, : len(sequences[k])] = sequences[k]
        lengths = np.array([len(s) for s in sequences])
        state = self.start(len(alive))
        for step in range(self.budget if len(alive) else 0):
            now = tokens[alive, step]
            known = (now >= 0) & (now < self.vocabulary.size)
            legal = known & state.mask()[np.arange(len(alive)), np.where(known, now, 0)]
            if not legal.all():
                alive, now, state = alive[legal], now[legal], state.select(legal)
            state.advance(now)
            accepted[alive] = state.done & (lengths[alive] == step + 1)
            alive, state = alive[~state.done], state.select(~state.done)
            if not len(alive):
                break
        return accepted

    @property
    def families(self) -> tuple[str, ...]:
        """Families of the installed files; ("",) where there is none."""
        return self.tables.families

    @property
    def file_ids(self) -> np.ndarray:
        """Tokens of files."""
        return self.tables.file_ids

    @property
    def static(self) -> np.ndarray:
        """Tokens that a field may take anywhere. Shape: fields, V."""
        return self.tables.static

    @property
    def field_type(self) -> np.ndarray:
        """Index of the type of a field's links, -1 where it takes none. Shape: fields."""
        return self.tables.field_type

    @property
    def field_role(self) -> np.ndarray:
        """1 for a positive input, 2 for a negative one, else 0. Shape: fields."""
        return self.tables.field_role

    @cached_property
    def seeds_opened(self) -> dict[int, int]:
        """How many seeds (which take no token) a class token brings along, where it does."""
        program, counts = self.codec.schema.program, {}
        for name in self.class_names:
            at, count = self.codec.schema.start[name], 0
            while at:
                count += program[at].how == SEED
                at = program[at].next
            if count:
                counts[self.vocabulary.class_ids[name]] = count
        return counts

    def _cheapest(self) -> int:
        """Fewest tokens of a workflow."""
        roots = np.flatnonzero(self.tables.allowed[0, self.tables.class_ids])
        canonical = int(self.costs.open_cost[roots].min(initial=NEVER)) + 2
        if canonical <= self.budget or canonical >= NEVER:
            return canonical
        search = self.completions
        for budget in range(2, canonical):
            for c in roots.tolist():
                root = search.push((int(self.tables.first[c]), c, 0, False, False), None)
                slack = budget - 2 - int(self.costs.low_open[c])
                if slack >= 0 and search.fits(root, (-1,), search.nothing, slack):
                    return budget
        return canonical

    def _choose_classes(self, classes: Iterable[str] | None) -> list[str]:
        """Classes to write, in the catalogue's order: those asked for that are available."""
        known = self.vocabulary.class_ids
        wanted = list(known) if classes is None else list(classes)
        for name in wanted:
            if name not in known or name not in self.catalogue.nodes:
                raise GrammarError(f"classes: {name!r} is not in the catalogue")
        chosen = set(wanted)
        found = [c for c in self.catalogue.nodes if c in chosen and self.catalogue.available(c)]
        if not found:
            raise GrammarError("classes: none of them is available, expected at least one")
        return found

    def _fill_caps(self, caps: Mapping[str, int], groups: list[dict[str, Any]]) -> None:
        """`cap_members[c, g]`: whether class c counts toward cap g; `cap_of[g]`: the cap."""
        wanted = [([name], cap) for name, cap in caps.items() if name in self.class_names]
        wanted += [(group["classes"], group["cap"]) for group in groups]
        self.cap_members = np.zeros((self.num_classes, len(wanted)), np.int32)
        self.cap_of = np.array([cap for _, cap in wanted], np.int32)
        for g, (names, _) in enumerate(wanted):
            self.cap_members[:, g] = np.isin(self.class_names, names)


def _said(restriction: Mapping[str, Any] | Iterable[str]) -> str:
    if isinstance(restriction, Mapping):
        restriction = [f"{name}={value}" for name, value in restriction.items()]
    return ", ".join(map(shown, restriction)) or "nothing"
