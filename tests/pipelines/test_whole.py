"""The whole loop on the smallest recipe, with real stages, real kfp, MLflow and store.

Facts pinned:
- `python -m pipelines run` ends well, and its turn names a digest for every step;
- MLflow then has one finished run per step, named like it, below the run of the turn;
- every artifact is in the store;
- the same command again finds everything and changes nothing;
- the compiled YAML, loaded back, runs the same steps with the same keys, and what it has to make
  anew has the same digests;
- `tune_generator`'s YAML finds in the same home what it shares with `continuous_training`;
- the next turn goes on from the version that the first registered: the generator is found, and its
  rows begin with those of the first; killed after it registered a version itself, it goes on from
  the same one as before.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kfp import components
from rich.console import Console

from flowloom.dataset import triplets
from flowloom.lifecycle import registry, tracking, turns, versioning
from flowloom.lifecycle.pointer import Pointer
from flowloom.runs import home
from pipelines import local
from pipelines.__main__ import compile_to

ROOT = Path(__file__).parents[2]
NUM_STEPS = 20
MADE_ANEW = ("publish_generator", "build_pairs", "train_sft", "calibrate_reward", "train_grpo")
"""Stages of seconds: the YAML makes them again, both rounds."""


RUN_SMOKE = ("-m", "pipelines", "run", "continuous_training", "--recipe", "smoke")


def environment():
    """Variables of a runner of its own."""
    own = {"FLOWLOOM_TURN": "", "FLOWLOOM_TRACKING": ""}
    return {**os.environ, **own, "FLOWLOOM_CODE_DIGEST": "test"}  # an edit makes no new turn


def run_smoke(*more):
    done = subprocess.run(
        [sys.executable, *RUN_SMOKE, *more],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_yaml(name, folder, turn, arguments):
    """Compile a pipeline, load its YAML, run it as `turn`; what each step did."""
    path = folder / f"{name}.yaml"
    compile_to(name, path)
    for record in turn.dir.glob("steps/*.json"):
        record.unlink()
    loaded = components.load_component_from_file(str(path))
    with local.follower(turn):
        local.run(loaded, {"recipe": "smoke", **arguments}, turn, Console(file=io.StringIO()))
    return {step["step"]: step for step in turn.steps()}


def killed_after(step, *more):
    """Run the turn, and kill runner and steps once `step` of turn 2 has left its record."""
    process = subprocess.Popen(
        [sys.executable, *RUN_SMOKE, *more],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    record = home() / "turns" / "0002" / "steps" / f"{step}.json"
    while not record.is_file():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def settings(monkeypatch):
    """Settings that the runner makes are undone; the code is the one of `run_smoke`."""
    for name in ("FLOWLOOM_TURN", "FLOWLOOM_TRACKING"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("FLOWLOOM_CODE_DIGEST", "test")
    monkeypatch.chdir(ROOT)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_turn_and_the_same_again_and_its_yaml_and_the_next(settings, tmp_path):
    shown = run_smoke()
    assert "as before" not in shown
    assert "candidate (GRPO + guidance)" in shown
    first = turns.load("0001").record
    assert (first["status"], len(first["stages"])) == ("finished", NUM_STEPS)
    assert first["outcome"] == {"state": "SUCCEEDED", "error": None}

    client = tracking.connect()
    found = client.search_runs([tracking.experiment(client)])
    assert {run.info.status for run in found} == {"FINISHED"}
    assert len({run.info.run_name for run in found}) == NUM_STEPS + 1
    (parent,) = (run for run in found if run.data.tags["flowloom.kind"] == "turn")
    children = [run for run in found if run is not parent]
    assert len(children) == NUM_STEPS
    for child in children:
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        pointer = json.loads(child.data.tags["flowloom.artifact"])
        versioning.fetch(Pointer(**pointer), home() / "again" / child.info.run_id)
    version = client.get_model_version_by_alias(registry.NAME, registry.CANDIDATE)
    assert version.tags["flowloom.decision"] in ("promoted", "refused")
    assert list(tracking.spool_dir().glob("*.json")) == []

    assert run_smoke().count("(as before)") == NUM_STEPS
    assert turns.latest().record == first

    turn = turns.latest()
    made = {step["step"]: (step["key"], step["digest"]) for step in turn.steps()}
    assert {step: digest for step, (_, digest) in made.items()} == first["stages"]
    for stage in MADE_ANEW:
        shutil.rmtree(home() / "runs" / stage)
    again = run_yaml("continuous_training", tmp_path, turn, {"champion": turn.champion or ""})
    assert {name: (step["key"], step["digest"]) for name, step in again.items()} == made
    anew = {name for name, step in again.items() if not step["cached"]}
    assert anew == {name for name, step in again.items() if step["stage"] in MADE_ANEW}
    assert len(anew) == 7

    tuned = run_yaml("tune_generator", tmp_path, turn, {})
    assert all(tuned[name]["cached"] for name in ("tune_generator", "publish_generator"))
    assert set(tuned) == {"tune_generator", "publish_generator", "report"}

    assert first["recalled"] == {}
    goes_on(str(version.version), first["stages"], again["build_triplets_round_2"]["out"])


def registered(client):
    """Version of the candidate."""
    return str(client.get_model_version_by_alias(registry.NAME, registry.CANDIDATE).version)


def goes_on(version, first, left):
    """The turn after one with digests `first`, which registered `version` and left triplets."""
    killed_after("register", "--turn", "2")
    assert turns.load("0002").record["recalled"]["version"] == version
    client = tracking.connect()
    newest = registered(client)
    assert newest != version

    shown = run_smoke("--turn", "2")
    assert f"goes on from version {version};" in shown
    second = turns.load("0002")
    assert second.record["recalled"]["version"] == version
    assert registered(client) == newest
    made = {step["step"]: step for step in second.steps()}
    assert made["tune_generator"]["digest"] == first["tune_generator"]
    assert made["publish_generator"]["digest"] == first["publish_generator"]
    # What it rendered before it was killed is found, from the same version.
    assert all(made[name]["cached"] for name in ("build_triplets", "train_grpo", "register"))

    known = triplets.load(left)
    for name in ("build_triplets", "build_triplets_round_2"):
        rows = triplets.load(made[name]["out"])
        assert {key: values[: len(known["cell"])] for key, values in rows.items()} == known
        assert len(rows["cell"]) > len(known["cell"])
        known = rows
    assert run_smoke("--turn", "2").count("(as before)") == NUM_STEPS
    assert turns.load("0002").record == second.record
