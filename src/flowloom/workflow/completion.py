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

import numpy as np

from flowloom.workflow.bounds import ANY, Finished, Missing, Shortest, next_hole
from flowloom.workflow.costs import NEVER, Costs
from flowloom.workflow.tables import OUTSIDE, Tables

MAX_VISITS = 2000
"""Holes that one question may look at before its answer is no."""
MAX_DEPTH = 120
"""Holes that may need a decision one after the other; beyond that the answer is no."""
_MAX_KNOWN = 200_000

# An open node: position of its next hole, class, index of its group of nodes that share a family,
# whether it is in the group of the node that holds it, whether something in it has a family.
Frame = tuple[int, int, int, bool, bool]
# Open nodes, the top first. With them, as bits: types that their holes need and no node above them
# will give; such types on the shortest way; families with all files for that. And how many links on
# the shortest way may need a slot. And, as bits, the types that any of them will give.
Stack = tuple[Frame, "Stack", int, int, int, int, int] | None


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
        # Type of the holes that only a link can fill, else -1.
        only = (tables.type < len(tables.types)) & ~tables.has_files[tables.row]
        self._plain_link = np.where(only, tables.type, -1).tolist()
        self._holes: dict[int, int] = {}
        self._sources: dict[int, list[tuple[int, int, bool]]] = {}
        self._known: dict[tuple, tuple[int, int]] = {}
        self._visits = self._depth = 0

    def trim(self) -> None:
        """Forget what was found once it is much; lists of finished nodes must start anew."""
        if len(self._known) > _MAX_KNOWN:
            self._known.clear()
            self.nothing = Finished(self.tables)

    def push(self, frame: Frame, below: Stack) -> Stack:
        """Open nodes with one more on top."""
        at, c = frame[:2]
        needed, wanted = self.missing.needs[at], self.shortest.wants[at]
        families, slots = self.shortest.families[at], self.shortest.slots[at]
        coming = self.missing.gives[c]
        if below is not None:
            needed |= below[2] & ~self.missing.gives[c]
            wanted |= below[3] & ~self.shortest.gives[c]
            families &= below[4]
            slots += below[5]
            coming |= below[6]
        return frame, below, needed, wanted, families, slots, coming

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
        self._visits, self._depth = max_visits, 0
        return self._fits(stack, families, finished, slack)

    def _fits(
        self, stack: Stack, families: tuple[int, ...], finished: Finished, slack: int
    ) -> bool:
        while stack is not None:
            (at, c, group, joins, bound), rest, needed, wanted, able, slots, coming = stack
            if slack < self.missing.least(needed, finished.gives, coming):
                return False
            hole = self._next_hole(at)
            if hole != OUTSIDE:
                if self._refers(hole, families[group] if bound else ANY, finished):
                    stack = self.push((self._after[hole], c, group, joins, bound), rest)
                    continue
                if self.shortest.fits(wanted, able, families, finished, slack - slots):
                    return True
                stack = ((hole, c, group, joins, bound), rest, needed, wanted, able, slots, coming)
                return self._fill(stack, families, finished, slack)
            family = families[group] if bound else ANY
            finished = finished.then(c, family, self.missing.gives[c])
            if rest is not None and bound and joins and not rest[0][4]:
                rest = ((*rest[0][:4], True), *rest[1:])
            stack = rest
        return slack >= 0

    def _refers(self, hole: int, family: int, finished: Finished) -> bool:
        """Whether a reference fills a hole for one token and binds no family: no way is better."""
        if self._choice[hole] >= 0 or self._plain_link[hole] < 0:
            return False
        options = finished.options(self._plain_link[hole])
        return (0, ANY) in options or (family != ANY and (0, family) in options)

    def _next_hole(self, at: int) -> int:
        """The first position from `at` on whose filling needs a thought."""
        found = self._holes.get(at)
        if found is None:
            found = self._holes[at] = next_hole(self.tables, self.costs, at)
        return found

    def _fill(
        self,
        stack: tuple[Frame, Stack, int, int, int, int, int],
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
        if self._visits < 0 or self._depth == MAX_DEPTH:
            self._visits = -1
            return False
        self._depth += 1
        found = any(self._ways(stack, families, finished, slack))
        self._depth -= 1
        if found:
            self._known[key] = (fails, slack)
        elif self._visits >= 0:
            self._known[key] = (slack, holds)
        return found

    def _ways(
        self,
        stack: tuple[Frame, Stack, int, int, int, int, int],
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
                        moved: Stack = self.push((to, *frame[1:]), rest)
                        yield self._fits(moved, families, finished, slack - extra)
            return
        after = (self._after[at], *frame[1:])
        if t.has_files[t.row[at]]:
            bound = self.push((*after[:4], True), rest)
            for other in self._file_families(int(t.row[at]), families[group], families, finished):
                yield self._fits(bound, _bind(families, group, other), finished, slack)
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
            legal &= costs.sizes.most_gain[t.first[:-1]] <= 1
            slot, joins = t.num_slots[kind] > 1, t.bears[kind]
            found = self._sources[kind] = sorted(
                (int(costs.low_open[c] + slot[c]), c, bool(joins[c]))
                for c in np.flatnonzero(legal).tolist()
            )
        return found


def _bind(families: tuple[int, ...], group: int, family: int) -> tuple[int, ...]:
    if family < 0 or families[group] == family:
        return families
    return (*families[:group], family, *families[group + 1 :])
