"""The stages by name, and the one way to run any of them.

A stage is a function `(config, run, **inputs) -> final metrics` in the package that owns it. This
module finds it, opens its run folder, runs it once, publishes its artifact and records the run.
Components, the command line and Python all come through `run`.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowloom.runs import Run, StageResult, exclusive, input_digest, is_follower, open_run

_POLL_S = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Where a stage lives and what it reads."""

    function: str
    """`module:function`, imported only when the stage really runs."""
    inputs: tuple[str, ...] = ()
    """Artifacts it needs: keyword arguments of the function (a path, or a list of paths)."""
    optional: tuple[str, ...] = ()
    """Artifacts it can do without."""
    joint: bool = False
    """Whether the processes of torchrun work on it together; else the first one does it."""


STAGES: dict[str, Stage] = {
    "tune_generator": Stage(function="flowloom.generator.tune:tune_generator", joint=True),
    "publish_generator": Stage(
        function="flowloom.generator.publish:publish_generator", optional=("generator", "earlier")
    ),
    "build_pairs": Stage(
        function="flowloom.dataset.pairs:build_pairs", inputs=("catalogue",), optional=("parts",)
    ),
    "build_triplets": Stage(
        function="flowloom.dataset.triplets:build_triplets",
        inputs=("catalogue", "pairs"),
        optional=("parts", "earlier", "proposals"),
    ),
    "train_sft": Stage(
        function="flowloom.designer.sft:train_sft",
        inputs=("catalogue", "pairs"),
        optional=("triplets", "start"),
        joint=True,
    ),
    "train_reward": Stage(
        function="flowloom.reward.member:train_reward",
        inputs=("catalogue", "triplets"),
        optional=("start",),
    ),
    "calibrate_reward": Stage(
        function="flowloom.reward.calibration:calibrate_reward",
        inputs=("catalogue", "triplets", "members"),
    ),
    "train_grpo": Stage(
        function="flowloom.designer.grpo:train_grpo",
        inputs=("catalogue", "triplets", "designer", "reward"),
        optional=("start",),
        joint=True,
    ),
    "evaluate": Stage(
        function="flowloom.evaluation.evaluate:evaluate",
        inputs=("catalogue", "triplets", "designer", "adapter", "reward"),
        optional=("champion", "conditioned"),
    ),
    "report": Stage(
        function="flowloom.evaluation.report:report",
        optional=("evaluation", "generator", "decision", "training"),
    ),
}

Input = str | Path | Sequence[str | Path]


def run(name: str, config: Any, inputs: Mapping[str, Input] | None = None) -> StageResult:
    """Run a stage, or return its result if the same run was finished before.

    Args:
        name: Name of the stage.
        config: Its configuration.
        inputs: Input name to the folder (or list of folders) an earlier stage wrote.

    Raises:
        ValueError: On an unknown stage, a missing or an unknown input.
    """
    from flowloom.lifecycle import tracking, versioning

    stage_run, paths = opened(name, config, inputs)
    stage = STAGES[name]
    if is_follower():
        return _follow(stage, config, stage_run, paths)
    with exclusive(stage_run):
        if stage_run.done:
            tracking.reused(stage_run)
            return stage_run.result()
        with tracking.recorded(stage_run):
            call = _function(stage)
            # After the imports: they count as start-up, not as the stage's seconds.
            stage_run.begin()
            metrics = call(config, stage_run, **paths)
            result = stage_run.finish(metrics)
            versioning.publish(result.out_dir)
        return result


def opened(
    name: str, config: Any, inputs: Mapping[str, Input] | None = None
) -> tuple[Run, dict[str, Path | list[Path]]]:
    """The run folder of a stage with these inputs, and the inputs as paths; nothing is run.

    Raises:
        ValueError: On an unknown stage, a missing or an unknown input.
    """
    if name not in STAGES:
        raise ValueError(f"stage: got {name!r}, expected one of {', '.join(STAGES)}")
    stage = STAGES[name]
    paths = {key: _paths(value) for key, value in (inputs or {}).items()}
    for key in paths:
        if key not in stage.inputs + stage.optional:
            expected = ", ".join(stage.inputs + stage.optional) or "none"
            raise ValueError(f"{name}: unknown input {key!r}, expected {expected}")
    for key in stage.inputs:
        if key not in paths:
            raise ValueError(f"{name}: input {key!r} is missing")
    return open_run(name, config, {key: _digest(value) for key, value in paths.items()}), paths


def _function(stage: Stage) -> Callable[..., dict[str, float]]:
    module, _, function = stage.function.partition(":")
    return getattr(importlib.import_module(module), function)


def _follow(
    stage: Stage, config: Any, stage_run: Run, paths: Mapping[str, Path | list[Path]]
) -> StageResult:
    """Take part in what the first process runs, and wait until it has finished."""
    if stage.joint and not stage_run.done:
        _function(stage)(config, stage_run, **paths)
    while not stage_run.done:
        time.sleep(_POLL_S)
    return stage_run.result()


def _paths(value: Input) -> Path | list[Path]:
    if isinstance(value, (str, Path)):
        return Path(value)
    return [Path(item) for item in value]


def _digest(value: Path | list[Path]) -> str:
    if isinstance(value, list):
        return ",".join(input_digest(path) for path in value)
    return input_digest(value)
