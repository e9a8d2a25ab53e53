"""What the inputs of a class say of the size of its picture.

As `soundness` has it: a picture is as large as the largest one that its node reads; "width" and
"height" set it where none is read or where an "upscale_method" scales it, and "scale_by" or a model
scales it.
"""

from __future__ import annotations

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.plans import UPSCALE_BY_MODEL
from flowloom.workflow.tables import SCALE, SIDE, Tables


class Sizes:
    """Sizes of some tables. Shapes: V tokens, P positions, C classes.

    of_token [V]: what a token says as a size; 1 where that is no number.
    least_side [P], least_gain [P]: least product of the sides, of the squared scales, behind.
    sides [C + 1], gain [C + 1]: the same of a whole class; no sides are 0.
    fixed_gain [C + 1]: squared scale that no input says: that of a model.
    resets [C + 1], may_reset [C + 1]: whether the sides hold whatever is read: always, sometimes.
    most_gain [P]: greatest product of squared scales from a position on.
    most_side: largest picture that sides give.
    """

    def __init__(self, tables: Tables, wide: Sizes | None = None) -> None:
        """Read the tables; the greatest sizes are those of `wide`, if it is given."""
        self.tables, size = tables, len(tables.after)
        number, num_classes = tables.token_number, tables.num_classes
        self.of_token = np.where((number > 0) & (number < 1e12), number, 1.0)
        self.least_side, self.least_gain = np.ones(size), np.ones(size)
        self.most_gain, self.most_side = np.ones(size), 0.0
        self.sides, self.gain = np.zeros(num_classes + 1), np.ones(num_classes + 1)
        self.fixed_gain = np.ones(num_classes + 1)
        self.resets = np.zeros(num_classes + 1, bool)
        self.may_reset = np.zeros(num_classes + 1, bool)
        for c, name in enumerate(tables.class_names):
            required = {s.name: s.required for s in tables.catalogue.nodes[name].inputs}
            if not {"width", "height", "scale_by"}.isdisjoint(required):
                self._read(c, required)
            if name == UPSCALE_BY_MODEL:
                self.fixed_gain[c] = self.gain[c] = tables.catalogue.model_scale**2
                self.most_gain[tables.first[c]] = self.gain[c]
        if wide is not None:
            self.most_gain, self.most_side = wide.most_gain, wide.most_side

    def _read(self, c: int, required: dict[str, bool]) -> None:
        t = self.tables
        at, sides, largest, num_sides, path = int(t.first[c]), 1.0, 1.0, 0, []
        while at:
            path.append(at)
            at = int(t.after[at])
        for at in reversed(path):
            self.least_side[at], self.least_gain[at] = sides, self.gain[c]
            self.most_gain[at] = self.most_gain[t.after[at]]
            if t.size[at] == SIDE:
                values = self._numbers(at)
                sides, largest = sides * values.min(), largest * values.max()
                num_sides += 1
            elif t.size[at] == SCALE:
                values = self._numbers(at)
                self.gain[c] *= values.min() ** 2
                self.most_gain[at] *= max(values.max() ** 2, 1.0)
        if num_sides == 2:
            self.sides[c], self.most_side = sides, max(self.most_side, largest)
            needed = ("width", "height", "upscale_method")
            self.resets[c] = all(required.get(name, False) for name in needed)
            self.may_reset[c] = "upscale_method" in required and not self.resets[c]

    def _numbers(self, at: int) -> np.ndarray:
        """Sizes that position `at` may say; what is absent or linked counts as 1."""
        t = self.tables
        allowed = t.allowed[t.row[at]]
        values = self.of_token[allowed & (t.token_number > -np.inf)]
        return np.append(values, 1.0) if allowed[voc.NONE_ID] or not len(values) else values
