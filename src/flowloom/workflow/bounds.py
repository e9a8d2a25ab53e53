"""Quick answers about completions: what is missing costs so much at least, so much at most.

Sets of types, and of families, are the bits of an integer.
"""

from __future__ import annotations

from functools import reduce
from math import ceil
from operator import and_

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.costs import NEVER, Costs
from flowloom.workflow.steps import types_match
from flowloom.workflow.tables import OUTSIDE, Tables

ANY = -1  # no family
_STRANGERS = ("?", "!")  # types of nothing: what both match, everything matches


class Finished:
    """Finished nodes, as a list that shares its beginning with others."""

    __slots__ = (
        "_next", "_options", "before", "class_index", "families", "family", "gives", "tables",
    )  # fmt: skip

    def __init__(
        self,
        tables: Tables,
        before: Finished | None = None,
        class_index: int = -1,
        family: int = -1,
    ) -> None:
        self.tables, self.before = tables, before
        self.class_index, self.family = class_index, family
        # As bits: types that some node gives, families that some node has.
        self.gives = self.families = 0
        self._next: dict[tuple[int, int], Finished] = {}
        self._options: dict[int, tuple[tuple[int, int], ...]] = {}

    def then(self, class_index: int, family: int, gives: int) -> Finished:
        """This list and one more node, which gives these types."""
        key = (class_index, family)
        found = self._next.get(key)
        if found is None:
            found = self._next[key] = Finished(self.tables, self, class_index, family)
            found.gives = self.gives | gives
            found.families = self.families | (1 << family if family >= 0 else 0)
        return found

    def options(self, kind: int) -> tuple[tuple[int, int], ...]:
        """References for links of a type, latest first: tokens of the slot, family that binds."""
        if self.before is None:
            return ()
        found = self._options.get(kind)
        if found is None:
            t, c = self.tables, self.class_index
            found = self.before.options(kind)
            if t.feeds[kind, c]:
                slots = t.num_slots[kind, c]
                # Too many slots to name one: never taken, but it counts.
                extra = NEVER if slots == 0 else int(slots > 1)
                family = self.family if t.bears[kind, c] else ANY
                found = ((extra, family), *found[: voc.NUM_REFS - 1])
            self._options[kind] = found
        return found


class Missing:
    """A bound on what types cost that are needed and not there; sets of types are bits."""

    def __init__(self, tables: Tables, costs: Costs) -> None:
        self.gives = [0] * (tables.num_classes + 1)
        for kind, c in zip(*np.nonzero(tables.num_slots[:-1]), strict=True):
            self.gives[c] |= 1 << int(kind)
        self.needs = _needs(tables, costs)
        self._known: dict[tuple[int, int], int] = {}
        usable = costs.open_cost.min(1) < NEVER
        # A type that several types match is no share of anything.
        single = [
            k
            for k, (kind, _) in enumerate(tables.types)
            if "," not in kind and not any(types_match(other, kind) for other in _STRANGERS)
        ]
        share = np.zeros(tables.num_classes)
        for c in range(tables.num_classes):
            parts = sum(1 for k in single if self.gives[c] >> k & 1)
            share[c] = costs.low_open[c] / max(parts, 1)
        self.share, self.also = [0.0] * len(tables.types), [0] * len(tables.types)
        for k in single:
            legal = np.flatnonzero(costs.legal[k] & usable)
            firsts = [c for c in legal.tolist() if not self.needs[tables.first[c]] >> k & 1]
            if firsts:
                self.share[k] = min(share[c] for c in firsts)
                self.also[k] = reduce(and_, (self.needs[tables.first[c]] for c in firsts))

    def least(self, needed: int, there: int, coming: int) -> int:
        """Least tokens beyond one for each link that needed types cost.

        Args:
            needed: Types that no open node will give in time.
            there: Types that finished nodes give; they cost nothing.
            coming: Types that open nodes will give: they may be in time for what is made.
        """
        key = (needed & ~there, there | coming)
        found = self._known.get(key)
        if found is None:
            todo, given = key
            total, seen = 0.0, 0
            while todo:
                kind = (todo & -todo).bit_length() - 1
                seen |= 1 << kind
                total += self.share[kind]
                todo = (todo | (self.also[kind] & ~given)) & ~seen
            found = self._known[key] = ceil(total - 1e-6)
        return found


