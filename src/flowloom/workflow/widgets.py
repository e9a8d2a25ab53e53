"""Literals as the editor stores them, by position with extras in between, to inputs and back.

A node's literals ("widgets") lie in `widgets_values` in schema order. The editor puts values of its
own between them: what happens to a seed after a run, and upload buttons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flowloom.workflow.editor_file import Block, CanvasError
from flowloom.workflow.graph import SEED_INPUTS, Link
from flowloom.workflow.inputs import InputSpec, NodeSpec
from flowloom.workflow.literals import WRAPPED, shown, unwrapped

KEEP_SEED = "fixed"
"""What the editor shall do with a seed after a run: a workflow keeps the seed that it was given."""
_CONTROLS = frozenset({KEEP_SEED, "increment", "decrement", "randomize", "increment-wrap"})
_BUTTONS = frozenset({"image", "upload", "upload3dmodel", "uploadExtraResources", "clear"})
_MAX_DEPTH = 64
_ABSENT = object()

# What the editor stores for upload buttons: after the input itself, and after all required ones.
_EXTRAS_AT_ONCE = {"model_file": ("upload3dmodel", "uploadExtraResources", "clear")}
_EXTRAS_LATER = {"image": ("image",), "file": ("image",), "audio": (None, None)}

# How servers order the inputs below a choice. Snapshots of `object_info` may have sorted them by
# name; every other order is taken as the schema has it.
_ORDER_BELOW = {
    "CreateCameraInfo.mode": (
        "yaw pitch distance position_x position_y position_z quat_x quat_y quat_z quat_w"
    ),
    "DA3Render.output": "normalization apply_sky_clip",
    "GLSLShader.size_mode": "width height",
    "ResizeImageMaskNode.resize_type": "match width height crop",
    "RotateMesh.mode": "angle_x angle_y angle_z qx qy qz qw",
    "TextGenerate.sampling_mode": (
        "temperature top_k top_p min_p repetition_penalty seed presence_penalty"
    ),
    "TextGenerateLTX2Prompt.sampling_mode": (
        "temperature top_k top_p min_p repetition_penalty seed presence_penalty"
    ),
}


_Take = Callable[[InputSpec, str, bool], Any]


def read_literals(
    spec: NodeSpec, block: Block, fixed: Mapping[str, Any] | None = None, by_name: bool = True
) -> dict[str, Any]:
    """A node's literals by input name, dotted below a choice; what the file lacks is the default.

    Args:
        spec: Class of the node.
        block: The node.
        fixed: Literals that reach it over links; they go before its own.
        by_name: Whether values stored by name go before those stored by position.

    Raises:
        CanvasError: a value is nested too deeply.
    """
    named = block.named if by_name else None
    take = _Places(block.values).take if named is None else _names(named)
    given: dict[str, Any] = {}
    _read(spec.class_type, spec.inputs, "", take, _slots(block), fixed or {}, given)
    return given


def conflict(spec: NodeSpec, block: Block) -> tuple[str, Any, Any] | None:
    """The one literal (name, by position, by name) that a file states in two ways, if it is one.

    That is the trace of a hand that changed one of them. Where more differ, the positions are those
    of another version of the class, and say nothing.
    """
    if block.named is None or not block.values:
        return None
    placed, named = read_literals(spec, block, by_name=False), read_literals(spec, block)
    differ = [name for name in named if placed.get(name) != named[name]]
    if len(differ) != 1 or type(placed.get(differ[0])) is not type(named[differ[0]]):
        return None
    return differ[0], placed[differ[0]], named[differ[0]]


def unread(spec: NodeSpec, block: Block) -> list[str]:
    """Values that a file holds and the class has no input for, in words; the editor's own aside."""
    if block.named is not None:
        known = read_literals(spec, block)
        rest = {k: v for k, v in block.named.items() if k not in known and k not in spec.by_name}
        return [f"{str(k)[:40]}={shown(v)}" for k, v in rest.items() if _is_told(v)]
    places = _Places(block.values)
    _read(spec.class_type, spec.inputs, "", places.take, _slots(block), {}, {})
    return [shown(value) for value in block.values[places.at :] if _is_told(value)]


def _is_told(value: Any) -> bool:
    return value not in (None, "") and not _is_button(value) and not _is_control(value)


def _slots(block: Block) -> tuple[str, ...]:
    return tuple(slot.widget for slot in block.inputs if slot.widget)


def _names(named: Mapping[str, Any]) -> _Take:
    return lambda spec, name, before_flag: named.get(name, _ABSENT)


def _read(
    class_type: str,
    specs: Sequence[InputSpec],
    prefix: str,
    take: _Take,
    slots: Sequence[str],
    fixed: Mapping[str, Any],
    given: dict[str, Any],
) -> None:
    here = list(_shown(in_order(class_type, prefix, specs, slots), prefix, slots))
    for k, (name, spec) in enumerate(here):
        before_flag = k + 1 < len(here) and here[k + 1][1].type == "BOOLEAN"
        own = take(spec, name, before_flag)
        if own is _ABSENT or own is None:
            own = default_of(spec)
        value = fixed.get(name, own)
        if value is not None:
            given[name] = to_literal(spec, value)
        if spec.branches:
            _read(class_type, branch(spec, own), f"{name}.", take, slots, fixed, given)
        if spec.branches and value != own:  # the file's positions are those of its own key
            rest = _names(dict(given))
            _read(class_type, branch(spec, value), f"{name}.", rest, slots, fixed, given)


