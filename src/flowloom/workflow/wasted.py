"""What a server runs though the picture is lost: sampling passes that do not fit together.

Part of `validation`, and as it is written without the codec and the grammar; each finding is a
warning. `passes` keeps a grammar with taste from writing such graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from flowloom.workflow.graph import Link
from flowloom.workflow.literals import unwrapped
from flowloom.workflow.plans import Plan
from flowloom.workflow.soundness import Inputs, Plans, Unsound

_ADVANCED, _CUSTOM = "KSamplerAdvanced", frozenset({"SamplerCustom", "SamplerCustomAdvanced"})
_SPLIT, _RANGE, _COMBINE = "SplitSigmas", "ConditioningSetTimestepRange", "ConditioningCombine"
_SCHEDULERS = frozenset({"BasicScheduler", "KarrasScheduler", "ExponentialScheduler"})
_TOLD = frozenset({_ADVANCED, _SPLIT, _RANGE, *_CUSTOM})
_GUIDED = ("positive", "conditioning", "cond1")
_DENOISED = 1  # output of a custom sampler: the picture guessed from where it has stopped
_HIGH, _LOW = range(2)  # outputs of SplitSigmas

Spans = tuple[tuple[float, float], ...]


class _Schedule(NamedTuple):
    """Steps of a schedule, whether it begins below pure noise, whether it ends before 0."""

    steps: float
    partial: bool
    stops: bool


def pass_problems(order: Iterable[str], plans: Plans, inputs: Inputs) -> Iterator[Unsound]:
    """Passes that do nothing, or whose noise does not go with the latent they read.

    Args:
        order: Node ids, each after those it links to.
        plans: What is known of each node's class.
        inputs: Input values of each node by name, links as `Link`.
    """
    order = list(order)
    if any(plans[node_id].class_type in _TOLD for node_id in order):
        yield from _Passes(plans, inputs).problems(order)


class _Passes:
    """One graph: which latents have noise left, what its schedules are, what guides when."""

    def __init__(self, plans: Plans, inputs: Inputs) -> None:
        self.plans, self.inputs = plans, inputs
        self.noisy: dict[Link, float] = {}
        """Latents with noise left; the step at which they have it, -1 where that is not known."""
        self.empty: set[str] = set()
        self.schedules: dict[Link, _Schedule] = {}
        self.spans: dict[str, Spans] = {}

    def problems(self, order: list[str]) -> Iterator[Unsound]:
        for node_id in order:
            plan, given = self.plans[node_id], self.inputs[node_id]
            found: Iterable[tuple[str, str]] = ()
            if plan.class_type == _ADVANCED:
                found = self._advanced(node_id, given)
            elif plan.class_type in _CUSTOM:
                found = self._custom(node_id, given)
            elif plan.class_type == _SPLIT:
                found = self._split(node_id, given)
            elif plan.class_type == _RANGE:
                found = self._range(given)
            elif "LATENT" in plan.outputs and "batch_size" in plan.by_name:
                self.empty.add(node_id)
            elif plan.schedules:
                self._schedule(node_id, plan, given)
            for name, message in (*found, *self._reads(plan, given), *self._guides(node_id, plan)):
                yield Unsound(node_id, plan.class_type, name, message)

    def _advanced(self, node_id: str, given: Any) -> Iterator[tuple[str, str]]:
        steps, start = _number(given.get("steps")), _number(given.get("start_at_step"))
        end, latent = _number(given.get("end_at_step")), given.get("latent_image")
        if steps is None or start is None or end is None:
            return
        end = min(end, steps)
        if start >= end:
            yield "start_at_step", f"no step is left from {start:.0f} to {end:.0f}"
        if given.get("return_with_leftover_noise") == "enable" and end < steps:
            self.noisy[Link(node_id, 0)] = end
        yield from self._begins(latent, given.get("add_noise") == "disable", start > 0)
        left = self.noisy.get(latent, start) if type(latent) is Link else start
        if given.get("add_noise") == "disable" and left not in (start, -1):
            yield "start_at_step", f"goes on at step {start:.0f}, where noise of step {left:.0f} is"

    def _custom(self, node_id: str, given: Any) -> Iterator[tuple[str, str]]:
        schedule, latent = self.schedules.get(given.get("sigmas")), given.get("latent_image")
        if schedule is not None and schedule.stops:
            self.noisy[Link(node_id, 0)] = -1
        quiet = unwrapped(given.get("add_noise")) is False
        yield from self._begins(latent, quiet, schedule is not None and schedule.partial)

    def _begins(self, latent: Any, quiet: bool, partial: bool) -> Iterator[tuple[str, str]]:
        """Whether a pass begins with what it needs.

        Args:
            latent: The link to what it reads.
            quiet: It adds no noise.
            partial: It begins below pure noise.
        """
        if type(latent) is not Link:
            return
        if quiet and latent not in self.noisy:
            yield "add_noise", "adds no noise, and the latent has none left"
        elif not quiet and latent in self.noisy:
            yield "latent_image", "adds noise to a latent that has noise left"
        elif not quiet and partial and latent.node in self.empty:
            yield "latent_image", "begins below pure noise with an empty latent"

    def _reads(self, plan: Plan, given: Any) -> Iterator[tuple[str, str]]:
        """Latents with noise left where a picture is wanted."""
        if self.noisy and plan.class_type != _ADVANCED and plan.class_type not in _CUSTOM:
            for name, value in given.items():
                if type(value) is Link and value in self.noisy:
                    yield name, "the latent has noise left, which a further pass would remove"

    def _split(self, node_id: str, given: Any) -> Iterator[tuple[str, str]]:
        schedule, step = self.schedules.get(given.get("sigmas")), _number(given.get("step"))
        if schedule is None or step is None:
            return
        if step >= schedule.steps:
            yield "step", f"splits at step {step:.0f} of {schedule.steps:.0f}"
        high = _Schedule(min(step, schedule.steps), schedule.partial, True)
        low = _Schedule(max(schedule.steps - step, 0), True, schedule.stops)
        self.schedules[Link(node_id, _HIGH)] = high
        self.schedules[Link(node_id, _LOW)] = low

    def _schedule(self, node_id: str, plan: Plan, given: Any) -> None:
        steps, begin = _number(given.get("steps")), 1.0
        if plan.class_type in _SCHEDULERS:
            # A flow model is at pure noise at 1; others begin far above.
            begin = _number(given.get("denoise", given.get("sigma_max")))
        if steps is not None and begin is not None:
            self.schedules[Link(node_id, 0)] = _Schedule(steps, begin < 1, False)

    def _range(self, given: Any) -> Iterator[tuple[str, str]]:
        start, end = _number(given.get("start")), _number(given.get("end"))
        if start is not None and end is not None and start >= end:
            yield "end", f"nothing is left from {start:g} to {end:g}"

    def _guides(self, node_id: str, plan: Plan) -> Iterator[tuple[str, str]]:
        """Parts of the way that nothing guides; a conditioning's span is told by its sources."""
        given = self.inputs[node_id]
        links = {k: v for k, v in given.items() if type(v) is Link and v.node in self.spans}
        if "CONDITIONING" in plan.outputs:
            spans = [self.spans[link.node] for link in links.values()]
            if plan.class_type == _RANGE:
                start, end = _number(given.get("start")), _number(given.get("end"))
                if start is not None and end is not None:
                    inner = spans[0] if spans else ((0.0, 1.0),)
                    cut = ((max(a, start), min(b, end)) for a, b in inner)
                    self.spans[node_id] = tuple((a, b) for a, b in cut if a < b)
            elif plan.class_type == _COMBINE and len(spans) == 2:
                self.spans[node_id] = spans[0] + spans[1]
            elif plan.class_type != _COMBINE and spans:
                self.spans[node_id] = spans[0]
            return
        for name in _GUIDED:
            gap = _gap(self.spans[links[name].node]) if name in links else None
            if gap is not None:
                yield name, f"nothing guides the way from {gap[0]:g} to {gap[1]:g}"


def _gap(spans: Spans) -> tuple[float, float] | None:
    """The first part of [0, 1] that no span covers, or None."""
    reached = 0.0
    for start, end in sorted(spans):
        if start > reached:
            return reached, start
        reached = max(reached, end)
    return (reached, 1.0) if reached < 1 else None


def _number(value: Any) -> float | None:
    value = unwrapped(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e12 else None
