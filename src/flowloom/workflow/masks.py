"""Which tokens are legal next, for a batch of rows at once.

A token is legal where its type, family and size fit and everything open can still be completed. The
canonical completion of `costs` decides that for nearly all tokens; the rest, near the budget, are
left to the search of `completion`.

Shapes: B rows, n of them, V tokens, C classes, F families, G profiles of families.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.completion import MAX_VISITS, Stack
from flowloom.workflow.costs import NEVER
from flowloom.workflow.tables import OUTSIDE, SIDE

if TYPE_CHECKING:
    from flowloom.workflow.pushdown import State

_REFS = slice(voc.REF0, voc.REF0 + voc.NUM_REFS)
_SLOTS = slice(voc.SLOT0, voc.SLOT0 + voc.NUM_SLOTS)


def legal_tokens(state: State) -> np.ndarray:
    """Legal next tokens [B, V] of a state; no row is empty."""
    return _Mask(state).legal()


def hole_limit(state: State, rows: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Most pixels of a picture that fills position `at` of the top node."""
    costs, depth = state.grammar.costs, state.depth[rows]
    top = np.maximum(depth - 1, 0)
    gain = state.open_gain[rows, top] * costs.sizes.least_gain[at]
    free = (depth == 0) | costs.sizes.resets[state.open_class[rows, top]]
    limit = np.minimum(costs.pixels, state.open_limit[rows, top] / gain)
    return np.where(free, costs.pixels, limit)


