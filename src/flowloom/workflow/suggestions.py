"""What could stand in the place of a wrong value: near spellings, installed files, fitting outputs.

Only asked where there is a problem. Look-ups that take long are counted, so that a graph in which
everything is wrong is still judged in bounded time; those beyond the bound suggest nothing.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flowloom.workflow.catalogue import Catalogue, InputSpec, base_name
from flowloom.workflow.graph import Link
from flowloom.workflow.literals import accepts, kind_name, shown, unwrapped
from flowloom.workflow.plans import Plan

MAX_LOOKUPS = 60
_MAX_NAMES, _MAX_TEXT, _MOST = 1000, 120, 5
# Letters from which on a name is taken for the beginning of a longer one.
_LEAST_CUT = 4
# Parts of a file name that say how its numbers are stored, not what they are.
_FORMAT = re.compile(
    r"safetensors|sft|ckpt|gguf|pth?|bin|fp\d+|bf16|int\d|e\dm\d\w*|scaled|pruned|mixed|convrot"
)


class Suggestions:
    """Suggestions for the problems of one graph."""

    def __init__(
        self,
        catalogue: Catalogue,
        plans: Mapping[str, Plan],
        inputs: Mapping[str, Mapping[str, Any]],
        order: Sequence[str],
    ) -> None:
        self._catalogue, self._plans, self._inputs = catalogue, plans, inputs
        self._order, self._rank = order, {}
        self._spelt: dict[Any, list[str]] = {}
        self._files: dict[tuple[str, str], tuple[str, tuple[Any, ...]]] = {}
        self._givers: dict[str, list[Link]] | None = None
        self._readers: dict[str, list[str]] = {}
        self._used: set[Link] = set()
        self._left = MAX_LOOKUPS

    def spelling(self, value: Any, options: Iterable[Any]) -> list[str]:
        """Options spelt most like `value`, best first; few or none."""
        if not isinstance(value, str) or len(value) > _MAX_TEXT or self._left <= 0:
            return []
        names = [option for option in options if isinstance(option, str)][:_MAX_NAMES]
        key = (value, len(names), names[0] if names else "", names[-1] if names else "")
        if key not in self._spelt:
            self._left -= 1
            self._spelt[key] = _nearest_names(value, names)
        return self._spelt[key]

    def options(self, item: InputSpec, value: Any) -> tuple[str, tuple[Any, ...]]:
        """A hint in words, and legal values of a choice or a file, best first."""
        value, options = unwrapped(value), self._catalogue.options(item) or ()
        if item.folder is not None:
            text = value if isinstance(value, str) and len(value) <= _MAX_TEXT else ""
            if (item.folder, text) not in self._files:
                if self._left <= 0:
                    return "", ()
                self._left -= 1
                self._files[item.folder, text] = self._substitutes(item.folder, text, options)
            return self._files[item.folder, text]
        near: list[Any] = [option for option in options if _same_number(option, value)]
        near = near or self.spelling(value, options)
        if near:
            return f"did you mean {shown(near[0])}?", tuple(near)
        some = tuple(options[:6])
        return (f"use one of: {', '.join(map(shown, some))}" if some else ""), some

    def output_of(
        self, node_id: str, item: InputSpec, source: str = ""
    ) -> tuple[str, tuple[Link, ...]]:
        """A hint in words, and outputs that fit an input without closing a cycle, best first.

        Args:
            node_id: Node whose input is to be linked.
            item: The input.
            source: Node that is linked now; a fitting output of its own is preferred.
        """
        if self._left <= 0:
            return "", ()
        self._left -= 1
        givers = self._fitting(item.type)
        after = self._downstream(node_id)
        found = [link for link in givers if link.node not in after and link.node != node_id]
        own = [link for link in found if link.node == source]
        if own:
            return f"output {own[0].slot} of that node has this type", tuple(own[:1])
        if found:
            best = found[0]
            class_type = shown(self._plans[best.node].class_type)
            hint = f"output {best.slot} of node {shown(best.node)} ({class_type}) fits"
            return hint, tuple(found[:_MOST])
        nodes = self._catalogue.nodes
        makers = [c for c, spec in nodes.items() if item.type in spec.outputs][:3]
        return (f"add a node that gives {item.type}: {', '.join(makers)}" if makers else ""), ()

    def _substitutes(
        self, folder: str, text: str, names: Sequence[Any]
    ) -> tuple[str, tuple[Any, ...]]:
        """Installed files: elsewhere under the same name, spelt alike, of the graph's family."""
        if not names:
            return f"no file is installed in {folder}", ()
        same = [name for name in names if _base(name) == _base(text)] if text else []
        family = self._family()
        files = self._catalogue.files_in(folder)
        kin = {file.name for file in files if family and file.family == family}
        alike = [name for name in _nearest_files(text, names) if name not in same]
        near = same + sorted(alike, key=lambda name: name not in kin)
        if near:
            return f"did you mean {shown(near[0])}?", tuple(near[:_MOST])
        some = tuple(name for name in names if name in kin or not kin)[:_MOST]
        listed = ", ".join(map(shown, some))
        if kin:
            return f"use one of: {listed} (of family {family})", some
        return f"nothing like it is installed, but: {listed}", some

    def _family(self) -> str:
        """The family of most installed files that the graph names, or ""."""
        counts: Counter[str] = Counter()
        for node_id, plan in self._plans.items():
            for name, folder in plan.files.items():
                value = self._inputs[node_id].get(name)
                file = self._catalogue.file(folder, value) if isinstance(value, str) else None
                if file is not None and file.family:
                    counts[file.family] += 1
        return counts.most_common(1)[0][0] if counts else ""

    def _fitting(self, wanted: str) -> list[Link]:
        """Outputs of the graph that fit a type: exact ones, unused ones, late ones first."""
        if self._givers is None:
            self._givers = {}
            self._rank = {node_id: k for k, node_id in enumerate(self._order)}
            for node_id, given in self._inputs.items():
                for value in given.values():
                    if type(value) is Link and value.node in self._plans:
                        self._used.add(value)
                        self._readers.setdefault(value.node, []).append(node_id)
        if wanted not in self._givers:
            found = [
                (
                    received != wanted,
                    Link(node_id, slot) in self._used,
                    -self._rank.get(node_id, -1),
                    slot,
                    node_id,
                )
                for node_id, plan in self._plans.items()
                for slot, received in enumerate(plan.outputs)
                if accepts(wanted, received)
            ]
            self._givers[wanted] = [Link(row[4], row[3]) for row in sorted(found)[:_MAX_NAMES]]
        return self._givers[wanted]

    def _downstream(self, node_id: str) -> set[str]:
        """Nodes that use this one, at any distance."""
        seen: set[str] = set()
        todo = [node_id]
        while todo:
            fresh = [reader for reader in self._readers.get(todo.pop(), ()) if reader not in seen]
            seen.update(fresh)
            todo.extend(fresh)
        return seen