def _shown(
    specs: Iterable[InputSpec], prefix: str, slots: Sequence[str]
) -> Iterator[tuple[str, InputSpec]]:
    """The inputs that the editor shows as literals, with their names."""
    for spec in specs:
        name = prefix + spec.name
        if spec.element is not None:
            for k, short in enumerate(spec.names):
                needed = spec.required and k < spec.min_count
                if is_shown(spec.element) and (needed or f"{name}.{short}" in slots):
                    yield f"{name}.{short}", spec.element
        elif is_shown(spec):
            yield name, spec


def is_shown(spec: InputSpec) -> bool:
    """Whether the editor shows the input as a literal to edit; else it is a socket only."""
    return bool(spec.literal_type) and not spec.force_input


def is_seed(spec: InputSpec) -> bool:
    """Whether the editor stores what happens to the value after a run behind it."""
    return spec.control or (spec.type == "INT" and spec.name in SEED_INPUTS)


def branch(spec: InputSpec, key: Any) -> tuple[InputSpec, ...]:
    """The inputs that one key of a choice brings."""
    return next((inputs for k, inputs in spec.branches if k == key), ())


def in_order(
    class_type: str, prefix: str, specs: Sequence[InputSpec], slots: Sequence[str] = ()
) -> list[InputSpec]:
    """Inputs in the order in which the editor stores them.

    Below a choice a schema sorted by name has lost it; then it is known for the class, or read off
    the node's own slots, if they name at least two.
    """
    by_name = sorted(specs, key=lambda spec: (not spec.required, spec.name))
    if not prefix or len(specs) < 2 or list(specs) != by_name:
        return list(specs)
    names = _ORDER_BELOW.get(class_type + "." + prefix[:-1], "").split()
    if not names:
        names = [slot.removeprefix(prefix) for slot in slots if slot.startswith(prefix)]
    rank = {name: k for k, name in enumerate(names)} if len(names) > 1 else {}
    return sorted(specs, key=lambda spec: rank.get(spec.name, len(rank)))


class _Places:
    """Literals taken by position; the editor's own values between them are skipped."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values, self.at = values, 0

    def take(self, spec: InputSpec, name: str, before_flag: bool) -> Any:
        if self.at >= len(self.values):
            return _ABSENT
        value = self.values[self.at]
        self.at += 1
        # Old files say with a flag whether to draw a new seed; it must not be the next literal.
        is_flag = isinstance(self.next, bool) and not before_flag
        if is_seed(spec) and (is_flag or _is_control(self.next)):
            self.at += 1
        while spec.upload and _is_button(self.next):
            self.at += 1
        return value

    @property
    def next(self) -> Any:
        return self.values[self.at] if self.at < len(self.values) else None


def _is_control(value: Any) -> bool:
    return isinstance(value, str) and value in _CONTROLS


def _is_button(value: Any) -> bool:
    if isinstance(value, dict):  # a button that an old editor wrote out whole
        return value.get("name") in ("upload", "image")
    return isinstance(value, str) and value in _BUTTONS


def default_of(spec: InputSpec) -> Any:
    """The value that the editor gives to a literal that a file lacks: its default, or first option.

    None where there is neither; a file is never picked.
    """
    if spec.default is None and spec.options:
        return spec.options[0]
    return spec.default


def default_literal(spec: InputSpec) -> Any:
    """`default_of` as API JSON."""
    default = default_of(spec)
    return None if default is None else to_literal(spec, default)


def to_literal(spec: InputSpec, value: Any) -> Any:
    """A stored value as API JSON: numbers of the input's type, a list wrapped so it is no link.

    JavaScript writes 8 for 8.0; servers cast. Anything else is left as it is.

    Raises:
        CanvasError: the value is nested too deeply.
    """
    if isinstance(value, (list, dict)):
        _check_depth(value, spec.name)
        return {WRAPPED: value} if isinstance(value, list) else value
    if spec.type == "FLOAT" and type(value) is int and value.bit_length() < 64:
        return float(value)
    if spec.type == "INT" and type(value) is float and value.is_integer():
        return int(value)
    return value


def _check_depth(value: Any, name: str) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, (list, dict))
        ]
        if not level:
            return
    raise CanvasError(f"canvas: input {name[:40]!r}: got a value nested over {_MAX_DEPTH} deep")


def write_literals(spec: NodeSpec, inputs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Literals by position, with the editor's own values in between, and the same by name.

    A linked literal keeps its place and holds its default.

    Args:
        spec: Class of the node.
        inputs: Its inputs as in API JSON; those missing get their defaults.
    """
    values: list[Any] = []
    named: dict[str, Any] = {}
    later: list[Any] = []
    required = True
    for name, item in _stored(spec.class_type, spec.inputs, "", inputs):
        if required and not item.required:
            values += later
            required, later = False, []
        value = stored(item, inputs.get(name))
        values.append(value)
        named[name] = value
        if is_seed(item):
            values.append(KEEP_SEED)
        if item.upload:
            values += _EXTRAS_AT_ONCE.get(item.name, ())
            later += _EXTRAS_LATER.get(item.name, ())
    return values + later, named


def _stored(
    class_type: str, specs: Sequence[InputSpec], prefix: str, inputs: Mapping[str, Any]
) -> Iterator[tuple[str, InputSpec]]:
    names = tuple(name for name in inputs if name.startswith(prefix))
    for name, spec in _shown(in_order(class_type, prefix, specs), prefix, names):
        yield name, spec
        if spec.branches:
            key = stored(spec, inputs.get(name))
            yield from _stored(class_type, branch(spec, key), f"{name}.", inputs)


def stored(spec: InputSpec, value: Any) -> Any:
    """The inverse of `to_literal`; the default where the input is linked or missing."""
    return default_of(spec) if value is None or type(value) is Link else unwrapped(value)