class _Mask:
    """The mask of one state, and what goes into it."""

    def __init__(self, state: State) -> None:
        g = state.grammar
        self.state, self.g, self.t, self.costs = state, g, g.tables, g.costs
        self.at = state.place()
        self.row = self.t.row[self.at]
        self.mask = self.t.allowed[self.row]
        rows = np.arange(len(state))
        self.top = np.maximum(state.depth - 1, 0)
        family = state.group_family[rows, state.open_group[rows, self.top]]
        self.family = np.where(self.at == OUTSIDE, -1, family)
        # Tokens left once the next one is taken and <eos> counted: `room` [B, G] for what fills the
        # present hole, by profile, everything else being completed canonically; negative where the
        # hole cannot have the family. `slack` [B]: everything else taking one token for each link.
        left = g.budget - state.used - 2
        pending = state.open_same[rows, self.top] + self.costs.suffix[self.t.after[self.at]]
        self.viable = pending < NEVER
        self.room = (left - state.open_rest[rows, self.top])[:, None] - pending
        self.slack = left - state.open_low[rows, self.top] - self.costs.low[self.t.after[self.at]]
        bound = np.flatnonzero(self.family >= 0)
        if len(bound) and self.costs.num_profiles > 1:
            profile = self.costs.profile[self.family[bound]]
            best, viable = self.room[bound, profile], self.viable[bound, profile]
            self.room[bound], self.viable[bound] = -1, False
            self.room[bound, profile], self.viable[bound, profile] = best, viable
        # Tokens (row, token, slack) for the search to decide.
        self.doubts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def legal(self) -> np.ndarray:
        """Fill the mask."""
        state, t, mask = self.state, self.t, self.mask
        live = ~state.done & (state.slots == 0)
        for rows, restrict in (
            (t.has_files[self.row], self._files),
            (t.choice[self.at] >= 0, self._choices),
            (t.size[self.at] > 0, self._sizes),
        ):
            rows = np.flatnonzero(rows & live)
            if len(rows):
                restrict(rows)
        linked = np.flatnonzero(((t.type[self.at] < len(t.types)) | (self.at == OUTSIDE)) & live)
        if len(linked):
            self._classes(linked)
            self._references(linked)
        if self.doubts:
            self._decide()
        if len(linked) and self.g.taste:
            self._prefer(linked)
        self._outside()
        if self.g.taste:
            self.g.passes.prefer(state, self.at, mask, self.room)
        assert mask.any(1).all(), "dead end"
        return mask

    def _outside(self) -> None:
        """Rows between output nodes, rows that wait for a slot, and rows that are done."""
        state, mask = self.state, self.mask
        ended = np.flatnonzero((state.depth == 0) & (state.num_roots > 0))
        if len(ended):
            mask[ended[state.num_roots[ended] >= self.g.max_outputs]] = False
            mask[ended, voc.EOS] = True
        waiting = np.flatnonzero(state.slots > 0)
        if len(waiting):
            mask[waiting] = False
            mask[waiting, _SLOTS] = np.arange(voc.NUM_SLOTS) < state.slots[waiting, None]
        done = np.flatnonzero(state.done)
        mask[done] = False
        mask[done, voc.PAD] = True

    def _doubt(self, rows: np.ndarray, tokens: np.ndarray, slack: np.ndarray) -> None:
        kept = slack >= 0
        if kept.any():
            self.doubts.append((rows[kept], tokens[kept], slack[kept]))

    def _files(self, rows: np.ndarray) -> None:
        t, room, family = self.t, self.room[rows], self.family[rows]
        profile, files = self.costs.profile, t.token_family[t.file_ids]
        shape = (len(rows), len(t.families) + 1)
        # The last column is for files that fit any family.
        fits, viable = np.ones(shape, bool), np.ones(shape, bool)
        same = (family[:, None] < 0) | (np.arange(len(t.families)) == family[:, None])
        fits[:, :-1] = (room >= 0)[:, profile] & same
        fits[:, -1] = room.max(1) >= 0
        viable[:, :-1] = self.viable[rows][:, profile] & same
        columns = np.ix_(rows, t.file_ids)
        legal = self.mask[columns]
        if (room.max(1) < 0).any() or (viable & ~fits).any():
            open_rows, index = np.nonzero(legal & (viable & ~fits)[:, files])
            self._doubt(rows[open_rows], t.file_ids[index], self.slack[rows[open_rows]])
        self.mask[columns] = legal & fits[:, files]

    def _choices(self, rows: np.ndarray) -> None:
        """Options whose inputs have room; `room` counts on the hole being absent instead."""
        t, costs, at = self.t, self.costs, self.at[rows]
        tokens = t.option_tokens[t.choice[at]]
        to = t.branch[t.choice[at][:, None], tokens]
        more = costs.suffix[to] - costs.suffix[t.after[at]][:, None]
        limit = hole_limit(self.state, rows, at)
        legal = self.mask[rows[:, None], tokens] & (costs.path_area[to] <= limit[:, None])
        fits = np.any((more <= self.room[rows][:, None]) & self.viable[rows][:, None], axis=2)
        reach = np.any((costs.suffix[to] < NEVER) & self.viable[rows][:, None], axis=2)
        open_rows, index = np.nonzero(legal & reach & ~fits)
        if len(open_rows):
            r, k = rows[open_rows], (open_rows, index)
            slack = self.slack[r] + costs.low[t.after[at[open_rows]]] - costs.low[to[k]]
            self._doubt(r, tokens[k], slack)
        self.mask[rows[:, None], tokens] = legal & fits

    def _classes(self, rows: np.ndarray) -> None:
        t, costs, at = self.t, self.costs, self.at[rows]
        kind, room, viable = t.type[at], self.room[rows], self.viable[rows]
        columns = np.ix_(rows, t.class_ids)
        legal = self.mask[columns]
        limit = hole_limit(self.state, rows, at)
        if limit.min() < costs.most_area:
            legal &= (costs.area[None, :] <= limit[:, None]) | ~t.sized[kind, :-1]
        # Where all viable families have room for every class, only reach counts.
        family = self.family[rows]
        profile = np.where(family >= 0, costs.profile[family], costs.num_profiles)
        ample = np.where(viable, room, NEVER).min(1) >= costs.most_need[kind]
        ample &= viable.all(1) | (family >= 0)
        legal[ample] &= costs.reach[kind[ample], profile[ample]]
        tight = np.flatnonzero(~ample)
        if len(tight):
            legal[tight] = self._tight_classes(rows[tight], kind[tight], legal[tight])
        self.mask[columns] = legal

    def _tight_classes(self, rows: np.ndarray, kind: np.ndarray, legal: np.ndarray) -> np.ndarray:
        """Classes [n, C] that fit the room of some family; doubts about others are noted."""
        t, costs, room, viable = self.t, self.costs, self.room[rows], self.viable[rows]
        fits, reach = np.zeros_like(legal), np.zeros_like(legal)
        for g in range(costs.num_profiles):
            need = costs.need[kind, g]
            fits |= need <= np.where(viable[:, g], room[:, g], -1)[:, None]
            reach |= (need < NEVER) & viable[:, g, None]
        slack = self.slack[rows][:, None] - costs.low_open - (t.num_slots[kind, :-1] > 1)
        index, classes = np.nonzero(legal & reach & ~fits & (slack >= 0))
        self._doubt(rows[index], t.class_ids[classes], slack[index, classes])
        return legal & fits

    def _references(self, rows: np.ndarray) -> None:
        t, costs, state, at = self.t, self.costs, self.state, self.at[rows]
        kind, room, family = t.type[at], self.room[rows], self.family[rows]
        nodes = state.reference_nodes()[rows]
        some = np.flatnonzero((nodes[:, 0] >= 0) & self.mask[rows, voc.REF0])
        self.mask[rows, _REFS] = False
        if not len(some):
            return
        rows, kind, room, family, nodes = (x[some] for x in (rows, kind, room, family, nodes))
        limit = hole_limit(state, rows, at[some])
        index = (rows[:, None], nodes)
        source = (kind[:, None], state.done_class[index])
        fam = np.where(t.bears[source], state.done_family[index], -1)
        slots = t.num_slots[source]
        legal = (nodes >= 0) & (slots > 0)
        legal &= (fam < 0) | (family[:, None] < 0) | (fam == family[:, None])
        legal &= (state.done_area[index] <= limit[:, None]) | ~t.sized[source]
        profile = costs.profile[np.maximum(fam, 0)]
        viable = self.viable[rows]
        best = np.where(viable, room, -1).max(1)[:, None]
        free = np.where(fam >= 0, np.take_along_axis(room, profile, 1), best)
        fits = free >= (slots > 1)
        self.mask[rows, _REFS] = legal & fits
        if (legal & ~fits).any():
            some = np.any(viable, axis=1)[:, None]
            may = np.where(fam >= 0, np.take_along_axis(viable, profile, 1), some)
            open_rows, k = np.nonzero(legal & ~fits & may)
            slack = self.slack[rows[open_rows]] - (slots[open_rows, k] > 1)
            self._doubt(rows[open_rows], voc.REF0 + k, slack)

    def _prefer(self, rows: np.ndarray) -> None:
        """Caps and reuse of loaders, which give way where nothing else could fill the hole."""
        g, t, kind = self.g, self.t, self.t.type[self.at[rows]]
        capped = self.state.cap_counts[rows] >= g.cap_of
        reuse = np.any(t.reuse[kind], axis=1) & np.any(self.mask[rows, _REFS], axis=1)
        some = np.flatnonzero(np.any(capped, axis=1) | reuse)
        rows, kind, reuse = rows[some], kind[some], reuse[some]
        columns = np.ix_(rows, t.class_ids)
        classes = self.mask[columns]
        over = (capped[some].astype(np.float32) @ g.cap_members.T.astype(np.float32)) > 0
        kept = classes & ~over & ~(t.reuse[kind] & reuse[:, None])
        self.mask[columns] = kept
        stuck = np.flatnonzero(~kept.any(1))
        stuck = stuck[~self.mask[rows[stuck]].any(1)]
        self.mask[np.ix_(rows[stuck], t.class_ids)] = classes[stuck]

    def _sizes(self, rows: np.ndarray) -> None:
        t, costs, state, at = self.t, self.costs, self.state, self.at[rows]
        top = self.top[rows]
        most, side = state.open_most[rows, top], state.open_side[rows, top]
        classes, is_side = state.open_class[rows, top], t.size[at] == SIDE
        resets = costs.sizes.resets[classes]
        limit = state.open_limit[rows, top] / (
            state.open_gain[rows, top] * costs.sizes.least_gain[at]
        )
        # The sides say nothing where another picture is read and they do not scale it.
        moot = is_side & (most > 0) & ~resets & ~costs.sizes.may_reset[classes]
        read = np.where(resets, 0.0, np.maximum(most, costs.path_area[t.after[at]]))
        own = np.where(state.open_sides[rows, top] == 2, side, costs.sizes.sides[classes])
        base = np.where(is_side, side * costs.sizes.least_side[at], np.maximum(read, own))
        value = costs.sizes.of_token[t.size_columns]
        gain = np.where(is_side[:, None], value, value**2)
        fits = (base[:, None] * gain <= limit[:, None]) | moot[:, None]
        self.mask[np.ix_(rows, t.size_columns)] &= fits

    def _decide(self) -> None:
        """Ask the search about every token in doubt."""
        rows, tokens, slack = (np.concatenate(x) for x in zip(*self.doubts, strict=True))
        self.g.completions.trim()
        order = np.argsort(rows, kind="stable")
        starts = np.flatnonzero(np.diff(rows[order], prepend=-1))
        for part in np.split(order, starts[1:]):
            question = _Question(self, int(rows[part[0]]))
            asked = list(zip(tokens[part].tolist(), slack[part].tolist(), strict=True))
            found = [token for token, left in asked if question.fits(token, left, MAX_VISITS)]
            row = question.row
            if not found and not self.mask[row].any():
                # The search has given up somewhere, but there is a way.
                found = [token for token, left in asked if question.fits(token, left, 1 << 40)]
            self.mask[row, found] = True


