"""Whether open nodes can be completed within a number of tokens, references counted on.

`costs` prices completions that count on no reference; near the budget that is too dear, and this
search decides. It walks the open holes in the order in which they are written. A hole that a value,
a file of any family, <none> or <end> can fill takes that: nothing is cheaper, and a node that is
wanted later can as well be opened later. A link takes a reference or opens a node.

Slack is how many tokens are left beyond one for each open hole, so only what costs more than one
token spends it. A walk ends where less is left than the types that nothing gives yet must cost: the
cost of a class is divided among the types it gives, and each missing type counts its least share.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from math import ceil
from operator import and_

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.costs import NEVER, Costs
from flowloom.workflow.steps import types_match
from flowloom.workflow.tables import OUTSIDE, Tables

MAX_VISITS = 2000
"""Holes that one question may look at before its answer is no."""
_MAX_KNOWN = 200_000
ANY = -1  # no family
_STRANGERS = ("?", "!")  # types of nothing: what both match, everything matches


# An open node: position of its next hole, class, index of its group of nodes that share a family,
# whether it is in the group of the node that holds it, whether something in it has a family.
Frame = tuple[int, int, int, bool, bool]
# Open nodes, the top first. With them, as bits: types that their holes need and no node above them
# will give; such types on the shortest way; families with all files for that. And how many links on
# the shortest way may need a slot.
Stack = tuple[Frame, "Stack", int, int, int, int] | None


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

    def least(self, needed: int, there: int) -> int:
        """Least tokens beyond one for each link that needed types cost which are not there."""
        found = self._known.get((needed, there))
        if found is None:
            total, seen, todo = 0.0, 0, needed & ~there
            while todo:
                kind = (todo & -todo).bit_length() - 1
                seen |= 1 << kind
                total += self.share[kind]
                todo = (todo | self.also[kind]) & ~(seen | there)
            found = self._known[needed, there] = ceil(total - 1e-6)
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
        named = num.any(1) & ~((num == 0) & t.feeds[:-1]).any(1)
        self.named, slotted = _bits(named), (num > 1).any(1)
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


class Completions:
    """Answers for one grammar; what was found is kept."""

    def __init__(self, tables: Tables, costs: Costs) -> None:
        self.tables, self.costs = tables, costs
        self.missing = Missing(tables, costs)
        self.shortest = Shortest(tables, costs)
        self.nothing = Finished(tables)
        self._after = tables.after.tolist()
        self._type = tables.type.tolist()
        self._choice = tables.choice.tolist()
        self._holes: dict[int, int] = {}
        self._sources: dict[int, list[tuple[int, int, bool]]] = {}
        self._known: dict[tuple, tuple[int, int]] = {}
        self._visits = 0

    def push(self, frame: Frame, below: Stack) -> Stack:
        """Open nodes with one more on top."""
        at, c = frame[:2]
        needed, wanted = self.missing.needs[at], self.shortest.wants[at]
        families, slots = self.shortest.families[at], self.shortest.slots[at]
        if below is not None:
            needed |= below[2] & ~self.missing.gives[c]
            wanted |= below[3] & ~self.shortest.gives[c]
            families &= below[4]
            slots += below[5]
        return frame, below, needed, wanted, families, slots

    def fits(
        self,
        stack: Stack,
        families: tuple[int, ...],
        finished: Finished,
        slack: int,
        max_visits: int = MAX_VISITS,
    ) -> bool:
        """Whether everything open can be completed.

        Args:
            stack: Open nodes.
            families: Family of each group, -1 where none binds it yet.
            finished: Finished nodes.
            slack: Tokens left beyond one for each open hole.
            max_visits: Holes to look at; then the answer is no.
        """
        if len(self._known) > _MAX_KNOWN:
            self._known.clear()
            self.nothing = Finished(self.tables)
        self._visits = max_visits
        return self._fits(stack, families, finished, slack)

    def _fits(
        self, stack: Stack, families: tuple[int, ...], finished: Finished, slack: int
    ) -> bool:
        while stack is not None:
            (at, c, group, joins, bound), rest, needed, wanted, able, slots = stack
            if slack < self.missing.least(needed, finished.gives):
                return False
            hole = self._next_hole(at)
            if hole != OUTSIDE:
                if self.shortest.fits(wanted, able, families, finished, slack - slots):
                    return True
                stack = ((hole, c, group, joins, bound), rest, needed, wanted, able, slots)
                return self._fill(stack, families, finished, slack)
            family = families[group] if bound else ANY
            finished = finished.then(c, family, self.missing.gives[c])
            if rest is not None and bound and joins and not rest[0][4]:
                rest = ((*rest[0][:4], True), *rest[1:])
            stack = rest
        return slack >= 0

    def _next_hole(self, at: int) -> int:
        """The first position from `at` on whose filling needs a thought."""
        found = self._holes.get(at)
        if found is None:
            found = self._holes[at] = next_hole(self.tables, self.costs, at)
        return found

    def _fill(
        self,
        stack: tuple[Frame, Stack, int, int, int, int],
        families: tuple[int, ...],
        finished: Finished,
        slack: int,
    ) -> bool:
        key = (stack, families, id(finished))
        fails, holds = self._known.get(key, (-1, NEVER))
        if slack <= fails:
            return False
        if slack >= holds:
            return True
        self._visits -= 1
        if self._visits < 0:
            return False
        found = any(self._ways(stack, families, finished, slack))
        if found:
            self._known[key] = (fails, slack)
        elif self._visits >= 0:
            self._known[key] = (slack, holds)
        return found

    def _ways(
        self,
        stack: tuple[Frame, Stack, int, int, int, int],
        families: tuple[int, ...],
        finished: Finished,
        slack: int,
    ) -> Iterator[bool]:
        """Try to fill the next hole in one way after another."""
        t, costs = self.tables, self.costs
        frame, rest = stack[:2]
        at, group = frame[0], frame[2]
        if self._choice[at] >= 0:
            for token in t.schema.program[at].branches:
                if t.allowed[t.row[at], token]:
                    to = int(t.branch[t.choice[at], token])
                    extra = int(1 + costs.low[to] - costs.low[at])
                    if extra <= slack:
                        moved = self.push((to, *frame[1:]), rest)
                        yield self._fits(moved, families, finished, slack - extra)
            return
        after = (self._after[at], *frame[1:])
        if t.has_files[t.row[at]]:
            stack = self.push((*after[:4], True), rest)
            for other in self._file_families(int(t.row[at]), families[group], families, finished):
                yield self._fits(stack, _bind(families, group, other), finished, slack)
        if self._type[at] < len(t.types):
            yield from self._links(frame, after, rest, families, finished, slack)

    def _file_families(
        self, row: int, family: int, families: tuple[int, ...], finished: Finished
    ) -> list[int]:
        """Families of the files that may fill a hole; of those that are alike and unused, one."""
        literal = self.costs.literal[row]
        if family >= 0:
            return [family] if literal[family] < NEVER else []
        used = set(families)
        node: Finished | None = finished
        while node is not None:
            used.add(node.family)
            node = node.before
        seen: set[int] = set()
        found = []
        for f in np.flatnonzero(literal < NEVER).tolist():
            profile = int(self.costs.profile[f])
            if f in used or profile not in seen:
                found.append(f)
                if f not in used:
                    seen.add(profile)
        return found

    def _links(
        self,
        frame: Frame,
        after: Frame,
        rest: Stack,
        families: tuple[int, ...],
        finished: Finished,
        slack: int,
    ) -> Iterator[bool]:
        """References first, then new nodes, cheapest first."""
        at, _, group, _, is_bound = frame
        kind, family = self._type[at], families[group]
        options = finished.options(kind)
        filled = self.push(after, rest)
        for extra, bearer in sorted(set(options)):
            if extra > slack or (bearer >= 0 and family >= 0 and bearer != family):
                continue
            stack = filled if bearer < 0 or is_bound else self.push((*after[:4], True), rest)
            yield self._fits(stack, _bind(families, group, bearer), finished, slack - extra)
            if extra == 0 and (bearer < 0 or is_bound):
                return  # no way is better
        costs, first, needs = self.costs, self.tables.first, self.missing.needs
        for extra, c, joins in self._sources_of(kind):
            if extra > slack:
                break
            # Without a reference to what it gives, a node that needs the same comes too late.
            if not options and needs[first[c]] >> kind & 1:
                continue
            if joins and family >= 0 and costs.open_cost[c, costs.profile[family]] >= NEVER:
                continue
            own, groups = (group, families) if joins else (len(families), (*families, ANY))
            opened = self.push((int(first[c]), c, own, joins, False), filled)
            yield self._fits(opened, groups, finished, slack - extra)

    def _sources_of(self, kind: int) -> list[tuple[int, int, bool]]:
        """Classes for links of a type: tokens beyond the class's own, class, whether it joins."""
        found = self._sources.get(kind)
        if found is None:
            t, costs = self.tables, self.costs
            legal = costs.legal[kind] & (costs.open_cost.min(1) < NEVER)
            legal &= costs.most_gain[t.first[:-1]] <= 1
            slot, joins = t.num_slots[kind] > 1, t.bears[kind]
            found = self._sources[kind] = sorted(
                (int(costs.low_open[c] + slot[c]), c, bool(joins[c]))
                for c in np.flatnonzero(legal).tolist()
            )
        return found


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


def _bind(families: tuple[int, ...], group: int, family: int) -> tuple[int, ...]:
    if family < 0 or families[group] == family:
        return families
    return (*families[:group], family, *families[group + 1 :])