class Shortest:
    """A quick yes, where all nodes are of one family.

    Every choice takes its shortest option. A type that some node gives is referred to, with a slot
    if some class has one for it; any other type is made once, without references. Sets of types and
    families are bits.
    """

    def __init__(self, tables: Tables, costs: Costs) -> None:
        t, self.extra = tables, costs.extra.T.tolist()
        num = t.num_slots[:-1]
        # Types of which the latest node that gives them can always be named.
        named = np.any(num, axis=1) & ~np.any((num == 0) & t.feeds[:-1], axis=1)
        self.named, slotted = _bits(named), np.any(num > 1, axis=1)
        self.gives = [_bits(num[:, c] > 0) for c in range(t.num_classes + 1)]
        self.slots = [0] * len(t.after)
        every = (1 << len(t.families)) - 1
        self.wants, self.families = [0] * len(t.after), [every] * len(t.after)
        # Of families that cost the same, the first.
        self.kinds = _bits(np.isin(np.arange(len(costs.profile)), _firsts(costs.profile)))
        for at in sorted(t.positions):
            hole = next_hole(t, costs, at)
            if hole == OUTSIDE:
                continue
            if hole != at:
                to, row = hole, None
            elif t.choice[at] >= 0:
                branch = t.branch[t.choice[at]]
                tokens = [k for k in t.schema.program[at].branches if t.allowed[t.row[at], k]]
                ways = [int(branch[k]) for k in tokens]
                if not ways:
                    self.families[at] = 0
                    continue
                to = min(ways, key=lambda to: (costs.low[to], self.wants[to].bit_count()))
                row = None
            else:
                to, row = int(t.after[at]), t.row[at]
            self.wants[at], self.families[at] = self.wants[to], self.families[to]
            self.slots[at] = self.slots[to]
            if row is not None and t.has_files[row]:
                self.families[at] &= _bits(costs.literal[row] < NEVER)
            elif row is not None:
                self.wants[at] |= 1 << int(t.type[at])
                self.slots[at] += int(t.type[at] < len(t.types) and slotted[t.type[at]])

    def fits(
        self, wanted: int, able: int, families: tuple[int, ...], finished: Finished, slack: int
    ) -> bool:
        """Whether what is open surely fits; False says nothing."""
        used = finished.families
        for family in families:
            if family >= 0:
                used |= 1 << family
        if used & (used - 1) or not able:
            return False
        able &= used or self.kinds
        if wanted & ~self.named:
            return False
        missing, kinds = wanted & ~finished.gives, []
        while missing:
            kinds.append((missing & -missing).bit_length() - 1)
            missing &= missing - 1
        while able:
            extra = self.extra[(able & -able).bit_length() - 1]
            able &= able - 1
            if sum(extra[kind] for kind in kinds) <= slack:
                return True
        return False


def next_hole(tables: Tables, costs: Costs, at: int) -> int:
    """The first position from `at` on that no value, file of any family or <none> can fill."""
    while at != OUTSIDE:
        row = tables.row[at]
        if tables.allowed[row, voc.END]:
            at = int(tables.stop[at])
        elif tables.allowed[row, voc.NONE_ID] or (tables.choice[at] < 0 and costs.plain[row]):
            at = int(tables.after[at])
        else:
            break
    return at


def _needs(tables: Tables, costs: Costs) -> list[int]:
    """Types that links need from each position on, whatever the options; a bit each."""
    found = [0] * len(tables.after)
    for at in sorted(tables.positions):
        hole = next_hole(tables, costs, at)
        if hole != at or hole == OUTSIDE:
            found[at] = found[hole]
        elif tables.choice[at] >= 0:
            row, branch = tables.row[at], tables.branch[tables.choice[at]]
            tokens = tables.schema.program[at].branches
            options = [found[branch[token]] for token in tokens if tables.allowed[row, token]]
            found[at] = reduce(and_, options) if options else 0
        else:
            found[at] = found[tables.after[at]]
            if not tables.has_files[tables.row[at]]:
                found[at] |= 1 << int(tables.type[at])
    return found


def _bits(flags: np.ndarray) -> int:
    """A set of indices as an integer."""
    return sum(1 << k for k in np.flatnonzero(flags).tolist())


def _firsts(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_index=True)[1]