class _Question:
    """One row as the search sees it."""

    def __init__(self, mask: _Mask, row: int) -> None:
        self.row, self.mask, self.search = row, mask, mask.g.completions
        state, t = mask.state, mask.t
        self.depth = int(state.depth[row])
        self.at = int(mask.at[row])
        self.finished = self.search.nothing
        self.nodes: list[tuple[int, int]] = []
        for c, family in zip(
            state.done_class[row, : state.num_finished[row]].tolist(),
            state.done_family[row, : state.num_finished[row]].tolist(),
            strict=True,
        ):
            self.finished = self.finished.then(c, family, self.search.missing.gives[c])
            self.nodes.append((c, family))
        groups: dict[int, int] = {}
        families: list[int] = []
        self.below: Stack = None
        for d in range(self.depth):
            name = int(state.open_group[row, d])
            if name not in groups:
                groups[name] = len(families)
                families.append(int(state.group_family[row, name]))
            self.top = (
                int(t.after[state.open_at[row, d]]),
                int(state.open_class[row, d]),
                groups[name],
                name != d,
                bool(state.open_bound[row, d]),
            )
            if d < self.depth - 1:
                self.below = self.search.push(self.top, self.below)
        self.families = tuple(families)
        self.holder = self.search.push(self.top, self.below) if self.depth else None
        self.worst = self._worst_area()

    def _worst_area(self) -> float:
        """Largest picture that may fill the present hole, or infinite where a limit is near.

        The search does not follow sizes, so it is not asked where they could matter.
        """
        state, costs, row = self.mask.state, self.mask.costs, self.row
        done = state.done_area[row, : state.num_finished[row]]
        worst = float(max(costs.sizes.most_side, costs.most_area, done.max(initial=0.0)))
        hole = worst
        for d in reversed(range(self.depth)):
            own = max(state.open_most[row, d], state.open_side[row, d])
            gain = state.open_gain[row, d] * costs.sizes.most_gain[state.open_at[row, d]]
            worst = max(worst, own) * max(gain, 1.0)
            if worst > state.open_limit[row, d]:
                return np.inf
        return hole if worst <= costs.pixels else np.inf

    def fits(self, token: int, slack: int, max_visits: int) -> bool:
        """Whether everything can be completed after `token`, which leaves this slack."""
        if self.worst == np.inf:
            return False
        t, families, search = self.mask.t, self.families, self.search
        c, ref = int(t.token_class[token]), token - voc.REF0
        if c >= 0:
            first = int(t.first[c])
            if self.mask.costs.sizes.most_gain[first] > 1:
                return False
            if not self.depth:
                stack = search.push((first, c, 0, False, False), None)
                return search.fits(stack, (-1,), self.finished, slack, max_visits)
            joins = bool(t.bears[t.type[self.at], c])
            group = self.top[2] if joins else len(families)
            families = families if joins else (*families, -1)
            stack = search.push((first, c, group, joins, False), self.holder)
            return search.fits(stack, families, self.finished, slack, max_visits)
        (at, holder, group, joins, bound), bearer = self.top, int(t.token_family[token])
        if 0 <= ref < voc.NUM_REFS:
            source, family = self.nodes[int(self.mask.state.reference_nodes()[self.row, ref])]
            bearer = family if t.bears[t.type[self.at], source] else -1
        elif t.choice[self.at] >= 0:
            at = int(t.branch[t.choice[self.at], token])
        if bearer >= 0:
            families = (*families[:group], bearer, *families[group + 1 :])
        stack = search.push((at, holder, group, joins, bound or bearer >= 0), self.below)
        return search.fits(stack, families, self.finished, slack, max_visits)
