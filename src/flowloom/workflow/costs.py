"""What a completion costs: fewest tokens, and the picture sizes that come with them.

A *canonical* completion is a cheapest one that counts on no reference, so it holds whatever has
been written before. Families with equal costs share a profile.

Shapes: C classes, P positions, R rows, T link types, F families, G profiles of families.
"""

from __future__ import annotations

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.sizes import Sizes
from flowloom.workflow.tables import Tables

NEVER = 1 << 20


class Costs:
    """Costs of restricted tables, no picture being larger than `pixels`."""

    def __init__(self, tables: Tables, sizes: Sizes, pixels: float) -> None:
        self.tables, self.sizes, self.pixels = tables, sizes, pixels
        self.literal = self._literal_costs()
        # Whether a row can be filled by a new node at all.
        self.linked = np.any(tables.allowed[:, tables.class_ids], axis=1)
        self._order_positions()
        self.usable = np.ones(tables.num_classes, bool)
        while True:
            self._fill_costs()
            self._fill_areas()
            # A class whose canonical completion is too large a picture is not written at all.
            large = self.usable & (self.open_cost.min(1) < NEVER) & (self.area > self.pixels)
            if not large.any():
                break
            self.usable &= ~large
        self._merge_families()
        self._fill_low()

    def _order_positions(self) -> None:
        """Positions by distance from the end of their node: `levels`, nearest first."""
        t = self.tables
        level = np.zeros(len(t.after), np.int32)
        places = np.sort(np.array(t.positions, np.int64))
        # A position is written after all that can follow it.
        for at in places.tolist():
            follow = max(level[t.after[at]], level[t.stop[at]] if t.stop[at] >= 0 else 0)
            if t.choice[at] >= 0:
                follow = max(follow, level[t.branch[t.choice[at]]].max())
            level[at] = 1 + follow
        self.levels = [places[level[places] == k] for k in range(1, int(level.max()) + 1)]
        # Of the choices of each level: index of the choice, position behind an option.
        self.options: list[tuple[np.ndarray, np.ndarray]] = []
        for found in self.levels:
            pairs = [
                (k, t.branch[t.choice[at], token])
                for k, at in enumerate(found.tolist())
                if t.choice[at] >= 0
                for token in t.schema.program[at].branches
                if t.allowed[t.row[at], token]
            ]
            index, to = np.array(pairs, np.int64).reshape(-1, 2).T
            self.options.append((index, to))

    def _literal_costs(self) -> np.ndarray:
        """1 where a row can be filled without a link in a family, else NEVER. Shape: R F."""
        t = self.tables
        others = np.ones(t.vocabulary.size, bool)
        others[t.class_ids] = False
        others[t.file_ids] = False
        others[voc.REF0 : voc.REF0 + voc.NUM_REFS] = False
        others[voc.END] = False
        plain = np.any(t.allowed & others, axis=1)
        family = t.token_family[t.file_ids]
        # Whether that binds no family.
        self.plain = plain | np.any(t.allowed[:, t.file_ids[family < 0]], axis=1)
        fits = (family[:, None] < 0) | (family[:, None] == np.arange(len(t.families)))
        files = t.allowed[:, t.file_ids].astype(np.float32) @ fits.astype(np.float32) > 0
        return np.where(plain[:, None] | files, 1, NEVER).astype(np.int32)

    def _ways(
        self, k: int, suffix: np.ndarray, link: np.ndarray
    ) -> list[tuple[np.ndarray, bool, np.ndarray, np.ndarray]]:
        """Ways to fill the positions of level k: index, whether by a new node, cost, what follows.

        Costs [n, F] count all that follows; `suffix` [P, F] and `link` [T + 1, F] are known.
        """
        t, places = self.tables, self.levels[k]
        row = t.row[places]
        everywhere = np.arange(len(places))
        after = suffix[t.after[places]]
        # The options of a choice lead elsewhere; <none> does not.
        fill = np.where((t.choice[places] < 0)[:, None], self.literal[row], NEVER)
        fill[t.allowed[row, voc.NONE_ID]] = 1
        by_link = np.where(self.linked[row][:, None], link[t.type[places]], NEVER)
        stops = np.flatnonzero(t.allowed[row, voc.END])
        behind = t.stop[places[stops]]
        index, to = self.options[k]
        return [
            (everywhere, False, fill + after, t.after[places]),
            (everywhere, True, by_link + after, t.after[places]),
            (stops, False, 1 + suffix[behind], behind),
            (index, False, 1 + suffix[to], to),
        ]

    def _fill_costs(self) -> None:
        """`suffix[p, f]`: fewest tokens from position p to the end of its node of family f.

        `open_cost[c, f]`: of a just opened node. `need[t, c, f]`: after a class token in a hole of
        type t, in a node of family f; what shares no family with that node may be of any.
        """
        t = self.tables
        legal = (t.num_slots[:, :-1] > 0) & ~t.is_output & self.usable
        self.legal = legal & t.allowed[1:, t.class_ids].any(0)
        bears = t.bears[:, :-1]
        self.suffix, self.open_cost, self.need, self.link = self._solve(self.legal, bears)

    def _solve(
        self, legal: np.ndarray, bears: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Suffix, open cost, need and cheapest way to fill a link of each type by a new node.

        Args:
            legal: Which classes may fill links of which types. Shape: T + 1, C.
            bears: Which of them then share the family of the node. Shape: T + 1, C.
        """
        t, num_families = self.tables, len(self.tables.families)
        slot = (t.num_slots[:, :-1] > 1)[:, :, None]
        suffix = np.zeros((len(t.after), num_families), np.int32)
        link = np.full((len(t.types) + 1, num_families), NEVER, np.int32)
        while True:
            for k, places in enumerate(self.levels):
                found = np.full((len(places), num_families), NEVER, np.int32)
                for index, _, cost, _ in self._ways(k, suffix, link):
                    np.minimum.at(found, index, cost)
                suffix[places] = found
            open_cost = np.where(self.usable[:, None], suffix[t.first[:-1]], NEVER)
            free = open_cost.min(1, keepdims=True)
            need = slot + np.where(bears[:, :, None], open_cost, free)
            need = np.where(legal[:, :, None], need, NEVER)
            before, link = link, np.minimum(1 + need.min(1), NEVER)
            if np.array_equal(before, link):
                return suffix, open_cost, need, link

    def _fill_areas(self) -> None:
        """`area[c]`: pixels of a class's canonical completion, `path_area[p]`: from p on.

        These are the largest over families; a smaller picture may cost more tokens, and is not
        counted on.
        """
        t, num_families = self.tables, len(self.tables.families)
        path = np.zeros((len(t.after), num_families))
        area = np.full((t.num_classes, num_families), np.inf)
        sides, gain = self.sizes.sides[:-1, None], self.sizes.gain[:-1, None]
        free = self.open_cost.min(1, keepdims=True)
        cheapest = self.need == self.link[:, None, :] - 1
        while True:
            alone = np.where(self.open_cost == free, area, np.inf).min(1, keepdims=True)
            of_class = np.where(t.bears[:, :-1, None], area, alone)
            of_class = np.where(t.sized[:, :-1, None], of_class, 0.0)
            hole = np.where(cheapest, of_class, np.inf).min(1, initial=np.inf)
            for k, places in enumerate(self.levels):
                found = np.full((len(places), num_families), np.inf)
                for index, opens, cost, to in self._ways(k, self.suffix, self.link):
                    least = np.minimum(cost, NEVER) == self.suffix[places[index]]
                    size = path[to]
                    if opens:
                        size = np.maximum(size, hole[t.type[places[index]]])
                    np.minimum.at(found, index, np.where(least, size, np.inf))
                path[places] = found
            read = np.where(self.sizes.resets[:-1, None], 0.0, path[t.first[:-1]])
            before, area = area, np.maximum(read, sides) * gain
            if np.array_equal(before, area):
                break
        self.area = np.where(self.open_cost < NEVER, area, 0.0).max(1)
        self.path_area = np.where(self.suffix < NEVER, path, 0.0).max(1)
        self.most_area = float(max(self.area.max(), self.path_area.max()))

    def _merge_families(self) -> None:
        """Costs by profile instead of family: `profile[f]` is the profile of family f."""
        both = np.concatenate([self.suffix, self.open_cost])
        _, kept, self.profile = np.unique(both, axis=1, return_index=True, return_inverse=True)
        self.suffix = np.ascontiguousarray(self.suffix[:, kept])
        self.open_cost = self.open_cost[:, kept]
        # The last type is that of the place between output nodes.
        need = self.need[:, :, kept]
        need[-1] = self.open_cost
        self.num_profiles = len(kept)
        # From here on [T + 1, G, C]. `reach` tells where that is finite; its last G is any profile.
        self.need = np.ascontiguousarray(need.transpose(0, 2, 1))
        known = self.need < NEVER
        self.reach = np.concatenate([known, known.any(1, keepdims=True)], 1)
        self.most_need = np.where(known, self.need, 0).max((1, 2))

    def _fill_low(self) -> None:
        """`low[p]`: tokens from position p to the end with one for each link; no less will do."""
        t = self.tables
        self.low = np.zeros(len(t.after), np.int32)
        for places, (index, to) in zip(self.levels, self.options, strict=True):
            found = 1 + self.low[t.after[places]]
            is_choice = t.choice[places] >= 0
            absent = t.allowed[t.row[places], voc.NONE_ID]
            found[is_choice & ~absent] = NEVER
            stops = np.flatnonzero(t.allowed[t.row[places], voc.END])
            behind = 1 + self.low[t.stop[places[stops]]]
            found[stops] = np.minimum(found[stops], behind)
            np.minimum.at(found, index, 1 + self.low[to])
            self.low[places] = np.minimum(found, NEVER)
        self.low_open = self.low[t.first[:-1]]
        # What a link costs over one token if no slot and no other family comes with it. Shape: T F.
        still = self.sizes.most_gain[t.first[:-1]] <= 1
        alone = self.legal & (t.num_slots[:, :-1] == 1) & still
        self.extra = self._solve(alone, np.ones_like(alone))[3] - 1