def _base(name: str) -> str:
    return base_name(name).casefold()


def _plain(name: str) -> str:
    """A name as people vary it: case, and what stands between words; "dpm++" is "dpmpp"."""
    return re.sub(r"[\W_]+", "_", name.casefold().replace("++", "pp")).strip("_")


def _nearest_names(value: str, names: list[str]) -> list[str]:
    """Names like a value: but for case, cut short ("euler a"), with a word more, or misspelt."""
    wanted, plain = _plain(value), {_plain(name): name for name in names}
    alike = [name for name in names if _plain(name) == wanted]
    if not alike and len(wanted) >= _LEAST_CUT:
        alike = [plain[name] for name in sorted(plain, key=len) if name.startswith(wanted)][:3]
        less = [name for name in plain if name and wanted.startswith(f"{name}_")]
        alike += [plain[name] for name in sorted(less, key=len, reverse=True)[:1]]
    close = difflib.get_close_matches(value, names, 3, 0.6)
    if not alike and not close:
        close = [plain[name] for name in difflib.get_close_matches(wanted, plain, 3, 0.7)]
    return list(dict.fromkeys(alike + close))


def _nearest_files(value: str, names: Sequence[str]) -> list[str]:
    """Files whose names are like a name, whatever their format and precision."""
    by_stem: dict[str, list[str]] = {}
    for name in names[:_MAX_NAMES]:
        by_stem.setdefault(_stem(name), []).append(name)
    close = difflib.get_close_matches(_stem(value), by_stem, 3, 0.6) if value else []
    return [name for stem in close for name in by_stem[stem]]


def _stem(name: str) -> str:
    """What a file is of, without folders, format and precision."""
    words = re.split(r"[\W_]+", _base(name))
    return "_".join([word for word in words if not _FORMAT.fullmatch(word)] or words)


def _same_number(option: Any, value: Any) -> bool:
    """Whether two values are one number, however written: 8, "8" and "8.0"."""
    if kind_name(option) == kind_name(value) or isinstance(value, bool):
        return False
    if not all(isinstance(v, (int, float, str)) and len(shown(v)) < 40 for v in (option, value)):
        return False
    try:
        return float(option) == float(value)
    except (ValueError, OverflowError):
        return False
