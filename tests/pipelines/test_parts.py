"""Triplets rendered in parts at the same time, where a cluster has room for several.

Facts pinned:
- one part is one step, and no loop; the second round is rendered in parts too;
- several are a loop of steps with names of their own, joined by the step that one part would be;
- run by the real engine, they join to the artifact of one step, byte by byte.
"""

import dataclasses
import io

import pytest
from google.protobuf import json_format
from kfp import dsl
from rich.console import Console

from flowloom.config import to_dict
from flowloom.lifecycle import turns
from flowloom.runs import folder_digest
from pipelines import clusters, designer, local
from tests.dataset.small import PLAIN, build, build_small_pairs
from tests.render.tiny import write_world


@pytest.fixture
def traced(monkeypatch):
    """Traces the rendering for a cluster with that many parts; all of `more` once per round."""

    def trace(num, repeats=(1,)):
        cluster = dataclasses.replace(clusters.CLUSTERS["kind"], num_parts=num)
        monkeypatch.setattr(clusters, "current", lambda: cluster)

        @dsl.pipeline(name="rendering")
        def rendering(catalogue: str, pairs: str, overrides: dict, sources: str):
            folders = {
                name: dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset).output
                for name, uri in (("catalogue", catalogue), ("pairs", pairs))
            }
            for repeat in repeats:
                designer.render_triplets(
                    repeat, recipe="smoke", overrides=overrides, sources=sources, **folders
                )

        return rendering

    return trace


def steps_of(pipeline):
    """Names that steps are told; which loop gives a step its parts."""
    spec = pipeline.pipeline_spec
    executors = json_format.MessageToDict(spec.deployment_spec)["executors"]
    told = [
        item["value"]
        for executor in executors.values()
        for item in executor.get("container", {}).get("env", [])
        if item["name"] == "FLOWLOOM_STEP"
    ]
    loops = {name for name in spec.root.dag.tasks if name.startswith("for-loop")}
    joined = {
        task.inputs.artifacts["parts"].task_output_artifact.producer_task
        for task in spec.root.dag.tasks.values()
        if "parts" in task.inputs.artifacts
    }
    return sorted(told), loops, joined


def test_one_part_is_one_step(traced):
    names, loops, joined = steps_of(traced(1, repeats=(1, 2)))
    assert names == ["build_triplets", "build_triplets_round_2"]
    assert not loops
    assert not joined


def test_several_parts_are_a_loop_and_a_step_that_joins_them(traced):
    names, loops, joined = steps_of(traced(3, repeats=(1, 2)))
    whole = {"build_triplets", "build_triplets_round_2"}
    assert set(names) == whole | {"build_triplets_part", "build_triplets_part_round_2"}
    assert len(names) == 4
    assert len(loops) == 2
    assert joined == loops


def given(config):
    """What a configuration gives: a loop of kfp's takes no null."""
    if not isinstance(config, dict):
        return config
    return {name: given(value) for name, value in config.items() if value is not None}


@pytest.mark.slow
def test_they_join_to_what_one_step_makes(traced, tmp_path, monkeypatch):
    for name in ("FLOWLOOM_TURN", "FLOWLOOM_TRACKING", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # what the runner sets is undone after the test
    world = build_small_pairs(write_world(tmp_path / "world"))
    arguments = {
        "catalogue": str(world),
        "pairs": str(world / "pairs" / "out.partial"),
        "overrides": {"build_triplets": given(to_dict(PLAIN))},
        "sources": turns.sources(),
    }
    turn = turns.open_turn(dict.fromkeys(turns.KEY_FIELDS, "x"), lambda: None)
    local.run(traced(2), arguments, turn, Console(file=io.StringIO()))
    steps = {step["step"]: step for step in turn.steps()}
    assert set(steps) == {"build_triplets", "build_triplets_part-0", "build_triplets_part-1"}
    shards = [steps[f"build_triplets_part-{k}"]["metrics"]["triplets/shards"] for k in range(2)]
    assert min(shards) > 0
    assert "rendered before" in turn.log_path("build_triplets").read_text()
    alone, _ = build(world, tmp_path / "alone", PLAIN)
    assert steps["build_triplets"]["digest"] == folder_digest(alone)
