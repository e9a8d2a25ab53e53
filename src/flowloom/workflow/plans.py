"""What validation needs to know of each class, worked out once per catalogue."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from flowloom.workflow.catalogue import Catalogue
from flowloom.workflow.graph import Link
from flowloom.workflow.inputs import InputSpec, NodeSpec, active_inputs
from flowloom.workflow.literals import accepts, quick_test, unwrapped

# Types that belong to one model family; pictures and masks do not.
FAMILY_TYPES = frozenset({"MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "CONTROL_NET"})
# Types that have a size in pixels; a conditioning made from a picture has none.
SIZED_TYPES = frozenset({"LATENT", "IMAGE", "MASK"})
SIZE_INPUTS = frozenset({"width", "height", "scale_by", "batch_size", "steps"})
UPSCALE_BY_MODEL = "ImageUpscaleWithModel"
_MAX_SHAPES, _MAX_KEY = 256, 2000

fits = lru_cache(maxsize=4096)(accepts)


class Plan:
    """Checks of one class; of a class with dynamic inputs, for one choice of them."""

    def __init__(self, spec: NodeSpec, inputs: tuple[InputSpec, ...], catalogue: Catalogue) -> None:
        self.spec = spec
        self.class_type = spec.class_type
        self.inputs = inputs
        self.by_name = {item.name: item for item in inputs}
        self.outputs = spec.outputs
        self.required = frozenset(item.name for item in inputs if item.required)
        self.checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
            item.name: (item.type, quick_test(item, catalogue)) for item in inputs
        }
        self.files = {item.name: item.folder for item in inputs if item.folder is not None}
        """Folder of each input that names a file."""
        self.sizes = not SIZE_INPUTS.isdisjoint(self.by_name)
        """Whether inputs say something of size or work."""
        self.scale = catalogue.model_scale if self.class_type == UPSCALE_BY_MODEL else 1.0
        """By how much the class itself enlarges a side."""
        self.schedules = "SIGMAS" in spec.outputs
        """Whether the class gives schedules, which tell samplers their steps."""
        self.scheduled = any(item.type == "SIGMAS" for item in inputs)
        self.sized = (
            self.sizes
            or self.schedules
            or self.scheduled
            or not SIZED_TYPES.isdisjoint(spec.outputs)
        )

    def is_clean(self, given: Mapping[str, Any], plans: Mapping[str, Plan]) -> bool:
        """Whether a node certainly has no problem of its own; False says nothing.

        Args:
            given: Its inputs by name, links as `Link`.
            plans: Plans of all nodes by id.
        """
        checks = self.checks
        for name, value in given.items():
            check = checks.get(name)
            if check is None:
                return False
            if type(value) is Link:
                node_id, slot = value
                source = plans.get(node_id) if type(node_id) is str else None
                if source is None or type(slot) is not int:
                    return False
                outputs = source.outputs
                if not 0 <= slot < len(outputs) or not (
                    outputs[slot] == check[0] or fits(check[0], outputs[slot])
                ):
                    return False
            elif not check[1](value):
                return False
        return self.required <= given.keys()


class Plans:
    """Plans of a catalogue's classes, each made when it is first asked for."""

    def __init__(self, catalogue: Catalogue) -> None:
        # Held weakly: the plans live as long as the catalogue, which must not live for them.
        self._catalogue = weakref.ref(catalogue)
        self._plain: dict[str, Plan] = {}
        self._shapes: dict[str, dict[Any, Plan]] = {}
        self._choices: dict[str, frozenset[str]] = {}

    def plan(self, spec: NodeSpec, given: Mapping[str, Any]) -> Plan:
        """The plan of a node of a class with these inputs."""
        if not spec.is_dynamic:
            plan = self._plain.get(spec.class_type)
            if plan is None:
                plan = self._plain[spec.class_type] = self._make(spec, spec.inputs)
            return plan
        key = self._key(spec, given)
        shapes = self._shapes.setdefault(spec.class_type, {})
        plan = shapes.get(key)
        if plan is None:
            plan = self._make(spec, active_inputs(spec, _readable(given)))
            if len(shapes) < _MAX_SHAPES and sum(map(len, given)) < _MAX_KEY:
                shapes[key] = plan
        return plan

    def _make(self, spec: NodeSpec, inputs: tuple[InputSpec, ...]) -> Plan:
        catalogue = self._catalogue()
        assert catalogue is not None, "the caller holds the catalogue"
        return Plan(spec, inputs, catalogue)

    def _key(self, spec: NodeSpec, given: Mapping[str, Any]) -> tuple[Any, ...]:
        """What decides which inputs there are: names given, and values of choices."""
        choices = self._choices.get(spec.class_type)
        if choices is None:
            choices = self._choices[spec.class_type] = frozenset(_choice_names(spec.inputs))
        return tuple(
            (name, value if type(value := unwrapped(given[name])) is str else None)
            if name.rpartition(".")[2] in choices
            else name
            for name in given
        )


def _choice_names(inputs: tuple[InputSpec, ...]) -> Iterator[str]:
    for item in inputs:
        if item.branches:
            yield item.name
            for _, inner in item.branches:
                yield from _choice_names(inner)


def _readable(given: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with values that can be compared with a choice's keys."""
    values = {name: unwrapped(value) for name, value in given.items()}
    return {name: v if isinstance(v, (str, int, float)) else None for name, v in values.items()}


_PLANS: dict[int, Plans] = {}


def plans_of(catalogue: Catalogue) -> Plans:
    """The plans of a catalogue; made once, gone with it."""
    plans = _PLANS.get(id(catalogue))
    if plans is None:
        plans = _PLANS[id(catalogue)] = Plans(catalogue)
        weakref.finalize(catalogue, _PLANS.pop, id(catalogue), None)
    return plans
