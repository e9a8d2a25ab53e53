"""What judging a generator gives: per-prompt values, their intervals, and two of them compared.

Names of values: `<setting>/<measure>`, the setting `serve` (as it is served) or `tuned` (as it is
tuned).

    score                        mean score of the first rubric
    score/<rubric>/<column>      mean of the score and of each term, rubrics not trained on included
    satisfied/share              share of pictures that satisfy their prompt
    error/<name>                 errors that `picture_facts` knows; less is better
    out_of_range                 share of values beyond +-1.05: a first sign of a hacked reward
    spread                       deviation of pixels over the seeds of a prompt
    diversity/all, /satisfied    mean feature distance of two seeds; of two that satisfy the prompt
    diversity/wrong              part of `all` in pairs with a picture that does not satisfy
    drift/velocity               mean (v - v_base)^2 along the base's own paths

Shapes: P prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowloom.generator.intervals import Interval, mean_interval, ratio_interval, standard_error

NUM_DIGITS = 6
"""Of the values that are kept."""
MOST_ERROR, MOST_OUT_OF_RANGE, LEAST_DIVERSITY = 1.1, 0.01, 0.8
"""Signs of hacking: errors times this, so much more of the values, less than this diversity."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """One generator judged on some prompts."""

    prompts: tuple[str, ...]
    """P prompts."""
    kinds: tuple[str, ...]
    """Kind of each."""
    trained: tuple[str, ...]
    """Rubrics that were trained on."""
    held_out: tuple[str, ...]
    """Rubrics that were not."""
    values: dict[str, np.ndarray]
    """By name the mean of each prompt's seeds, `[P]`; NaN where there is none."""
    num_images: int
    """Pictures drawn."""
    wall_s: float = dataclasses.field(default=0.0, compare=False)
    """Time it took; not part of `to_dict`, since it differs from run to run."""
    cpu_s: float = dataclasses.field(default=0.0, compare=False)
    """Processor time it took."""

    def interval(self, name: str) -> Interval:
        """Mean over prompts with its bootstrap interval."""
        return mean_interval(self.values[name])

    def by_kind(self, name: str) -> dict[str, np.ndarray]:
        """Values of the prompts of each kind."""
        kinds_P = np.array(self.kinds)
        return {kind: self.values[name][kinds_P == kind] for kind in sorted(set(self.kinds))}

    def wrong_share(self, setting: str = "serve") -> Interval:
        """Share of the spread that lies in pairs with a picture that does not satisfy."""
        wrong_P, all_P = (self.values[f"{setting}/diversity/{name}"] for name in ("wrong", "all"))
        # Of no spread at all nothing is wrong.
        return ratio_interval(wrong_P, all_P) if all_P.any() else mean_interval(wrong_P)

    def summary(self) -> dict[str, float]:
        """Means by name, with standard errors as `<name>/se`.

        By kind of prompt `<setting>/<kind>` is the score, and `<setting>/satisfied/<kind>` the
        share of satisfying pictures, which is what GenEval counts. What has no value in any prompt
        is left out.
        """
        columns = dict(self.values)
        for setting in sorted({name.split("/")[0] for name in self.values}):
            for measure, start in (("score", ""), ("satisfied/share", "satisfied/")):
                for kind, values_P in self.by_kind(f"{setting}/{measure}").items():
                    columns[f"{setting}/{start}{kind}"] = values_P
        found = {}
        for name, values_P in columns.items():
            if not np.isnan(values_P).all():
                found[name] = round(float(np.nanmean(values_P)), NUM_DIGITS)
                found[f"{name}/se"] = round(standard_error(values_P), NUM_DIGITS)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything but seconds, of types that JSON and torch.save know."""
        row = {name: list(getattr(self, name)) for name in _LISTS}
        values = {
            name: [None if np.isnan(v) else v for v in values_P.tolist()]
            for name, values_P in self.values.items()
        }
        return {**row, "values": values, "num_images": self.num_images}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Judged:
        """The inverse of `to_dict`."""
        values = {name: np.array(values, float) for name, values in row["values"].items()}
        prompts, kinds, trained, held_out = (tuple(row[name]) for name in _LISTS)
        return cls(
            prompts=prompts,
            kinds=kinds,
            trained=trained,
            held_out=held_out,
            values=values,
            num_images=row["num_images"],
        )


_LISTS = ("prompts", "kinds", "trained", "held_out")


def gain(base: Judged, tuned: Judged, name: str) -> Interval:
    """Mean of tuned - base over prompts, which are the same with the same noise.

    Raises:
        ValueError: They were judged on other prompts.
    """
    _check_same(base, tuned)
    return mean_interval(tuned.values[name] - base.values[name])


def ratio(base: Judged, tuned: Judged, name: str) -> Interval:
    """mean(tuned) / mean(base); a prompt where either has no value is left out of both.

    Raises:
        ValueError: They were judged on other prompts.
    """
    _check_same(base, tuned)
    return ratio_interval(tuned.values[name], base.values[name])


def describe(base: Judged, tuned: Judged, setting: str = "serve") -> list[str]:
    """The comparison in words, one line each, for a model card."""
    lines = [f"Score: {_change(base, tuned, f'{setting}/score')} on {len(base.prompts)} prompts."]
    lines.append(f"By kind of prompt: {_kinds(base, tuned, f'{setting}/score')}.")
    name = f"{setting}/satisfied/share"
    lines.append(f"Pictures that satisfy their prompt, share: {_change(base, tuned, name)}.")
    lines.append(f"By kind of prompt: {_kinds(base, tuned, name)}.")
    for names, what in ((base.trained, "trained on"), (base.held_out, "not trained on")):
        for name in _columns(base, setting, names):
            if name == f"{setting}/score/{base.trained[0]}/score":
                continue
            label = name.removeprefix(f"{setting}/score/").replace("/", ", ")
            lines.append(f"Reward {what}, {label}: {_change(base, tuned, name)}.")
    lines += _diversity_lines(base, tuned, setting)
    for name in base.values:
        if name.startswith(f"{setting}/error/"):
            label = name.removeprefix(f"{setting}/error/")
            lines.append(f"Error to a clean drawing ({label}): {_change(base, tuned, name, 4)}.")
    lines.append(
        f"Values out of range, share: {_change(base, tuned, f'{setting}/out_of_range', 4)}."
    )
    drift = tuned.interval(f"{setting}/drift/velocity")
    lines.append(
        f"Drift from the base, mean squared velocity along its paths: {drift.mean:.4f} "
        f"({drift.low:.4f} to {drift.high:.4f})."
    )
    return lines


def signs_of_hacking(base: Judged, tuned: Judged, setting: str = "serve") -> list[str]:
    """What speaks against a gain, one line each; empty where nothing does.

    A reward that was not trained on fell, or a term of one that was (an easy term can starve the
    others); errors to clean drawings or the share of values out of range grew; pictures that
    satisfy their prompt became alike: each by more than the prompts' chance allows.
    """
    signs = []
    for name in _columns(base, setting, [*base.trained, *base.held_out]):
        if gain(base, tuned, name).high < 0:
            signs.append(f"{name} fell: {_change(base, tuned, name)}")
    for name in base.values:
        if name.startswith(f"{setting}/error/") and ratio(base, tuned, name).low > MOST_ERROR:
            signs.append(f"{name} grew: {_change(base, tuned, name, 4)}")
    name = f"{setting}/out_of_range"
    if gain(base, tuned, name).low > MOST_OUT_OF_RANGE:
        signs.append(f"{name} grew: {_change(base, tuned, name, 4)}")
    kept = ratio(base, tuned, f"{setting}/diversity/satisfied")
    if kept.high < LEAST_DIVERSITY:
        signs.append(f"{setting}/diversity/satisfied fell to {kept.mean:.2f} of the base's")
    return signs


def _diversity_lines(base: Judged, tuned: Judged, setting: str) -> list[str]:
    kept = ratio(base, tuned, f"{setting}/diversity/satisfied")
    everything = ratio(base, tuned, f"{setting}/diversity/all")
    if not everything.n:
        return ["Diversity: not known from one picture per prompt."]
    left_out = len(base.prompts) - kept.n
    if not kept.n:
        first = "not known, no prompt has two such pictures on both sides"
    else:
        first = f"{_bounds(kept)} of the base's, {kept.n} prompts counted, {left_out} left out"
    wrong = [judged.wrong_share(setting).mean for judged in (base, tuned)]
    return [
        f"Diversity among pictures that satisfy their prompt: {first}.",
        f"Diversity among all pictures: {_bounds(everything)} of the base's; the share of it that "
        f"wrong content makes: {wrong[0]:.2f} -> {wrong[1]:.2f}.",
    ]


def _kinds(base: Judged, tuned: Judged, name: str) -> str:
    sides = zip(base.by_kind(name).items(), tuned.by_kind(name).values(), strict=True)
    return ", ".join(f"{kind} {old.mean():.2f} -> {new.mean():.2f}" for (kind, old), new in sides)


def _columns(judged: Judged, setting: str, rubrics: Sequence[str]) -> list[str]:
    starts = tuple(f"{setting}/score/{rubric}/" for rubric in rubrics)
    return [name for name in judged.values if starts and name.startswith(starts)]


def _change(base: Judged, tuned: Judged, name: str, num_digits: int = 3) -> str:
    """Before -> after and the change with its interval."""
    old, new = (float(np.nanmean(judged.values[name])) for judged in (base, tuned))
    change = gain(base, tuned, name)
    # Adding 0 turns -0 into 0.
    ends = (round(v, num_digits) + 0.0 for v in (change.mean, change.low, change.high))
    mean, low, high = (f"{v:+.{num_digits}f}" for v in ends)
    return f"{old:.{num_digits}f} -> {new:.{num_digits}f}, {mean} ({low} to {high})"


def _bounds(interval: Interval) -> str:
    return f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def _check_same(base: Judged, tuned: Judged) -> None:
    if base.prompts != tuned.prompts:
        raise ValueError("judged: got two generators judged on other prompts, expected the same")
