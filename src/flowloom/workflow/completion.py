"""Whether open nodes can be completed within a number of tokens, references counted on.

`costs` prices completions that count on no reference; near the budget that is too dear, and this
search decides. It walks the open holes in the order in which they are written. A hole that a value,
a file of any family, <none> or <end> can fill takes that: nothing is cheaper, and a node that is
wanted later can as well be opened later. A link takes a reference or opens a node.

Slack is how many tokens are left beyond one for each open hole, so only what costs more than one
token spends it, and a walk ends where it is spent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.costs import NEVER, Costs
from flowloom.workflow.tables import OUTSIDE, Tables

MAX_VISITS = 2000
"""Holes that one question may look at before its answer is no."""
_MAX_KNOWN = 200_000
ANY = -1  # no family


class Frame(NamedTuple):
    """An open node: position of its next hole, what it is, and what it shares a family with."""

    at: int
    class_index: int
    group: int
    """Index of its group of nodes that share a family."""
    joins: bool
    """Whether it is in the group of the node that holds it."""
    bound: bool
    """Whether something in it has a family."""


Stack = tuple[Frame, "Stack"] | None  # the top first


class Finished:
    """Finished nodes, as a list that shares its beginning with others."""

    __slots__ = ("_next", "_options", "_tables", "before", "class_index", "family")

    def __init__(
        self,
        tables: Tables,
        before: Finished | None = None,
        class_index: int = -1,
        family: int = -1,
    ) -> None:
        self._tables, self.before = tables, before
        self.class_index, self.family = class_index, family
        self._next: dict[tuple[int, int], Finished] = {}
        self._options: dict[int, tuple[tuple[int, int], ...]] = {}

    def then(self, class_index: int, family: int) -> Finished:
        """This list and one more node."""
        key = (class_index, family)
        found = self._next.get(key)
        if found is None:
            found = self._next[key] = Finished(self._tables, self, class_index, family)
        return found

    def options(self, kind: int) -> tuple[tuple[int, int], ...]:
        """References for links of a type, latest first: tokens of the slot, family that binds."""
        if self.before is None:
            return ()
        found = self._options.get(kind)
        if found is None:
            t, c = self._tables, self.class_index
            found = self.before.options(kind)
            if t.feeds[kind, c]:
                slots = t.num_slots[kind, c]
                # Too many slots to name one: never taken, but it counts.
                extra = NEVER if slots == 0 else int(slots > 1)
                family = self.family if t.bears[kind, c] else ANY
                found = ((extra, family), *found[: voc.NUM_REFS - 1])
            self._options[kind] = found
        return found


class Completions:
    """Answers for one grammar; what was found is kept."""

    def __init__(self, tables: Tables, costs: Costs) -> None:
        self.tables, self.costs = tables, costs
        self.nothing = Finished(tables)
        self._steps: dict[int, int] = {}
        self._sources: dict[int, list[tuple[int, int]]] = {}
        self._known: dict[tuple, tuple[int, int]] = {}
        self._visits = 0

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
            if slack < 0:
                return False
            frame, rest = stack
            at = self._next_hole(frame.at)
            if at != OUTSIDE:
                return self._fill((frame._replace(at=at), rest), families, finished, slack)
            family = families[frame.group] if frame.bound else ANY
            finished = finished.then(frame.class_index, family)
            if rest is not None and frame.bound and frame.joins:
                rest = (rest[0]._replace(bound=True), rest[1])
            stack = rest
        return slack >= 0

    def _next_hole(self, at: int) -> int:
        """The first position from `at` on whose filling needs a thought."""
        found = self._steps.get(at)
        if found is None:
            t, found = self.tables, at
            while found != OUTSIDE:
                row = t.row[found]
                if t.allowed[row, voc.END]:
                    found = int(t.stop[found])
                elif t.allowed[row, voc.NONE_ID] or (t.choice[found] < 0 and self.costs.plain[row]):
                    found = int(t.after[found])
                else:
                    break
            self._steps[at] = found
        return found

    def _fill(
        self,
        stack: tuple[Frame, Stack],
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
        stack: tuple[Frame, Stack],
        families: tuple[int, ...],
        finished: Finished,
        slack: int,
    ) -> Iterator[bool]:
        """Try to fill the next hole in one way after another."""
        t, costs = self.tables, self.costs
        frame, rest = stack
        at = frame.at
        row = t.row[at]
        if t.choice[at] >= 0:
            for token in t.schema.program[at].branches:
                if t.allowed[row, token]:
                    to = int(t.branch[t.choice[at], token])
                    extra = int(1 + costs.low[to] - costs.low[at])
                    if extra <= slack:
                        moved = (frame._replace(at=to), rest)
                        yield self._fits(moved, families, finished, slack - extra)
            return
        after = frame._replace(at=int(t.after[at]))
        family = families[frame.group]
        for other in self._file_families(row, family, families, finished):
            bound = _bind(families, frame.group, other)
            yield self._fits((after._replace(bound=True), rest), bound, finished, slack)
        if t.type[at] < len(t.types):
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
        t, costs = self.tables, self.costs
        kind, family = int(t.type[frame.at]), families[frame.group]
        options = dict.fromkeys(finished.options(kind))
        for extra, bearer in sorted(options):
            if extra > slack or (bearer >= 0 and family >= 0 and bearer != family):
                continue
            bound = after._replace(bound=frame.bound or bearer >= 0)
            yield self._fits(
                (bound, rest), _bind(families, frame.group, bearer), finished, slack - extra
            )
            if extra == 0 and (bearer < 0 or frame.bound):
                return  # no way is better
        for extra, c in self._sources_of(kind):
            if extra > slack:
                break
            # Without a reference to what it gives, a node that needs the same comes too late.
            if not options and kind in self._needs(c):
                continue
            joins = bool(t.bears[kind, c])
            if joins and family >= 0 and costs.open_cost[c, costs.profile[family]] >= NEVER:
                continue
            group, groups = (frame.group, families) if joins else (len(families), (*families, ANY))
            opened = Frame(int(t.first[c]), c, group, joins, False)
            yield self._fits((opened, (after, rest)), groups, finished, slack - extra)

    def _sources_of(self, kind: int) -> list[tuple[int, int]]:
        """Classes for links of a type: tokens beyond the class's own one, class."""
        found = self._sources.get(kind)
        if found is None:
            t, costs = self.tables, self.costs
            legal = costs.legal[kind] & (costs.open_cost.min(1) < NEVER)
            legal &= costs.most_gain[t.first[:-1]] <= 1
            found = self._sources[kind] = sorted(
                (int(costs.low[t.first[c]] + (t.num_slots[kind, c] > 1)), c)
                for c in np.flatnonzero(legal).tolist()
            )
        return found

    def _needs(self, c: int) -> set[int]:
        """Types of links that a class needs before its first choice."""
        t, found = self.tables, set()
        at = self._next_hole(int(t.first[c]))
        while at != OUTSIDE and t.choice[at] < 0:
            if not t.has_files[t.row[at]]:
                found.add(int(t.type[at]))
            at = self._next_hole(int(t.after[at]))
        return found


def _bind(families: tuple[int, ...], group: int, family: int) -> tuple[int, ...]:
    if family < 0 or families[group] == family:
        return families
    return (*families[:group], family, *families[group + 1 :])
