"""The pipeline's time: its steps, starting them, the engine, and the same without an engine.

    python -m benchmarks.pipeline [--recipe demo] [--quick] [--json]

`python -m pipelines run continuous_training` in a fresh home, then again, then its stages one after
another in one process through `flowloom.stages`. All figures are of one run on this machine, so
compare the ratios. `--quick` measures the same of `tune_generator` with the recipe `smoke`, whose
stages take seconds: its ratios are those of start-up, not of a turn. Status 1 where an artifact of
the peer differs.

start-up    of a step: its process, imports, reading; what is not the stage's own seconds
overhead    the command's seconds over those of the stages; over those of the one process, which
            records nothing in MLflow and runs no two stages at the same time
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flowloom.runs import code_digest

WHOLE, QUICK = ("continuous_training", "demo"), ("tune_generator", "smoke")
"""Pipeline and recipe."""
LISTS = ("members", "training", "parts")
"""Inputs that are several folders."""


def environment(home):
    """Variables of a command that works in `home`."""
    # One digest for all: an edit while this runs would start other runs.
    own = {"FLOWLOOM_HOME": str(home), "FLOWLOOM_CODE_DIGEST": code_digest()}
    strange = ("MLFLOW_", "FLOWLOOM_T", "FLOWLOOM_WEBHOOK")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(strange)}
    return {**inherited, "OMP_WAIT_POLICY": "passive", **own}


def call(home, *command):
    """Run a module to its end; its seconds."""
    started_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment(home),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-3000:]}")
    return time.perf_counter() - started_s


def turn(home):
    """Record and step records of the only turn in `home`."""
    (folder,) = (home / "turns").iterdir()
    steps = [json.loads(path.read_text()) for path in (folder / "steps").glob("*.json")]
    return json.loads((folder / "turn.json").read_text()), steps


def in_one_process(recipe, finished):
    """Run the stages of a finished home one after another in this process; what differs.

    Configurations and the order come from the finished run folders, inputs from those made here.
    """
    from flowloom import recipes, stages

    folders = [path.parent for path in finished.glob("runs/*/*/result.json")]
    waiting = {}
    for folder in folders:
        identity = json.loads((folder / "config.json").read_text())
        if identity["stage"] in stages.STAGES:
            digest = json.loads((folder / "result.json").read_text())["digest"]
            waiting[folder.name] = (identity, digest)
    made, differ = {}, []
    # What no stage here makes (the gate's decision) is read where the pipeline left it.
    own = {digest for _, digest in waiting.values()}
    for folder in folders:
        digest = json.loads((folder / "result.json").read_text())["digest"]
        if digest not in own:
            made[digest] = folder / "out"
    while waiting:
        ready = [
            key
            for key, (identity, _) in waiting.items()
            if _digests(identity["inputs"]) <= set(made)
        ]
        if not ready:
            raise RuntimeError(f"got {sorted(waiting)}, expected inputs that a stage made")
        for key in sorted(ready):
            identity, digest = waiting.pop(key)
            stage = identity["stage"]
            inputs = {}
            for name, text in identity["inputs"].items():
                paths = [made[part] for part in text.split(",")]
                inputs[name] = paths if name in LISTS else paths[0]
            config = recipes.stage_config(recipe, stage, identity["config"])
            result = stages.run(stage, config, inputs)
            made[digest] = result.out_dir
            if result.digest != digest:
                differ.append(stage)
    return differ


def _digests(inputs):
    return {part for text in inputs.values() for part in text.split(",")}


def peer(recipe, finished, home):
    """Run `in_one_process` in a process of its own; its seconds and the stages that differ."""
    code = (
        "import json, sys, pathlib; from benchmarks import pipeline; "
        "print(json.dumps(pipeline.in_one_process(sys.argv[1], pathlib.Path(sys.argv[2]))))"
    )
    started_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, recipe, str(finished)],
        # The stages' records of runs wait, as those of a pipeline do for its follower.
        env={**environment(home), "FLOWLOOM_TRACKING": "spool"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the stages in one process: status {done.returncode}\n{done.stderr}")
    return time.perf_counter() - started_s, json.loads(done.stdout.splitlines()[-1])


def measure(pipeline, recipe, folder):
    """All figures of a pipeline with a recipe."""
    home = folder / "pipeline"
    command = ("pipelines", "run", pipeline, "--recipe", recipe)
    first_s = call(home, *command)
    record, steps = turn(home)
    again_s = call(home, *command)
    peer_s, differ = peer(recipe, home, folder / "peer")
    walls = record["seconds"]
    inside = {step["step"]: step["stage_s"] for step in steps}
    rows = [
        # A step without a record, such as an exit handler, is all start-up.
        {"step": name, "wall_s": wall_s, "stage_s": inside.get(name, 0.0)}
        for name, wall_s in walls.items()
        if name not in ("total", "before")
    ]
    stages_s = sum(row["stage_s"] for row in rows)
    starts_s = sum(row["wall_s"] - row["stage_s"] for row in rows) + walls["before"]
    timings = [
        json.loads(p.read_text())["seconds"] for p in folder.glob("peer/runs/*/*/timing.json")
    ]
    return {
        "pipeline": pipeline,
        "recipe": recipe,
        "steps": sorted(rows, key=lambda row: -row["wall_s"]),
        "before_s": walls["before"],
        "total_s": first_s,
        "stages_s": stages_s,
        "start_up_share": starts_s / (starts_s + stages_s),
        "over_stages": first_s / stages_s,
        "peer_s": peer_s,
        "peer_stages_s": sum(timings),
        "over_peer": first_s / peer_s,
        "again_s": again_s,
        "again_share": again_s / first_s,
        "differ": differ,
    }


def show(found):
    """Print a table."""
    print(f"{found['pipeline']}, recipe {found['recipe']}")
    print(f"{'step':28} {'seconds':>8} {'stage':>8} {'start-up':>9}")
    for row in found["steps"]:
        start_s = row["wall_s"] - row["stage_s"]
        print(f"{row['step']:28} {row['wall_s']:8.1f} {row['stage_s']:8.1f} {start_s:9.1f}")
    print(f"before the first step {found['before_s']:.1f} s")
    print(f"pipeline              {found['total_s']:.1f} s, start-up {found['start_up_share']:.0%}")
    print(f"over its stages' own  {found['over_stages']:.2f} ({found['stages_s']:.1f} s)")
    print(f"over one process      {found['over_peer']:.2f} ({found['peer_s']:.1f} s)")
    print(
        f"the same call again   {found['again_s']:.1f} s, {found['again_share']:.0%} of the first"
    )
    print(f"artifacts that differ {', '.join(found['differ']) or 'none'}")


def main():
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default=WHOLE[1], help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="{} with recipe {}".format(*QUICK))
    parser.add_argument("--json", action="store_true", help="print JSON")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = QUICK if parsed.quick else (WHOLE[0], parsed.recipe)
        found = measure(*chosen, Path(folder))
    if parsed.json:
        print(json.dumps(found))
    else:
        show(found)
    return int(bool(found["differ"]))


if __name__ == "__main__":
    sys.exit(main())
