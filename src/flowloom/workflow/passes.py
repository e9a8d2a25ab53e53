"""Taste in sampling passes: what a server would run though the picture is lost.

A pass of `KSamplerAdvanced` without noise of its own goes on where another one has stopped, so the
two agree on their steps; a schedule that begins below pure noise needs a picture to begin with; a
range of steps or of percent is not empty. `wasted.pass_problems` warns of the same.

Like all taste it gives way where nothing else is left. What a node has said so far is remembered
while it is open; a schedule or latent tells its reader in which *phase* it is.

Shapes: B rows, D open nodes, N finished nodes, n of the rows, V tokens, P positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.costs import NEVER

if TYPE_CHECKING:
    from flowloom.workflow.costs import Costs
    from flowloom.workflow.pushdown import State
    from flowloom.workflow.tables import Tables

ADVANCED, SPLIT, RANGE = "KSamplerAdvanced", "SplitSigmas", "ConditioningSetTimestepRange"
CUSTOM = ("SamplerCustom", "SamplerCustomAdvanced")
NUM_SAID = 9
# What a node has said: whether it adds no noise, its steps, where it starts and ends, whether it
# leaves noise, where its schedule begins (thousandths), phase and number of the latent or schedule
# that it reads, and which of its outputs is read.
_QUIET, _STEPS, _START, _END, _LEAVES, _BEGIN, _PHASE, _NUMBER, _SLOT = range(NUM_SAID)
UNSAID = -1
# Phases. Of a latent: a picture, nothing yet, one with noise left; of a schedule: from pure noise,
# from less, or either, which its output tells.
PLAIN, EMPTY, NOISY, PARTIAL, EITHER = range(5)
_MOST = 30_000  # numbers are kept as 16-bit integers
_THOUSAND = 1000

_COLUMNS = {
    "add_noise": _QUIET,
    "steps": _STEPS,
    "start_at_step": _START,
    "end_at_step": _END,
    "start": _START,
    "step": _END,
    "return_with_leftover_noise": _LEAVES,
    "denoise": _BEGIN,
    "sigma_max": _BEGIN,
}
_SCALED = ("start", "end", "denoise", "sigma_max")
_WATCHED = {
    ADVANCED: (
        "add_noise", "steps", "latent_image", "start_at_step", "end_at_step",
        "return_with_leftover_noise",
    ),
    SPLIT: ("step",),
    RANGE: ("end",),
    **dict.fromkeys(CUSTOM, ("add_noise", "sigmas", "latent_image")),
}  # fmt: skip


class _Watched(NamedTuple):
    """An input that taste narrows, and the tokens that may fill it."""

    class_type: str
    name: str
    tokens: np.ndarray


class Passes:
    """Tables of the passes of one grammar: which positions say what, and which are watched."""

    def __init__(self, tables: Tables, costs: Costs) -> None:
        self.tables, self.costs = tables, costs
        size, program = len(tables.after), tables.schema.program
        self.column = np.full(size, -1, np.int8)
        self.scale = np.ones(size, np.int32)
        self.reads = np.zeros(size, bool)
        self.watched: dict[int, _Watched] = {}
        self.latent_of_advanced = -1
        self.is_watched = np.zeros(size, bool)
        names = [*tables.class_names, ""]
        schedules = [c for c in names[:-1] if "SIGMAS" in tables.catalogue.nodes[c].outputs]
        telling = {ADVANCED, RANGE, *CUSTOM, *schedules}
        for at in tables.positions:
            name, class_type = program[at].name, names[tables.owner[at]]
            if class_type not in telling:
                continue
            self.column[at] = _COLUMNS.get(name, -1)
            self.scale[at] = _THOUSAND if name in _SCALED else 1
            self.reads[at] = program[at].type in ("SIGMAS", "LATENT")
            if name in _WATCHED.get(class_type, ()):
                self.watched[at] = _Watched(class_type, name, _tokens(tables, at, name))
                self.is_watched[at] = True
                if (class_type, name) == (ADVANCED, "latent_image"):
                    self.latent_of_advanced = at
        numbers = [_number(token) for token in tables.vocabulary.tokens]
        self.number = np.clip(np.nan_to_num(np.array(numbers), nan=UNSAID), UNSAID, _MOST)
        empty = [c for c in range(tables.num_classes) if _is_empty(tables, c)]
        self.is_empty = np.isin(np.arange(len(names)), empty)
        self.is_advanced = np.array([c == ADVANCED for c in names])
        self.is_split = np.array([c == SPLIT for c in names])
        self.is_schedule = np.isin(names, schedules)
        self.tells = self.is_empty | self.is_advanced | self.is_schedule

    def say(
        self, state: State, rows: np.ndarray, top: np.ndarray, at: np.ndarray, tokens: np.ndarray
    ) -> None:
        """Remember literals that fill position `at` of the nodes at depth index `top`."""
        some = np.flatnonzero(self.column[at] >= 0)
        if len(some):
            at, tokens = at[some], tokens[some]
            value = np.minimum(self.number[tokens] * self.scale[at], _MOST)
            state.said[rows[some], top[some], self.column[at]] = np.round(value)

    def slot(self, state: State, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Remember which output is read: of the node just opened, or through a reference."""
        if not len(rows):
            return
        slot, top = tokens - voc.SLOT0, state.depth[rows] - 1
        by_ref = state.slot_of_ref[rows]
        new, ref = rows[~by_ref], rows[by_ref]
        state.said[new, top[~by_ref], _SLOT] = slot[~by_ref]
        phase = state.said[ref, top[by_ref], _PHASE]
        told = np.where(slot[by_ref] == 1, PARTIAL, PLAIN)
        state.said[ref, top[by_ref], _PHASE] = np.where(phase == EITHER, told, phase)

    def finish(
        self, state: State, rows: np.ndarray, top: np.ndarray, classes: np.ndarray
    ) -> np.ndarray:
        """Phase and number [n, 2] of the nodes at depth index `top`, whose inputs are filled."""
        told = np.zeros((len(rows), 2), np.int16)
        some = np.flatnonzero(self.tells[classes])
        if not len(some):
            return told
        said, classes = state.said[rows[some], top[some]], classes[some]
        leaves = (said[:, _LEAVES] == 1) & (said[:, _END] < said[:, _STEPS])
        partial = (said[:, _BEGIN] >= 0) & (said[:, _BEGIN] < _THOUSAND)
        phase = np.where(self.is_empty[classes], EMPTY, PLAIN)
        phase = np.where(self.is_advanced[classes] & leaves, NOISY, phase)
        phase = np.where(self.is_schedule[classes] & partial, PARTIAL, phase)
        whole = self.is_split[classes] & (said[:, _PHASE] != PARTIAL)
        phase = np.where(self.is_split[classes], PARTIAL, phase)
        phase = np.where(whole, EITHER, phase)
        number = np.where(self.is_split[classes], said[:, _NUMBER], said[:, _STEPS])
        told[some, 0] = phase
        told[some, 1] = np.where(self.is_advanced[classes], said[:, _END], number)
        return told

    def read(
        self,
        state: State,
        rows: np.ndarray,
        top: np.ndarray,
        at: np.ndarray,
        told: np.ndarray,
        is_new: bool,
    ) -> None:
        """Tell the nodes at depth index `top` what fills position `at`.

        Args:
            state: What is open.
            rows: Which of its rows.
            top: Depth index of the nodes that read.
            at: Their positions.
            told: Phase and number [n, 2] of what they read.
            is_new: Whether that has just been written, one deeper; else it is referred to.
        """
        some = np.flatnonzero(self.reads[at])
        if not len(some):
            return
        rows, top, told = rows[some], top[some], told[some]
        if is_new:
            part = np.where(state.said[rows, top + 1, _SLOT] == 1, PARTIAL, PLAIN)
            told[:, 0] = np.where(told[:, 0] == EITHER, part, told[:, 0])
        state.said[rows, top, _PHASE : _NUMBER + 1] = told

    def prefer(self, state: State, at: np.ndarray, mask: np.ndarray, room: np.ndarray) -> None:
        """Narrow a mask [B, V] in place where something of good taste is left.

        Args:
            state: What is open.
            at: Position [B] that the next token fills.
            mask: Legal tokens.
            room: Tokens left for what fills the hole, by profile of families [B, G].
        """
        rows = np.flatnonzero(self.is_watched[at] & ~state.done)
        if not len(rows):
            return
        place, waits = at[rows], state.slots[rows] > 0
        for where in np.unique(place).tolist():
            hole = self.watched[where]
            # Of a schedule the output is chosen, of all else the token itself.
            here = rows[(place == where) & (waits == (hole.name == "sigmas"))]
            if not len(here):
                continue
            columns = np.ix_(here, hole.tokens)
            narrowed = mask[columns] & self._keep(hole, state, here, room[here])
            left = narrowed.any(1)
            mask[np.ix_(here[left], hole.tokens)] = narrowed[left]

    def _keep(self, hole: _Watched, state: State, rows: np.ndarray, room: np.ndarray) -> np.ndarray:
        """Which of its tokens a hole of good taste takes [n, len(hole.tokens)]."""
        name, top = hole.name, state.depth[rows] - 1
        if name == "sigmas":
            # The end of a schedule for a picture, its beginning where the rest is guessed.
            top = top - ~state.slot_of_ref[rows]
            wanted = np.where(state.said[rows, top, _SLOT] == 1, 0, 1)
            return hole.tokens == voc.SLOT0 + wanted[:, None]
        said = state.said[rows, top]
        if name == "latent_image":
            return self._latents(hole, state, rows, said)
        number = self.number[hole.tokens]
        if hole.class_type == RANGE:
            return np.round(number * _THOUSAND) > said[:, [_START]]
        if hole.class_type == SPLIT:
            return number < said[:, [_NUMBER]]
        if hole.class_type in CUSTOM:
            return np.broadcast_to(number == 0, (len(rows), len(number)))
        goes_on = self._goes_on(state, rows, top)[:, None]
        if name == "add_noise":
            return (number == 0) | (~goes_on & self._has_room(room)[:, None])
        if name == "return_with_leftover_noise":
            return (number == 1) == goes_on
        if name == "steps":
            above = state.said[rows, np.maximum(top - 1, 0)]
            return (number == above[:, [_STEPS]]) | ~goes_on
        inside = number < said[:, [_STEPS]]
        if name == "end_at_step":
            return (number > said[:, [_START]]) & (inside | ~goes_on)
        phase = said[:, [_PHASE]]
        start = np.where(phase == NOISY, number == said[:, [_NUMBER]], inside & (number > 0))
        return np.where(phase == EMPTY, number == 0, start)

    def _goes_on(self, state: State, rows: np.ndarray, top: np.ndarray) -> np.ndarray:
        """Whether an advanced pass [n] is to leave its noise to the one that holds it."""
        above = np.maximum(top - 1, 0)
        held = state.open_at[rows, above] == self.latent_of_advanced
        return held & (top > 0) & (state.said[rows, above, _QUIET] == 1)

    def _has_room(self, room: np.ndarray) -> np.ndarray:
        """Whether another advanced pass [n] fits below, everything else being written cheaply."""
        need = self.costs.need[self.tables.type[self.latent_of_advanced]]
        c = self.tables.class_names.index(ADVANCED)
        more = np.where(need[:, c] < NEVER, need[:, c] - need.min(1), NEVER)
        return np.any(room >= more, axis=1)

    def _latents(
        self, hole: _Watched, state: State, rows: np.ndarray, said: np.ndarray
    ) -> np.ndarray:
        """Which tokens begin a latent of the phase that a pass needs."""
        classes = self.tables.token_class[hole.tokens]
        empty = self.is_empty[classes]
        if hole.class_type == ADVANCED:
            quiet = said[:, [_QUIET]] == 1
            first = self._goes_on(state, rows, state.depth[rows] - 1)[:, None]
            keep = np.where(quiet, self.is_advanced[classes], True)
            return np.where(first, empty, keep)
        # Behind each reference a class; the dummy class stands for none, as for other tokens.
        nodes = state.reference_nodes()[rows]
        behind = np.where(nodes >= 0, state.done_class[rows[:, None], nodes], -1)
        ref = hole.tokens - voc.REF0
        is_ref = (ref >= 0) & (ref < voc.NUM_REFS)
        reads = np.where(is_ref, self.is_empty[behind][:, np.where(is_ref, ref, 0)], empty)
        return ~(reads & (said[:, [_PHASE]] == PARTIAL))


def _number(token: voc.Token) -> float:
    """What a literal says; disabled noise and left noise are 1, their opposites 0."""
    if token.group != "value":
        return UNSAID
    if token.kind == "add_noise" or isinstance(token.value, bool):
        return float(token.value in ("disable", False))
    if token.kind == "return_with_leftover_noise":
        return float(token.value == "enable")
    return float(token.value) if isinstance(token.value, (int, float)) else UNSAID


def _tokens(tables: Tables, at: int, name: str) -> np.ndarray:
    if name == "sigmas":
        return voc.SLOT0 + np.arange(voc.NUM_SLOTS)
    return np.flatnonzero(tables.allowed[tables.row[at]])


def _is_empty(tables: Tables, c: int) -> bool:
    """Whether a class gives a latent out of nothing."""
    spec = tables.catalogue.nodes[tables.class_names[c]]
    batch = "batch_size" in spec.by_name and not any(item.is_link for item in spec.inputs)
    return batch and "LATENT" in spec.outputs
