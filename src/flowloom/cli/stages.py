"""`run`: one stage of a recipe, after the stages it needs."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowloom import launch
from flowloom.cli import OK
from flowloom.cli.output import print_json, print_table
from flowloom.config import check, override, parse_assignments, to_dict
from flowloom.recipes import stage_config
from flowloom.runs import is_follower
from flowloom.stages import STAGES

MAKES = {
    "catalogue": "publish_generator",
    "pairs": "build_pairs",
    "triplets": "build_triplets",
    "designer": "train_sft",
    "members": "train_reward",
    "reward": "calibrate_reward",
    "adapter": "train_grpo",
    "generator": "tune_generator",
    "evaluation": "evaluate",
}
"""Which stage makes an input."""
NUM_MEMBERS = 3
"""Reward members, as in the pipeline `continuous_training`."""


def run(parsed: Namespace) -> int:
    """Run a stage, and first those that make the inputs it was not given."""
    if parsed.stage == "list":
        rows = [[name, ", ".join(s.inputs), ", ".join(s.optional)] for name, s in STAGES.items()]
        print_table("Stages", ["stage", "inputs", "optional inputs"], rows)
        return OK
    if parsed.stage not in STAGES:
        raise ValueError(f"stage: got {parsed.stage!r}, expected one of {', '.join(STAGES)}")
    config = _config(parsed)
    launch.parse(parsed.launch)
    given = _given(parsed.input)
    if parsed.dry_run:
        return _describe(parsed, config, given)

    members = given.get("members")
    if members is not None:
        given["members"] = members if isinstance(members, list) else [members]
    # What was given also serves the stages before.
    made: dict[str, Any] = dict(given)
    wanted = _wanted(parsed.stage, config)
    inputs = {name: _make(name, parsed.recipe, made) for name in wanted}
    result = launch.run(parsed.stage, config, {**given, **inputs}, parsed.launch)
    if is_follower():
        return OK
    if parsed.json:
        record = {"stage": result.stage, "out": str(result.out_dir), "digest": result.digest}
        print_json({**record, "cached": result.cached, "metrics": result.metrics})
    else:
        rows = [[name, f"{value:.6g}"] for name, value in result.metrics.items()]
        before = ", finished before" if result.cached else ""
        print_table(f"{result.stage}: {result.out_dir}{before}", ["metric", "value"], rows)
    return OK


def _config(parsed: Namespace) -> Any:
    """The stage's configuration: of the recipe or another run, with fields replaced."""
    changes = parse_assignments(parsed.assignments)
    config = stage_config(parsed.recipe, parsed.stage, None if parsed.config else changes)
    if parsed.config is None:
        return config
    recorded = json.loads(Path(parsed.config).read_text())
    name = recorded.get("stage") if isinstance(recorded, dict) else None
    check(name == parsed.stage, f"--config {parsed.config}: stage", name, parsed.stage)
    return override(override(type(config)(), recorded["config"]), changes)


def _make(name: str, recipe: str, done: dict[str, Any]) -> Any:
    """Run the stage that makes an input, and first those before it; each once."""
    from flowloom import stages

    if name not in done:
        stage = MAKES[name]
        config = stage_config(recipe, stage)
        inputs = {other: _make(other, recipe, done) for other in _wanted(stage, config)}
        if name == "members":
            configs = [stage_config(recipe, stage, {"member": k}) for k in range(NUM_MEMBERS)]
            done[name] = [stages.run(stage, config, inputs).out_dir for config in configs]
        else:
            done[name] = stages.run(stage, config, inputs).out_dir
    return done[name]


def _wanted(stage: str, config: Any) -> tuple[str, ...]:
    """Inputs that a stage needs, and optional ones that its configuration makes use of."""
    return (*STAGES[stage].inputs, *getattr(config, "wanted_inputs", ()))


def _given(assignments: list[str]) -> dict[str, Any]:
    """`NAME=PATH` options; a name given twice has a list."""
    given: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        check(bool(separator and name and text), "--input", assignment, "NAME=PATH")
        path = Path(text)
        if not path.exists():
            raise ValueError(f"--input {name}: {path}: no such file or folder")
        if name not in given:
            given[name] = path
        else:
            earlier = given[name]
            given[name] = [*(earlier if isinstance(earlier, list) else [earlier]), path]
    return given


def _describe(parsed: Namespace, config: Any, given: dict[str, Any]) -> int:
    """Show the resolved configuration and where inputs come from; runs nothing."""
    stage = STAGES[parsed.stage]
    for name in given:
        expected = ", ".join(stage.inputs + stage.optional) or "none"
        known = name in stage.inputs + stage.optional
        check(known, f"{parsed.stage}: input", name, f"one of: {expected}")
    wanted = _wanted(parsed.stage, config)
    sources = {name: str(given.get(name, f"stage {MAKES[name]}")) for name in wanted}
    sources |= {name: str(given[name]) for name in stage.optional if name in given}
    if parsed.json:
        print_json({"stage": parsed.stage, "config": to_dict(config), "inputs": sources})
        return OK
    rows = [[path, json.dumps(value), doc] for path, value, doc in fields(config)]
    title = f"{parsed.stage}, recipe {parsed.recipe}: --set FIELD=VALUE replaces a field"
    print_table(title, ["field", "value", "meaning"], rows)
    if sources:
        print_table("Inputs", ["input", "from"], [[k, v] for k, v in sources.items()])
    return OK


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Dotted name, value and explanation of every field of a configuration, nested ones too."""
    docs = _docs(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{field.name}.")
        else:
            plain = list(value) if isinstance(value, tuple) else value
            yield f"{prefix}{field.name}", plain, docs.get(field.name, "")


def _docs(config_class: type) -> dict[str, str]:
    """The text under each field, which Python itself does not keep."""
    module = sys.modules.get(config_class.__module__) or importlib.import_module(
        config_class.__module__
    )
    tree = ast.parse(inspect.getsource(module))
    (body,) = [
        node.body
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == config_class.__name__
    ]
    docs = {}
    for line, text in itertools.pairwise(body):
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[line.target.id] = " ".join(str(text.value.value).split())
    return docs
