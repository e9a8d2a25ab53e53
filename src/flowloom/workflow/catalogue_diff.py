"""What differs between two catalogues, input by input: servers change between releases."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from flowloom.workflow.catalogue import Catalogue, Limits, ModelFile
from flowloom.workflow.inputs import InputSpec, NodeSpec

ADDED, REMOVED, CHANGED = "added", "removed", "changed"
_SHOWN, _MOST_OPTIONS = 60, 8
_LISTS = ("options", "names")
_NESTED = ("name", "branches", "element")


@dataclass(frozen=True)
class Change:
    """One thing that differs; its text says it in words."""

    where: str
    """Input (dotted below a choice or a growing input), or "" for the class or file itself."""
    what: str
    """A field such as "type", "max", "options" or "outputs"; "input" for a whole input."""
    kind: str
    """added, removed or changed."""
    old: Any = None
    """What it was: a value, a list of options that went, or the type of an input that went."""
    new: Any = None
    """What it is now, likewise."""

    def __str__(self) -> str:
        """Say it in words."""
        what = self.what.replace("_", " ")
        if self.what == "input":
            gone = self.kind == REMOVED
            return f"input {self.where} {self.kind}: {self.old if gone else self.new}"
        place = f"input {self.where}: " if self.where else ""
        if self.kind == CHANGED:
            return f"{place}{what} {_shown(self.old)} -> {_shown(self.new)}"
        values = self.new if self.kind == ADDED else self.old
        named = [_shown(value) for value in values[:_MOST_OPTIONS]]
        more = [f"{len(values) - len(named)} more"] if len(values) > len(named) else []
        return f"{place}{what} {self.kind}: {', '.join(named + more)}"


@dataclass(frozen=True)
class Part:
    """Classes or files that differ, each list sorted by name."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: Mapping[str, tuple[Change, ...]]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.added or self.removed or self.changed)


@dataclass(frozen=True)
class Difference:
    """From an old catalogue to a new one."""

    old: str
    """Hash of the old catalogue."""
    new: str
    """Hash of the new catalogue."""
    nodes: Part
    """By class."""
    files: Part
    """By "folder/name"."""
    limits: tuple[Change, ...]

    @property
    def same(self) -> bool:
        """Whether nothing differs; then, and only then, the hashes are equal."""
        return self.nodes.same and self.files.same and not self.limits

    def to_json(self) -> dict[str, Any]:
        """Plain data; each change also says itself in words, under `text`."""

        def changes(found: Sequence[Change]) -> list[dict[str, Any]]:
            return [{**asdict(change), "text": str(change)} for change in found]

        def part(found: Part) -> dict[str, Any]:
            changed = {name: changes(each) for name, each in found.changed.items()}
            added, removed = list(found.added), list(found.removed)
            return {"added": added, "removed": removed, "changed": changed}

        return {
            "old": self.old,
            "new": self.new,
            "nodes": part(self.nodes),
            "files": part(self.files),
            "limits": changes(self.limits),
        }


def difference(old: Catalogue, new: Catalogue) -> Difference:
    """Everything that differs between two catalogues but their names."""
    was, now = old.to_json()["nodes"], new.to_json()["nodes"]

    def node_changes(name: str) -> list[Change]:
        if _text(was[name]) == _text(now[name]):
            return []
        found = list(_node_changes(old.nodes[name], new.nodes[name]))
        # Two inputs of one name cannot be told apart.
        return found or [Change("", "inputs", CHANGED, _text(was[name]), _text(now[name]))]

    old_files, new_files = _by_address(old), _by_address(new)
    return Difference(
        old.hash,
        new.hash,
        _part(was, now, node_changes),
        _part(old_files, new_files, lambda k: _field_changes(old_files[k], new_files[k])),
        tuple(_field_changes(old.limits, new.limits)),
    )


def _by_address(catalogue: Catalogue) -> dict[str, ModelFile]:
    return {f"{file.folder}/{file.name}": file for file in catalogue.files}


def _part(
    old: Mapping[str, Any], new: Mapping[str, Any], compare: Callable[[str], Iterable[Change]]
) -> Part:
    both = {name: tuple(compare(name)) for name in sorted(old.keys() & new.keys())}
    return Part(
        tuple(sorted(new.keys() - old.keys())),
        tuple(sorted(old.keys() - new.keys())),
        {name: changes for name, changes in both.items() if changes},
    )


def _node_changes(old: NodeSpec, new: NodeSpec) -> Iterator[Change]:
    yield from _inputs_changes(old.inputs, new.inputs, "")
    for name in ("outputs", "output_names", "output_node", "deprecated"):
        yield from _value_change("", name, getattr(old, name), getattr(new, name))


def _inputs_changes(
    old: Sequence[InputSpec], new: Sequence[InputSpec], prefix: str
) -> Iterator[Change]:
    was, now = {spec.name: spec for spec in old}, {spec.name: spec for spec in new}
    for name, spec in was.items():
        if name not in now:
            yield Change(prefix + name, "input", REMOVED, old=_described(spec))
    for name, spec in now.items():
        if name in was:
            yield from _input_changes(was[name], spec, prefix + name)
        else:
            yield Change(prefix + name, "input", ADDED, new=_described(spec))
    # Widgets are stored by position, so their order matters to saved files.
    kept_was = [name for name in was if name in now]
    kept_now = [name for name in now if name in was]
    yield from _value_change(prefix.rstrip("."), "order_of_inputs", kept_was, kept_now)


def _input_changes(old: InputSpec, new: InputSpec, where: str) -> Iterator[Change]:
    for field in fields(InputSpec):
        if field.name in _NESTED:
            continue
        was, now = getattr(old, field.name), getattr(new, field.name)
        if field.name in _LISTS and was is not None and now is not None:
            yield from _list_changes(where, field.name, was, now)
        else:
            yield from _value_change(where, field.name, was, now)
    branches = dict(old.branches), dict(new.branches)
    for key, inputs in branches[1].items():
        # A branch that came or went is told by the options.
        if key in branches[0]:
            yield from _inputs_changes(branches[0][key], inputs, f"{where}[{key}].")
    if old.element is not None and new.element is not None:
        yield from _input_changes(old.element, new.element, f"{where}.*")


def _list_changes(
    where: str, what: str, old: Sequence[Any], new: Sequence[Any]
) -> Iterator[Change]:
    was, now = {_text(value): value for value in old}, {_text(value): value for value in new}
    gone = [value for key, value in was.items() if key not in now]
    come = [value for key, value in now.items() if key not in was]
    if gone:
        yield Change(where, what, REMOVED, old=gone)
    if come:
        yield Change(where, what, ADDED, new=come)
    kept = [key for key in was if key in now], [key for key in now if key in was]
    if kept[0] != kept[1]:
        yield Change(where, f"order_of_{what}", CHANGED, list(old), list(new))


def _field_changes(old: ModelFile | Limits, new: ModelFile | Limits) -> Iterator[Change]:
    for field in fields(old):
        yield from _value_change("", field.name, getattr(old, field.name), getattr(new, field.name))


def _value_change(where: str, what: str, old: Any, new: Any) -> Iterator[Change]:
    # By their JSON: 1, 1.0 and true are three values, as in a catalogue's hash.
    if _text(old) != _text(new):
        yield Change(where, what, CHANGED, _plain(old), _plain(new))


def _described(spec: InputSpec) -> str:
    return f"{spec.type}{'' if spec.required else ', optional'}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        text = ", ".join(map(str, value)) or "none"
    else:
        text = "none" if value is None or value == "" else str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
