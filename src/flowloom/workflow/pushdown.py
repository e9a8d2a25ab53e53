"""The state of a batch of rows being written: what is open, what is finished, what may come next.

Shapes: B rows, V tokens, C classes, D open nodes, N finished nodes, F families, T link types.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

from flowloom.workflow import vocabulary as voc

if TYPE_CHECKING:
    from flowloom.workflow.grammar import Grammar


class GrammarError(ValueError):
    """A grammar cannot be built, or an illegal token was taken; says what, got, expected."""


class State:
    """A batch of prefixes. `mask` says what may come, `advance` takes one token per row.

    `done` [B] tells which rows have ended; such a row accepts only <pad>, which changes nothing.
    """

    def __init__(self, grammar: Grammar, batch: int) -> None:
        self.grammar = grammar
        size, deep = batch, grammar.budget + 1
        none, types = grammar.num_classes, len(grammar.types)
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
        self.open_at = np.zeros((size, deep), np.int32)  # input being filled
        self.open_node = np.zeros((size, deep), np.int32)
        self.open_limit = np.zeros((size, deep))  # most pixels of its picture
        self.open_area = np.ones((size, deep))  # pixels so far
        self.open_role = np.zeros((size, deep), np.int32)
        self.open_last = np.full((size, deep), none, np.int32)  # class of the last child
        # Loader that the node goes back to through its first input; until known, its holder's.
        self.open_origin = np.full((size, deep), -1, np.int32)
        # Nodes whose links share a family form a group, named by the lowest one's depth: what binds
        # one binds all, so a pending sibling is never priced in another family.
        self.open_group = np.zeros((size, deep), np.int32)
        self.group_family = np.full((size, deep), -1, np.int32)
        self.done_class = np.full((size, deep), none, np.int32)
        self.done_family = np.full((size, deep), -1, np.int32)
        self.done_origin = np.full((size, deep), -1, np.int32)
        self.done_area = np.zeros((size, deep))
        self.done_role = np.zeros((size, deep), np.int32)
        # Finished nodes by type, most recent first; -1 is none.
        self.recent = np.full((size, types + 1, voc.NUM_REFS), -1, np.int32)
        self._mask: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.done)

    # -- questions -------------------------------------------------------------------------------

    def holes(self) -> tuple[np.ndarray, np.ndarray]:
        """Field index [B] that the next token fills, and the node [B] it belongs to.

        Nodes are numbered in order of opening. Between output nodes the field is ("*", "end") and
        the node 0. A link hole is named by its own field, even if a class token will fill it.
        """
        rows = np.arange(len(self))
        top = self._holder()
        field = self.grammar.class_field[self.open_class[rows, top], self.open_at[rows, top]]
        outside = (self.depth == 0) | (top < 0)
        return (
            np.where(outside, voc.END_FIELD, field).astype(np.int32),
            np.where(outside, 0, self.open_node[rows, top]).astype(np.int32),
        )

    def roles(self) -> np.ndarray:
        """Whether the next token stands below a positive (1) or negative (2) input, or none (0)."""
        rows = np.arange(len(self))
        field, _ = self.holes()
        above = np.where(self.depth > 0, self.open_role[rows, self.depth - 1], 0)
        own = self.grammar.field_role[field]
        return np.where(own > 0, own, above)

    def forced(self) -> np.ndarray:
        """The only legal token [B] of a row, -1 where there is a choice or the row is done."""
        mask = self.mask()
        return np.where((mask.sum(1) == 1) & ~self.done, mask.argmax(1), -1).astype(np.int32)

    def mask(self) -> np.ndarray:
        """Legal next tokens [B, V]; never empty. Computed once per position; do not write to it."""
        if self._mask is None:
            self._mask = self._legal()
        return self._mask

    def reference_nodes(self) -> np.ndarray:
        """Finished node (its index in order of finishing) behind each reference [B, 8], or -1."""
        field, _ = self.holes()
        return self.recent[np.arange(len(self)), self.grammar.field_type[field]]

    def _holder(self) -> np.ndarray:
        """Depth index of the node whose input is being filled; -1 outside."""
        waits_below = (self.slots > 0) & ~self.slot_of_ref
        return self.depth - 1 - waits_below

    def _legal(self) -> np.ndarray:
        g, rows = self.grammar, np.arange(len(self))
        field, _ = self.holes()
        mask = g.static[field]
        top = self.depth - 1
        group = self.open_group[rows, top]
        family = np.where(g.field_bears[field], self.group_family[rows, group], -1)
        family[self.depth == 0] = -1
        left = g.budget - self.used - 1
        # room[b, f]: tokens left for what this token opens in family f, where everything that is
        # still unbound is of family f too; beside a bound hole the unbound may be of any.
        room = left[:, None] - self._pending()
        if len(g.families) > 1:
            bound = np.flatnonzero(family >= 0)
            best = room[bound].max(1)
            room[bound] = -1
            room[bound, family[bound]] = best

        links = np.flatnonzero((g.field_type[field] >= 0) | (self.depth == 0))
        self._restrict_links(mask, links, field, family, room)
        files = mask[:, g.file_ids]
        if files.any():
            wanted = g.token_family[g.file_ids]
            fits = np.where(wanted >= 0, room[:, wanted] >= 0, room.max(1)[:, None] >= 0)
            mask[:, g.file_ids] = files & fits
        sized = np.flatnonzero(g.size_field[field])
        if len(sized):
            self._restrict_sizes(mask, sized, field[sized])

        ended = np.flatnonzero((self.depth == 0) & (self.num_roots > 0))
        if len(ended):
            full = ended[self.num_roots[ended] >= g.max_outputs]
            mask[full] = False
            mask[ended, voc.EOS] = True
        waiting = np.flatnonzero(self.slots > 0)
        if len(waiting):
            mask[waiting] = False
            slots = np.arange(voc.NUM_SLOTS) < self.slots[waiting, None]
            mask[waiting, voc.SLOT0 : voc.SLOT0 + voc.NUM_SLOTS] = slots
        mask[self.done] = False
        mask[self.done, voc.PAD] = True
        assert mask.any(1).all(), "dead end"
        return mask

    def _pending(self) -> np.ndarray:
        """Fewest tokens [B, F] that fill every hole but the present one, <eos> included."""
        g, deep = self.grammar, max(int(self.depth.max(initial=0)), 1)
        at = (self.open_class[:, :deep], self.open_at[:, :deep] + 1)
        rest = g.suffix[at]
        if len(g.families) > 1:
            bound = np.take_along_axis(self.group_family, self.open_group[:, :deep], 1)
            own = np.take_along_axis(rest, np.maximum(bound, 0)[..., None], 2)
            rest = np.where(bound[..., None] >= 0, own, rest)
        return rest.sum(1) + g.suffix_free[at].sum(1) + 1

    def _hole_limit(self, rows: np.ndarray, field: np.ndarray) -> np.ndarray:
        """Most pixels that a picture filling `field` of the top node may have."""
        bound = float(self.grammar.catalogue.limits.pixels)
        depth = self.depth[rows]
        above = np.where(depth > 0, self.open_limit[rows, depth - 1], bound)
        sized = (depth == 0) | self.grammar.field_sized[field]
        return np.where(sized, np.minimum(bound, above / self.grammar.shrink[field]), bound)

    def _restrict_links(
        self,
        mask: np.ndarray,
        rows: np.ndarray,
        field: np.ndarray,
        family: np.ndarray,
        room: np.ndarray,
    ) -> None:
        g = self.grammar
        field, family, room = field[rows], family[rows], room[rows]
        kind = g.field_type[field]
        limit = self._hole_limit(rows, field)
        # A node opened in the unbound family f must fit that family's room.
        need = g.class_cost[kind]
        classes = (
            (need <= room[:, None, :]).any(2) if need.shape[2] > 1 else (need[:, :, 0] <= room)
        )
        small = g.min_area[None, :] <= limit[:, None]
        classes &= small | ~g.field_sized[field][:, None]
        classes &= mask[np.ix_(rows, g.class_ids)]

        nodes = self.recent[rows, kind]
        found = nodes >= 0
        at = (rows[:, None], nodes)
        fam = np.where(g.field_bears[field][:, None], self.done_family[at], -1)
        slot = g.num_matching[self.done_class[at], kind[:, None]] > 1
        free = np.where(
            fam >= 0, np.take_along_axis(room, np.maximum(fam, 0), 1), room.max(1)[:, None]
        )
        refs = found & (free >= slot)
        refs &= (fam < 0) | (family[:, None] < 0) | (fam == family[:, None])
        refs &= (self.done_area[at] <= limit[:, None]) | ~g.field_sized[field][:, None]
        refs &= (self.depth[rows] > 0)[:, None]

        # Caps and reuse of loaders give way where nothing else could fill the hole.
        any_ref = refs.any(1)
        over = ((self.cap_counts[rows] >= g.cap_of) @ g.cap_members.T) > 0
        kept = classes & ~over & ~(g.reuse[kind] & any_ref[:, None])
        stuck = ~(kept.any(1) | any_ref | mask[rows, voc.NONE_ID])
        kept[stuck] = classes[stuck]
        mask[np.ix_(rows, g.class_ids)] = kept
        mask[rows, voc.REF0 : voc.REF0 + voc.NUM_REFS] = refs

    def _restrict_sizes(self, mask: np.ndarray, rows: np.ndarray, field: np.ndarray) -> None:
        g, top = self.grammar, self.depth[rows] - 1
        value = g.token_number[g.size_columns]
        area = np.where(g.first_side[field], 1.0, self.open_area[rows, top])
        limit = self.open_limit[rows, top]
        scale = g.field_size[field] == "scale"
        gain = np.where(scale[:, None], value**2, value * g.least_side[field][:, None])
        fits = area[:, None] * gain <= limit[:, None]
        mask[np.ix_(rows, g.size_columns)] &= fits

    # -- moves -----------------------------------------------------------------------------------

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
        field, _ = self.holes()
        rows = np.flatnonzero(~self.done)
        self._mask = None
        self.used[rows] += 1
        took = tokens[rows]
        self.done[rows[took == voc.EOS]] = True
        is_slot = self.slots[rows] > 0
        classes = self.grammar.token_class[took]
        opens = ~is_slot & (classes >= 0)
        fills = ~is_slot & ~opens & (took != voc.EOS)
        settled = np.concatenate(
            [
                self._take_slot(rows[is_slot]),
                self._open(rows[opens], classes[opens], field[rows[opens]]),
                self._fill(rows[fills], took[fills], field[rows[fills]]),
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

    def _take_slot(self, rows: np.ndarray) -> np.ndarray:
        ends = rows[self.slot_of_ref[rows]]
        self.open_at[ends, self.depth[ends] - 1] += 1
        self.slots[rows] = 0
        self.slot_of_ref[rows] = False
        return rows

    def _open(self, rows: np.ndarray, classes: np.ndarray, field: np.ndarray) -> np.ndarray:
        if not len(rows):
            return rows
        g, depth = self.grammar, self.depth[rows]
        limit = self._hole_limit(rows, field)
        above = np.maximum(depth - 1, 0)
        shares = (depth > 0) & g.field_bears[field]
        own = g.field_role[field]
        inherited = np.where(depth > 0, self.open_role[rows, above], 0)
        self.open_class[rows, depth] = classes
        self.open_at[rows, depth] = 0
        self.open_node[rows, depth] = self.num_opened[rows]
        self.open_limit[rows, depth] = limit
        self.open_area[rows, depth] = 1.0
        self.open_role[rows, depth] = np.where(own > 0, own, inherited)
        self.open_last[rows, depth] = g.num_classes
        self.open_group[rows, depth] = np.where(shares, self.open_group[rows, above], depth)
        alone = rows[~shares]
        self.group_family[alone, depth[~shares]] = -1
        self.open_origin[rows, depth] = np.where(shares, self.open_origin[rows, above], -1)
        self.depth[rows] += 1
        self.num_opened[rows] += 1
        self.cap_counts[rows] += g.cap_members[classes]
        matching = np.where(depth > 0, g.num_matching[classes, g.field_type[field]], 1)
        self.slots[rows] = np.where(matching > 1, matching, 0)
        return rows[self.slots[rows] == 0]

    def _fill(self, rows: np.ndarray, tokens: np.ndarray, field: np.ndarray) -> np.ndarray:
        """Fill the present hole by a value, file, text, absence or reference."""
        if not len(rows):
            return rows
        g, top = self.grammar, self.depth[rows] - 1
        group = self.open_group[rows, top]
        bound = g.token_family[tokens]
        origin = np.where(bound >= 0, self.open_node[rows, top], -1)

        is_ref = (tokens >= voc.REF0) & (tokens < voc.REF0 + voc.NUM_REFS)
        refs = np.flatnonzero(is_ref)
        if len(refs):
            r, t = rows[refs], g.field_type[field[refs]]
            node = self.recent[r, t, tokens[refs] - voc.REF0]
            classes = self.done_class[r, node]
            self.open_last[r, top[refs]] = classes
            area = np.maximum(self.open_area[r, top[refs]], self.done_area[r, node])
            self.open_area[r, top[refs]] = np.where(
                g.field_sized[field[refs]], area, self.open_area[r, top[refs]]
            )
            family = np.where(g.field_bears[field[refs]], self.done_family[r, node], -1)
            bound = bound.copy()
            bound[refs], origin[refs] = family, self.done_origin[r, node]
            matching = g.num_matching[classes, t]
            self.slots[r] = np.where(matching > 1, matching, 0)
            self.slot_of_ref[r] = matching > 1

        sized = np.flatnonzero(g.size_field[field])
        if len(sized):
            value = g.token_number[tokens[sized]]
            gain = np.where(g.field_size[field[sized]] == "scale", value**2, value)
            before = self.open_area[rows[sized], top[sized]]
            before = np.where(g.first_side[field[sized]], 1.0, before)
            self.open_area[rows[sized], top[sized]] = before * gain

        binds = np.flatnonzero((bound >= 0) & (self.group_family[rows, group] < 0))
        self.group_family[rows[binds], group[binds]] = bound[binds]
        self._trace(rows, top, origin)
        settled = self.slots[rows] == 0
        self.open_at[rows[settled], top[settled]] += 1
        return rows[settled]

    def _trace(self, rows: np.ndarray, top: np.ndarray, origin: np.ndarray) -> None:
        """Take over the origin of what fills a hole, if it is the first hole to tell one."""
        news = (self.open_at[rows, top] == 0) | (self.open_origin[rows, top] < 0)
        told = np.flatnonzero(news & (origin >= 0))
        self.open_origin[rows[told], top[told]] = origin[told]

    def _close(self, rows: np.ndarray) -> None:
        """Finish every node that has no input left, and fill the hole it was opened for."""
        g = self.grammar
        while len(rows):
            rows = rows[self.depth[rows] > 0]
            top = self.depth[rows] - 1
            classes = self.open_class[rows, top]
            full = self.open_at[rows, top] >= g.num_inputs[classes]
            rows, top, classes = rows[full], top[full], classes[full]
            if not len(rows):
                return
            index, group = self.num_finished[rows], self.open_group[rows, top]
            area = self.open_area[rows, top]
            self.done_class[rows, index] = classes
            self.done_family[rows, index] = self.group_family[rows, group]
            self.done_origin[rows, index] = self.open_origin[rows, top]
            self.done_area[rows, index] = area
            self.done_role[rows, index] = self.open_role[rows, top]
            self.num_finished[rows] += 1
            feeds = np.zeros((len(rows), self.recent.shape[1]), bool)
            feeds[:, :-1] = g.num_matching[classes] > 0
            recent = self.recent[rows]
            shifted = np.concatenate(
                [np.broadcast_to(index[:, None, None], (*recent.shape[:2], 1)), recent[:, :, :-1]],
                2,
            )
            self.recent[rows] = np.where(feeds[:, :, None], shifted, recent)
            self.open_class[rows, top] = g.num_classes
            self.open_at[rows, top] = 0
            self.depth[rows] -= 1

            inner = top > 0
            self.num_roots[rows[~inner]] += 1
            rows, below, classes, area = rows[inner], top[inner] - 1, classes[inner], area[inner]
            self._trace(rows, below, self.open_origin[rows, below + 1])
            field = g.class_field[self.open_class[rows, below], self.open_at[rows, below]]
            before = self.open_area[rows, below]
            grown = np.where(g.field_sized[field], np.maximum(before, area), before)
            self.open_area[rows, below] = grown
            self.open_last[rows, below] = classes
            self.open_at[rows, below] += 1

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
