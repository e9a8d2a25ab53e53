"""Which tokens may come next: the tables of a pushdown automaton over the code of `codec`.

`Grammar` holds what does not change while tokens are drawn; `pushdown.State` holds a batch of rows.
A token is legal where its type, family and picture size fit and the cheapest completion of
everything still open fits the token budget, so whatever is drawn from the mask is a valid workflow
and ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from flowloom.workflow import vocabulary as voc
from flowloom.workflow.catalogue import Catalogue, InputSpec
from flowloom.workflow.codec import Codec
from flowloom.workflow.pushdown import GrammarError, State
from flowloom.workflow.steps import FILE, LINK, SEED, TEXT, VALUE
from flowloom.workflow.vocabulary import Vocabulary

NEVER = 1 << 20
ROLES = {"positive": 1, "negative": 2}


class Grammar:
    """Legal next tokens for one catalogue, vocabulary, budget and restriction.

    Sizes in comments: C classes, V tokens, H fields, F families, K inputs of the longest class.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        vocabulary: Vocabulary | None = None,
        budget: int = 64,
        *,
        classes: Iterable[str] | None = None,
        require: Mapping[str, Any] | Iterable[str] = (),
        forbid: Iterable[str] = (),
        caps: Mapping[str, int] | None = None,
        max_outputs: int = 1,
    ) -> None:
        """Build the tables.

        Args:
            catalogue: Node facts, files and limits.
            vocabulary: Its vocabulary, or one extended to it; built from the catalogue if left out.
            budget: Most tokens of one workflow, <eos> included.
            classes: Only these node classes; all available ones if left out.
            require: {"steps": 8, "KSampler.cfg": 2.0, "ckpt_name": "a.safetensors"} or "K=V"
                strings: every input of that name has that value.
            forbid: Class names, file names (with or without folder), or "input=value".
            caps: Most nodes of a class in one workflow, over the shipped ones.
            max_outputs: Most output nodes.

        Raises:
            GrammarError: a name is unknown, or no workflow fits.
        """
        self.catalogue = catalogue
        self.vocabulary = vocabulary or Vocabulary.build(catalogue)
        self.budget, self.max_outputs = budget, max_outputs
        self.codec = Codec(catalogue, self.vocabulary)
        rules = voc.rules()
        self.class_names = self._choose_classes(classes)
        self.num_classes = len(self.class_names)
        self.class_ids = np.array([self.vocabulary.class_ids[c] for c in self.class_names])
        self._index_families()
        self._index_fields(rules)
        self._fill_static()
        self._restrict(require, forbid)
        self._fill_costs()
        self._fill_sizes()
        self._fill_caps({**rules["caps"], **(caps or {})}, rules["cap_groups"])
        cheapest = int(np.where(self.is_output[:, None], self.open_cost, NEVER).min()) + 2
        if cheapest > budget:
            got = f"budget {budget}" if cheapest < NEVER else "this restriction of the catalogue"
            need = (
                f"at least {cheapest} tokens" if cheapest < NEVER else "one that leaves a workflow"
            )
            raise GrammarError(f"grammar: got {got}, expected {need}")

    # -- use -------------------------------------------------------------------------------------

    def start(self, batch: int) -> State:
        """`batch` rows before their first token."""
        return State(self, batch)

    def annotate(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Node index [T] and field index [T] of one sequence; see `Codec.annotate`."""
        return self.codec.annotate(tokens)

    def run(self, tokens: Sequence[int]) -> State:
        """One row after these tokens (a leading <bos> is skipped).

        Raises:
            GrammarError: one of them is illegal where it stands.
        """
        state = self.start(1)
        for token in tokens:
            if token != voc.BOS:
                state.advance(np.array([token]))
        return state

    def accepts(self, tokens: Sequence[int]) -> bool:
        """Whether the tokens are a whole workflow that this grammar can write."""
        try:
            return bool(self.run(tokens).done[0])
        except GrammarError:
            return False

    def accept_all(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """`accepts` [N] of many sequences at once (without <bos>)."""
        accepted = np.zeros(len(sequences), bool)
        alive = np.array([k for k, s in enumerate(sequences) if 0 < len(s) <= self.budget], int)
        tokens = np.full((len(sequences), self.budget), voc.PAD, np.int64)
        for k in alive:
            tokens[k, : len(sequences[k])] = sequences[k]
        lengths = np.array([len(s) for s in sequences])
        state = self.start(len(alive))
        for step in range(self.budget if len(alive) else 0):
            now = tokens[alive, step]
            known = (now >= 0) & (now < self.vocabulary.size)
            legal = known & state.mask()[np.arange(len(alive)), np.where(known, now, 0)]
            if not legal.all():
                alive, now, state = alive[legal], now[legal], state.select(legal)
            state.advance(now)
            accepted[alive] = state.done & (lengths[alive] == step + 1)
            alive, state = alive[~state.done], state.select(~state.done)
            if not len(alive):
                break
        return accepted

    # -- tables ----------------------------------------------------------------------------------

    def _choose_classes(self, classes: Iterable[str] | None) -> list[str]:
        """Classes to write, in the catalogue's order: those asked for that are available."""
        known = self.vocabulary.class_ids
        wanted = list(known) if classes is None else list(classes)
        for name in wanted:
            if name not in known or name not in self.catalogue.nodes:
                raise GrammarError(f"classes: {name!r} is not in the catalogue")
        found = [c for c in self.catalogue.nodes if c in wanted and self.catalogue.available(c)]
        if not found:
            raise GrammarError("classes: none of them is available, expected at least one")
        return found

    def _index_families(self) -> None:
        self.families = self.catalogue.families or ("",)
        index = {family: k for k, family in enumerate(self.families)}
        tokens = self.vocabulary.tokens
        # Family of a file token, -1 where it fits any.
        self.token_family = np.array(
            [index[t.family] if t.family in index and t.family else -1 for t in tokens], np.int32
        )
        self.token_class = np.full(len(tokens), -1, np.int32)
        self.token_class[self.class_ids] = np.arange(self.num_classes)
        self.token_number = np.array([_number(t) for t in tokens], np.float64)
        self.file_ids = np.array([k for k, t in enumerate(tokens) if t.group == "file"], np.int64)

    def _index_fields(self, rules: dict[str, Any]) -> None:
        steps = {
            c: [s for s in self.codec.schema.steps[c] if s.how != SEED] for c in self.class_names
        }
        links = {s.type for c in self.class_names for s in steps[c] if s.how == LINK}
        self.types = sorted(links)
        type_index = {t: k for k, t in enumerate(self.types)}
        num_fields, longest = len(self.vocabulary.fields), max(map(len, steps.values()))
        # The dummy class C stands for "no frame": it has no inputs and costs nothing.
        self.num_inputs = np.zeros(self.num_classes + 1, np.int32)
        self.class_field = np.full((self.num_classes + 1, longest + 2), voc.END_FIELD, np.int32)
        self.field_type = np.full(num_fields, -1, np.int32)
        self.field_class = np.full(num_fields, -1, np.int32)
        self.field_role = np.zeros(num_fields, np.int32)
        # Whether what fills a field shares the family of its node.
        self.field_bears = np.zeros(num_fields, bool)
        self.field_sized = np.zeros(num_fields, bool)
        self.field_size = np.full(num_fields, "", "U5")
        self.field_step: dict[int, tuple[str, Any, InputSpec]] = {}
        for c, name in enumerate(self.class_names):
            self.num_inputs[c] = len(steps[name])
            for i, step in enumerate(steps[name]):
                spec = self.catalogue.nodes[name].by_name[step.name]
                self.class_field[c, i] = step.field
                self.field_step[step.field] = (name, step, spec)
                self.field_class[step.field] = c
                if step.how == LINK:
                    self.field_type[step.field] = type_index[step.type]
                    self.field_bears[step.field] = step.type in rules["family_types"]
                    self.field_sized[step.field] = step.type in rules["sized_types"]
                    self.field_role[step.field] = ROLES.get(step.name, 0)
                elif step.how == FILE:
                    self.field_bears[step.field] = True
                elif step.how == VALUE:
                    self.field_size[step.field] = voc.rule_for(name, spec).get("size", "")
        outputs = self.catalogue.output_classes
        self.is_output = np.array([c in outputs for c in self.class_names])
        # Slots of class c that can feed type t: [C + 1, types].
        self.num_matching = np.zeros((self.num_classes + 1, len(self.types)), np.int32)
        for c, name in enumerate(self.class_names):
            for t, wanted in enumerate(self.types):
                self.num_matching[c, t] = len(self.codec.schema.slots[name, wanted])
        sources = [all(s.how != LINK for s in steps[c]) for c in self.class_names]
        only = np.isin(self.types, rules["source_only"]) if self.types else np.zeros(0, bool)
        # No new loader for these types while a reference can fill the hole: [types + 1, C].
        self.reuse = np.zeros((len(self.types) + 1, self.num_classes), bool)
        self.reuse[:-1] = only[:, None] & np.array(sources)[None, :]

    def _fill_static(self) -> None:
        vocabulary, catalogue = self.vocabulary, self.catalogue
        static = np.zeros((len(vocabulary.fields), vocabulary.size), bool)
        for field, (name, step, spec) in self.field_step.items():
            if not step.required:
                static[field, voc.NONE_ID] = True
            if step.how == LINK:
                static[field, voc.REF0 : voc.REF0 + voc.NUM_REFS] = True
                fits = self.num_matching[:-1, self.field_type[field]] > 0
                static[field, self.class_ids[fits]] = True
            elif step.how == TEXT:
                static[field, [voc.PROMPT_ID, voc.NEGATIVE_ID]] = True
            elif step.how == FILE:
                for file in catalogue.files_in(step.kind):
                    token = vocabulary.file_ids.get((file.folder, file.name, file.sha256))
                    if token is not None:
                        static[field, token] = True
            else:
                batch = catalogue.limits.batch
                for value in voc.grid(name, spec, catalogue.families):
                    token = vocabulary.value_ids.get(voc.value_key(step.kind, value))
                    if token is not None and not (
                        self.field_size[field] == "batch" and value > batch
                    ):
                        static[field, token] = True
        # An output node may have outputs (SaveImage does), but a root is written where it ends.
        static[:, self.class_ids[self.is_output]] = False
        static[voc.END_FIELD, self.class_ids[self.is_output]] = True
        self.static = static

    def _restrict(self, require: Mapping[str, Any] | Iterable[str], forbid: Iterable[str]) -> None:
        if not isinstance(require, Mapping):
            require = dict(_split(item, "require") for item in require)
        for key, value in require.items():
            self._narrow(key, value, "require", keep=True)
        files = {t.value: None for t in self.vocabulary.tokens if t.group == "file"}
        for name in forbid:
            if name in self.vocabulary.class_ids:
                self.static[:, self.vocabulary.class_ids[name]] = False
            elif name in files or any(
                name == self.vocabulary.tokens[i].text for i in self.file_ids
            ):
                rows = self.vocabulary.tokens
                self.static[
                    :, [i for i in self.file_ids if name in (rows[i].value, rows[i].text)]
                ] = 0
            else:
                self._narrow(*_split(name, "forbid"), "forbid", keep=False)

    def _narrow(self, key: str, value: Any, what: str, keep: bool) -> None:
        found = False
        for field, (name, step, _) in self.field_step.items():
            if key not in (step.name, f"{name}.{step.name}"):
                continue
            tokens = self.vocabulary.tokens
            hits = [i for i in np.flatnonzero(self.static[field]) if _same(tokens[i], value)]
            found |= bool(hits)
            if keep:
                kept = np.zeros(self.vocabulary.size, bool)
                kept[hits] = True
                self.static[field] &= kept
            else:
                self.static[field, hits] = False
        if not found:
            raise GrammarError(
                f"{what} {key}={value}: no such input, or the value is not among its tokens"
            )

    def _fill_costs(self) -> None:
        """`open_cost[c, f]`: fewest tokens to complete a just opened node of class c in family f.

        `suffix[c, i, f]`: the same from input i on, but for links that do not share the node's
        family; `suffix_free` is for these, f being theirs. No reference is counted on, so the bound
        is safe whatever has been written before.
        """
        num_families, longest = len(self.families), self.class_field.shape[1]
        self.open_cost = np.full((self.num_classes, num_families), NEVER, np.int32)
        hole = np.full((len(self.vocabulary.fields), num_families), NEVER, np.int32)
        others = np.ones(self.vocabulary.size, bool)
        others[self.class_ids] = False
        others[self.file_ids] = False
        others[voc.REF0 : voc.REF0 + voc.NUM_REFS] = False
        hole[(self.static & others).any(1)] = 1
        files = self.token_family[self.file_ids]
        fits = (files[:, None] < 0) | (files[:, None] == np.arange(num_families))
        hole[(self.static[:, self.file_ids].astype(np.int32) @ fits) > 0] = 1
        while True:
            for field in self.field_step:
                t = self.field_type[field]
                if t >= 0:
                    legal = self.static[field, self.class_ids]
                    slots = (self.num_matching[:-1, t] > 1).astype(np.int32)
                    new = 1 + slots[:, None] + self.open_cost
                    best = np.where(legal[:, None], new, NEVER).min(0)
                    hole[field] = np.minimum(hole[field], best)
            total = np.zeros_like(self.open_cost)
            for c in range(self.num_classes):
                fields = self.class_field[c, : self.num_inputs[c]]
                total[c] = np.minimum(hole[fields].sum(0), NEVER)
            if (total == self.open_cost).all():
                break
            self.open_cost = total
        # Of a class token in a hole of each type, its slot token included; the last row is no hole.
        self.class_cost = np.repeat(self.open_cost[None], len(self.types) + 1, 0)
        self.class_cost[:-1] += (self.num_matching[:-1].T > 1)[:, :, None]
        shape = (self.num_classes + 1, longest + 1, num_families)
        self.suffix, self.suffix_free = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for c in range(self.num_classes):
            for i in reversed(range(self.num_inputs[c])):
                field = self.class_field[c, i]
                free = hole[field] * (self.field_type[field] >= 0) * ~self.field_bears[field]
                rest = self.suffix[c, i + 1] + hole[field] - free
                self.suffix[c, i] = np.minimum(rest, NEVER)
                self.suffix_free[c, i] = np.minimum(self.suffix_free[c, i + 1] + free, NEVER)

    def _fill_sizes(self) -> None:
        """`min_area[c]`: least pixels a class can give; `shrink[h]`: least scale, squared."""
        self.size_field = np.isin(self.field_size, ["side", "scale"])
        self.shrink = np.ones(len(self.vocabulary.fields))
        sides = np.ones(self.num_classes)
        self.least_side = np.ones(len(self.vocabulary.fields))
        # A class's sides set the size of its picture, whatever it reads.
        self.first_side = np.zeros(len(self.vocabulary.fields), bool)
        for field in self.field_step:
            how, c = self.field_size[field], self.field_class[field]
            values = self.token_number[self.static[field]]
            if how == "scale" and len(values):
                for other in self.class_field[c, : self.num_inputs[c]]:
                    if self.field_sized[other]:
                        self.shrink[other] = values.min() ** 2
            elif how == "side" and len(values):
                sides_of = self._sides(c)
                later = sides_of[sides_of.index(field) + 1 :]
                least = [self.token_number[self.static[f]].min(initial=NEVER) for f in later]
                self.least_side[field] = float(np.prod(least))
                self.first_side[field] = field == sides_of[0]
                sides[c] *= values.min()
        self.min_area = np.full(self.num_classes, np.inf)
        while True:
            before = self.min_area.copy()
            for c in range(self.num_classes):
                area = sides[c]
                for field in self.class_field[c, : self.num_inputs[c]]:
                    if self.field_sized[field]:
                        legal = self.static[field, self.class_ids]
                        least = np.where(legal, self.min_area, np.inf).min()
                        # Shrinking is not counted on, so a class once legal stays completable.
                        area = max(area, max(self.shrink[field], 1.0) * least)
                self.min_area[c] = area
            if np.array_equal(before, self.min_area):
                break

    def _sides(self, c: int) -> list[int]:
        fields = self.class_field[c, : self.num_inputs[c]].tolist()
        return [field for field in fields if self.field_size[field] == "side"]

    def _fill_caps(self, caps: Mapping[str, int], groups: list[dict[str, Any]]) -> None:
        """`cap_members[c, g]`: whether class c counts toward cap g; `cap_of[g]`: the cap."""
        wanted = [([name], cap) for name, cap in caps.items() if name in self.class_names]
        wanted += [(group["classes"], group["cap"]) for group in groups]
        self.cap_members = np.zeros((self.num_classes, len(wanted)), np.int32)
        self.cap_of = np.array([cap for _, cap in wanted], np.int32)
        for g, (names, _) in enumerate(wanted):
            for c, name in enumerate(self.class_names):
                self.cap_members[c, g] = name in names

    @cached_property
    def seeds_opened(self) -> dict[int, int]:
        """How many seeds (which take no token) a class token brings along, where it does."""
        steps, ids = self.codec.schema.steps, self.vocabulary.class_ids
        counts = {ids[c]: sum(s.how == SEED for s in steps[c]) for c in self.class_names}
        return {token: count for token, count in counts.items() if count}

    @cached_property
    def size_columns(self) -> np.ndarray:
        """Tokens that some size input may take."""
        return np.flatnonzero(self.static[self.size_field].any(0))


def _number(token: voc.Token) -> float:
    value = token.value
    is_number = token.group == "value" and isinstance(value, (int, float))
    return float(value) if is_number and not isinstance(value, bool) else np.nan


def _split(item: str, what: str) -> tuple[str, Any]:
    key, equals, text = str(item).partition("=")
    if not equals or not key:
        raise GrammarError(
            f"{what}: {item!r} is no class or file of the catalogue; expected one, or input=value"
        )
    try:
        return key, json.loads(text)
    except ValueError:
        return key, text


def _same(token: voc.Token, value: Any) -> bool:
    if token.group == "file":
        return str(value) in (token.value, token.text, str(token.value).rsplit(".", 1)[0])
    return token.group == "value" and (token.value == value or str(token.value) == str(value))
