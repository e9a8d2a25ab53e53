"""The whole loop on the smallest recipe, with real stages, real kfp, MLflow and store.

Facts pinned:
- `python -m pipelines run` ends well, and its turn names a digest for every step;
- MLflow then has one finished run per step, named like it, below the run of the turn;
- every artifact is in the store;
- the same command again finds everything and changes nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowloom.lifecycle import registry, tracking, turns, versioning
from flowloom.runs import home

ROOT = Path(__file__).parents[2]
NUM_STEPS = 20


def run_smoke():
    command = [sys.executable, "-m", "pipelines", "run", "continuous_training"]
    done = subprocess.run(
        [*command, "--recipe", "smoke"],
        cwd=ROOT,
        env=dict(os.environ, FLOWLOOM_CODE_DIGEST="test"),  # an edit meanwhile is no new turn
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_turn_and_the_same_turn_again():
    shown = run_smoke()
    assert "as before" not in shown
    assert "candidate (GRPO + guidance)" in shown
    first = turns.load("0001").record
    assert (first["status"], len(first["stages"])) == ("finished", NUM_STEPS)

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
        versioning.fetch(versioning.Pointer(**pointer), home() / "again" / child.info.run_id)
    version = client.get_model_version_by_alias(registry.NAME, registry.CANDIDATE)
    assert version.tags["flowloom.decision"] in ("promoted", "refused")
    assert list(tracking.spool_dir().glob("*.json")) == []

    assert run_smoke().count("(as before)") == NUM_STEPS
    assert turns.latest().record == first
