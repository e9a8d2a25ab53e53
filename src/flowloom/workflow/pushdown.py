"""The state of a batch of rows being written: what is open, what is finished, what may come next.

Shapes: B rows, V tokens, C classes, D open nodes, N finished nodes, G profiles of families.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.masks import hole_limit, legal_tokens
from flowloom.workflow.passes import NUM_SAID, UNSAID
from flowloom.workflow.tables import OUTSIDE, SIDE, GrammarError

if TYPE_CHECKING:
    from flowloom.workflow.grammar import Grammar

__all__ = ["GrammarError", "State"]


class State:
    """A batch of prefixes. `mask` says what may come, `advance` takes one token per row.

    `done` [B] tells which rows have ended; such a row accepts only <pad>, which changes nothing.
    """

    def __init__(self, grammar: Grammar, batch: int) -> None:
        self.grammar = grammar
        size, deep, none = batch, grammar.budget + 1, grammar.num_classes
        self.done = np.zeros(size, bool)
        self.used = np.zeros(size, np.int32)  # tokens taken
        self.num_roots = np.zeros(size, np.int32)
        self.num_opened = np.zeros(size, np.int32)
        self.num_finished = np.zeros(size, np.int32)
        self.cap_counts = np.zeros((size, len(grammar.cap_of)), np.int32)
        # Slot token awaited: number of matching slots (0: none), and whether it ends a reference.
        self.slots = np.zeros(size, np.int32)
        self.slot_of_ref = np.zeros(size, bool)
        self.depth = np.zeros(size, np.int32)
        self.open_class = np.full((size, deep), none, np.int32)
        self.open_at = np.full((size, deep), OUTSIDE, np.int32)  # position being filled
        self.open_node = np.zeros((size, deep), np.int32)
        # Pixels: most that its picture may have, of the pictures read so far (0: none), of its own
        # sides so far, and the square of its scale so far.
        self.open_limit = np.zeros((size, deep))
        self.open_most = np.zeros((size, deep))
        self.open_side = np.ones((size, deep))
        self.open_sides = np.zeros((size, deep), np.int8)
        self.open_gain = np.ones((size, deep))
        self.open_role = np.zeros((size, deep), np.int32)
        self.open_last = np.full((size, deep), none, np.int32)  # class of the last child
        # Loader that the node goes back to through its first input; until known, its holder's.
        self.open_origin = np.full((size, deep), -1, np.int32)
        # Nodes whose links share a family form a group, named by the lowest one's depth: what binds
        # one binds all, so a pending sibling is never priced in another family.
        self.open_group = np.zeros((size, deep), np.int32)
        self.group_family = np.full((size, deep), -1, np.int32)
        self.open_bound = np.zeros((size, deep), bool)  # whether the node itself has the family
        # Fewest tokens still to come below: in the same group, by profile, and in all others.
        self.open_same = np.zeros((size, deep, grammar.costs.num_profiles), np.int32)
        self.open_rest = np.zeros((size, deep), np.int32)
        self.open_low = np.zeros((size, deep), np.int32)  # the same, one token for each link
        self.done_class = np.full((size, deep), none, np.int32)
        self.done_family = np.full((size, deep), -1, np.int32)
        self.done_origin = np.full((size, deep), -1, np.int32)
        self.done_area = np.zeros((size, deep))
        self.done_role = np.zeros((size, deep), np.int32)
        # What open and finished nodes tell of sampling passes; see `passes`.
        self.said = np.full((size, deep, NUM_SAID), UNSAID, np.int16)
        self.done_told = np.zeros((size, deep, 2), np.int16)
        self._mask: np.ndarray | None = None
        self._recent: np.ndarray | None = None
        self._at: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.done)

    def holes(self) -> tuple[np.ndarray, np.ndarray]:
        """Field index [B] that the next token fills, and the node [B] it belongs to.

        Nodes are numbered in order of opening. Between output nodes the field is ("*", "end") and
        the node 0. A link hole is named by its own field, even if a class token will fill it.
        """
        at = self.place()
        top = np.maximum(self._holder(), 0)
        node = np.where(at == OUTSIDE, 0, self.open_node[np.arange(len(self)), top])
        return self.grammar.tables.field[at], node

    def roles(self) -> np.ndarray:
        """Whether the next token stands below a positive (1) or negative (2) input, or none (0)."""
        above = self.open_role[np.arange(len(self)), np.maximum(self.depth - 1, 0)]
        own = self.grammar.tables.role[self.place()]
        return np.where(own > 0, own, np.where(self.depth > 0, above, 0))

    def forced(self) -> np.ndarray:
        """The only legal token [B] of a row, -1 where there is a choice or the row is done."""
        mask = self.mask()
        return np.where((mask.sum(1) == 1) & ~self.done, mask.argmax(1), -1).astype(np.int32)

    def forced_run(self) -> np.ndarray:
        """What every row must take until its next choice or its end [B, L], -1 behind that.

        L is the longest run, 0 where no row is forced. No row moves.
        """
        state, rows, run = self.select(np.arange(len(self))), np.arange(len(self)), []
        while len(state) and ((only := state.forced()) >= 0).any():
            state, rows = state.select(only >= 0), rows[only >= 0]
            run.append(np.full(len(self), -1, np.int32))
            run[-1][rows] = only[only >= 0]
            state.advance(run[-1][rows])
        return np.stack(run, 1) if run else np.empty((len(self), 0), np.int32)

    def mask(self) -> np.ndarray:
        """Legal next tokens [B, V]; never empty. Computed once per position; do not write to it."""
        if self._mask is None:
            self._mask = legal_tokens(self)
        return self._mask

    def reference_nodes(self) -> np.ndarray:
        """Finished node (its index in order of finishing) behind each reference [B, 8], or -1."""
        if self._recent is None:
            kind = self.grammar.tables.type[self.place()]
            self._recent = np.full((len(self), voc.NUM_REFS), -1, np.int32)
            width = int(self.num_finished.max(initial=0))
            rows = np.flatnonzero((kind < len(self.grammar.tables.types)) & (self.num_finished > 0))
            fed = self.grammar.tables.feeds[kind[rows, None], self.done_class[rows, :width]]
            age = fed[:, ::-1].cumsum(1)[:, ::-1]
            index, node = np.nonzero(fed & (age <= voc.NUM_REFS))
            self._recent[rows[index], age[index, node] - 1] = node
        return self._recent

    def _holder(self) -> np.ndarray:
        """Depth index of the node whose input is being filled; -1 outside."""
        waits_below = (self.slots > 0) & ~self.slot_of_ref
        return self.depth - 1 - waits_below

    def place(self) -> np.ndarray:
        """Position [B] that the next token fills; do not write to it."""
        if self._at is None:
            holder = self._holder()
            at = self.open_at[np.arange(len(self)), np.maximum(holder, 0)]
            self._at = np.where(holder < 0, OUTSIDE, at)
        return self._at

    def advance(self, tokens: np.ndarray) -> None:
        """Take one token per row, in place.

        Args:
            tokens: Token ids [B]; rows that are done take <pad>.

        Raises:
            GrammarError: a token is illegal where it stands; no row has moved.
        """
        tokens = np.asarray(tokens)
        every = np.arange(len(self))
        legal = self.mask()
        inside = (tokens >= 0) & (tokens < legal.shape[1])
        wrong = ~(inside & legal[every, np.where(inside, tokens, 0)])
        if wrong.any():
            self._refuse(int(np.flatnonzero(wrong)[0]), tokens)
        at = self.place()
        nodes = self.reference_nodes()
        rows = np.flatnonzero(~self.done)
        self._mask = self._recent = self._at = None
        self.used[rows] += 1
        took = tokens[rows]
        self.done[rows[took == voc.EOS]] = True
        is_slot = self.slots[rows] > 0
        classes = self.grammar.tables.token_class[took]
        opens = ~is_slot & (classes >= 0)
        fills = ~is_slot & ~opens & (took != voc.EOS)
        filled = rows[fills]
        settled = np.concatenate(
            [
                self._take_slot(rows[is_slot], at[rows[is_slot]], took[is_slot]),
                self._open(rows[opens], classes[opens], at[rows[opens]]),
                self._fill(filled, took[fills], at[filled], nodes[filled]),
            ]
        )
        self._close(settled)

    def select(self, rows: np.ndarray) -> State:
        """A new state with only these rows (indices, or a boolean [B])."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(other, name, value[rows])
        return other

    def _take_slot(self, rows: np.ndarray, at: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        self.grammar.passes.slot(self, rows, tokens)
        is_ref = self.slot_of_ref[rows]
        ends = rows[is_ref]
        self.open_at[ends, self.depth[ends] - 1] = self.grammar.tables.after[at[is_ref]]
        self.slots[rows] = 0
        self.slot_of_ref[rows] = False
        return rows

    def _open(self, rows: np.ndarray, classes: np.ndarray, at: np.ndarray) -> np.ndarray:
        if not len(rows):
            return rows
        g, t, costs, depth = self.grammar, self.grammar.tables, self.grammar.costs, self.depth[rows]
        kind, above = t.type[at], np.maximum(depth - 1, 0)
        shares, sized = t.bears[kind, classes], np.flatnonzero(t.sized[kind, classes])
        limit = np.full(len(rows), costs.pixels)
        limit[sized] = hole_limit(self, rows[sized], at[sized])
        own = t.role[at]
        inherited = np.where(depth > 0, self.open_role[rows, above], 0)
        self._price(rows, above, at, shares)
        self.open_class[rows, depth] = classes
        self.open_at[rows, depth] = t.first[classes]
        self.open_node[rows, depth] = self.num_opened[rows]
        self.open_limit[rows, depth] = limit
        self.open_most[rows, depth] = 0.0
        self.open_side[rows, depth] = 1.0
        self.open_sides[rows, depth] = 0
        self.open_gain[rows, depth] = costs.sizes.fixed_gain[classes]
        self.open_role[rows, depth] = np.where(own > 0, own, inherited)
        self.open_last[rows, depth] = g.num_classes
        self.open_group[rows, depth] = np.where(shares, self.open_group[rows, above], depth)
        self.open_bound[rows, depth] = False
        self.said[rows, depth] = UNSAID
        alone = rows[~shares]
        self.group_family[alone, depth[~shares]] = -1
        self.open_origin[rows, depth] = np.where(shares, self.open_origin[rows, above], -1)
        self.depth[rows] += 1
        self.num_opened[rows] += 1
        self.cap_counts[rows] += g.cap_members[classes]
        matching = np.where(depth > 0, t.num_slots[kind, classes], 1)
        self.slots[rows] = np.where(matching > 1, matching, 0)
        return rows[self.slots[rows] == 0]

    def _price(
        self, rows: np.ndarray, above: np.ndarray, at: np.ndarray, shares: np.ndarray
    ) -> None:
        """Costs below a node that opens in position `at` of the node at depth index `above`."""
        costs, depth = self.grammar.costs, self.depth[rows]
        same = self.open_same[rows, above] + costs.suffix[self.grammar.tables.after[at]]
        other = same[:, 0]
        if costs.num_profiles > 1:
            family = self.group_family[rows, self.open_group[rows, above]]
            profile = costs.profile[np.maximum(family, 0)][:, None]
            bound = np.take_along_axis(same, profile, 1)[:, 0]
            other = np.where(family >= 0, bound, same.min(1))
        # Outside a node nothing is open, and position 0 costs nothing.
        inner = depth > 0
        self.open_same[rows, depth] = same * (shares & inner)[:, None]
        low = self.open_low[rows, above] + costs.low[self.grammar.tables.after[at]]
        self.open_low[rows, depth] = low * inner
        rest = self.open_rest[rows, above] + np.where(shares, 0, other)
        self.open_rest[rows, depth] = rest * inner

    def _fill(
        self, rows: np.ndarray, tokens: np.ndarray, at: np.ndarray, nodes: np.ndarray
    ) -> np.ndarray:
        """Fill the present hole by a value, file, text, absence, reference or the end of inputs."""
        if not len(rows):
            return rows
        t, costs, top = self.grammar.tables, self.grammar.costs, self.depth[rows] - 1
        passes = self.grammar.passes
        passes.say(self, rows, top, at, tokens)
        group = self.open_group[rows, top]
        bound = t.token_family[tokens]
        origin = np.where(bound >= 0, self.open_node[rows, top], -1)
        after = t.after[at]

        refs = np.flatnonzero((tokens >= voc.REF0) & (tokens < voc.REF0 + voc.NUM_REFS))
        if len(refs):
            r, kind = rows[refs], t.type[at[refs]]
            node = nodes[refs, tokens[refs] - voc.REF0]
            classes = self.done_class[r, node]
            self.open_last[r, top[refs]] = classes
            self._read_area(r, top[refs], t.sized[kind, classes], self.done_area[r, node])
            passes.read(self, r, top[refs], at[refs], self.done_told[r, node], False)
            family = np.where(t.bears[kind, classes], self.done_family[r, node], -1)
            bound = bound.copy()
            bound[refs], origin[refs] = family, self.done_origin[r, node]
            matching = t.num_slots[kind, classes]
            self.slots[r] = np.where(matching > 1, matching, 0)
            self.slot_of_ref[r] = matching > 1

        sized = np.flatnonzero((t.size[at] > 0) & (tokens != voc.NONE_ID))
        if len(sized):
            r, place, value = rows[sized], top[sized], costs.sizes.of_token[tokens[sized]]
            is_side = t.size[at[sized]] == SIDE
            self.open_side[r, place] *= np.where(is_side, value, 1.0)
            self.open_sides[r, place] += is_side
            self.open_gain[r, place] *= np.where(is_side, 1.0, value**2)

        ends = np.flatnonzero(tokens == voc.END)
        after[ends] = t.stop[at[ends]]
        chosen = np.flatnonzero(t.choice[at] >= 0)
        after[chosen] = t.branch[t.choice[at[chosen]], tokens[chosen]]

        binds = np.flatnonzero(bound >= 0)
        self.group_family[rows[binds], group[binds]] = bound[binds]
        self.open_bound[rows[binds], top[binds]] = True
        self._trace(rows, top, origin)
        settled = self.slots[rows] == 0
        self.open_at[rows[settled], top[settled]] = after[settled]
        return rows[settled]

    def _read_area(
        self, rows: np.ndarray, top: np.ndarray, sized: np.ndarray, area: np.ndarray
    ) -> None:
        before = self.open_most[rows, top]
        self.open_most[rows, top] = np.where(sized, np.maximum(before, area), before)

    def _trace(self, rows: np.ndarray, top: np.ndarray, origin: np.ndarray) -> None:
        """Take over the origin of what fills a hole, if it is the first hole to tell one."""
        first = self.grammar.tables.first[self.open_class[rows, top]]
        news = (self.open_at[rows, top] == first) | (self.open_origin[rows, top] < 0)
        told = np.flatnonzero(news & (origin >= 0))
        self.open_origin[rows[told], top[told]] = origin[told]

    def _close(self, rows: np.ndarray) -> None:
        """Finish every node that has no input left, and fill the hole it was opened for."""
        t = self.grammar.tables
        while len(rows):
            rows = rows[self.depth[rows] > 0]
            top = self.depth[rows] - 1
            full = self.open_at[rows, top] == OUTSIDE
            rows, top = rows[full], top[full]
            if not len(rows):
                return
            classes, index = self.open_class[rows, top], self.num_finished[rows]
            group, bound = self.open_group[rows, top], self.open_bound[rows, top]
            area = self._area(rows, top, classes)
            told = self.grammar.passes.finish(self, rows, top, classes)
            self.done_class[rows, index] = classes
            self.done_family[rows, index] = np.where(bound, self.group_family[rows, group], -1)
            self.done_origin[rows, index] = self.open_origin[rows, top]
            self.done_area[rows, index] = area
            self.done_told[rows, index] = told
            self.done_role[rows, index] = self.open_role[rows, top]
            self.num_finished[rows] += 1
            self.open_class[rows, top] = self.grammar.num_classes
            self.depth[rows] -= 1

            inner = top > 0
            self.num_roots[rows[~inner]] += 1
            rows, below, classes = rows[inner], top[inner] - 1, classes[inner]
            self._trace(rows, below, self.open_origin[rows, below + 1])
            at = self.open_at[rows, below]
            kind = t.type[at]
            self._read_area(rows, below, t.sized[kind, classes], area[inner])
            self.grammar.passes.read(self, rows, below, at, told[inner], True)
            self.open_bound[rows, below] |= bound[inner] & t.bears[kind, classes]
            self.open_last[rows, below] = classes
            self.open_at[rows, below] = t.after[at]

    def _area(self, rows: np.ndarray, top: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Pixels of the picture of a node whose inputs are all filled."""
        costs, most = self.grammar.costs, self.open_most[rows, top]
        side = np.where(self.open_sides[rows, top] == 2, self.open_side[rows, top], 0.0)
        area = np.where(costs.sizes.resets[classes] | (most == 0), side, most)
        area = np.where(costs.sizes.may_reset[classes], np.maximum(most, side), area)
        return area * self.open_gain[rows, top]

    def _refuse(self, row: int, tokens: np.ndarray) -> None:
        g, token = self.grammar, int(tokens[row])
        field = g.vocabulary.fields[int(self.holes()[0][row])]
        known = 0 <= token < g.vocabulary.size
        legal = [g.vocabulary.token_text(i) for i in np.flatnonzero(self.mask()[row]).tolist()]
        raise GrammarError(
            f"row {row}, token {int(self.used[row])}, {'.'.join(field)}: got "
            f"{g.vocabulary.token_text(token) if known else token}, "
            f"expected one of {len(legal)}: {', '.join(legal)[:120]}"
        )
