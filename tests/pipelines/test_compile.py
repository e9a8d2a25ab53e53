"""The compiled pipeline.

Facts pinned:
- the YAML is the golden file, byte by byte, under any hash seed;
- training steps ask for a GPU of the GPU pool and tolerate its taint; secrets are named, not held;
- the engine's own cache is off everywhere: run folders are the cache;
- at most 10 parameters, and every stage is a step.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components.__main__ import names as component_names
from pipelines.__main__ import compile_to, names

ROOT = Path(__file__).parents[2]
CPU_STEPS = {"build-pairs", "publish-generator", "register", "promote", "report"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    path = tmp_path_factory.mktemp("compiled") / "continuous_training.yaml"
    compile_to("continuous_training", path)
    return path


@pytest.fixture(scope="module")
def documents(compiled):
    return list(yaml.safe_load_all(compiled.read_text()))


def test_it_is_the_golden_file(compiled, golden):
    golden("continuous_training.yaml", compiled.read_text())


def test_another_process_with_another_hash_seed_writes_the_same(compiled, tmp_path):
    out = tmp_path / "again.yaml"
    command = [sys.executable, "-m", "pipelines", "compile", "continuous_training"]
    subprocess.run(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env=dict(os.environ, PYTHONHASHSEED="7"),
        check=True,
    )
    assert out.read_bytes() == compiled.read_bytes()


def test_training_steps_run_on_the_gpu_pool(documents):
    spec, platform = documents
    kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    steps = {
        label.removeprefix("exec-"): (executor["container"], kubernetes[label])
        for label, executor in spec["deploymentSpec"]["executors"].items()
    }
    assert set(steps) == {name.replace("_", "-") for name in component_names()}
    for name, (container, cluster) in steps.items():
        secrets = {secret["secretName"] for secret in cluster["secretAsEnv"]}
        assert secrets == {"flowloom-tracking", "flowloom-store"}
        assert {"resourceCpuLimit", "resourceMemoryLimit"} <= set(container["resources"])
        if name in CPU_STEPS:
            assert "accelerator" not in container["resources"]
            assert "nodeSelector" not in cluster
        else:
            accelerator = container["resources"]["accelerator"]
            assert accelerator["resourceCount"] == "1"
            assert accelerator["resourceType"] == "nvidia.com/gpu"
            assert cluster["nodeSelector"]["labels"] == {"flowloom/pool": "gpu"}
            (toleration,) = cluster["tolerations"]
            assert (toleration["key"], toleration["effect"]) == ("nvidia.com/gpu", "NoSchedule")


def test_the_engine_caches_nothing(documents):
    spec = documents[0]
    dags = [spec["root"], *spec["components"].values()]
    tasks = [task for dag in dags for task in dag.get("dag", {}).get("tasks", {}).values()]
    steps = [task for task in tasks if "parameterIterator" not in task]
    assert len(steps) == len(component_names())
    assert all(task["cachingOptions"] == {} for task in steps)


def test_reward_members_are_trained_at_the_same_time(documents):
    tasks = documents[0]["root"]["dag"]["tasks"]
    (loop,) = (task for task in tasks.values() if "parameterIterator" in task)
    assert loop["parameterIterator"]["items"] == {"inputParameter": "pipelinechannel--members"}
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]
    assert len(parameters) <= 10
    assert parameters["members"]["defaultValue"] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("name", names())
def test_every_pipeline_has_a_readme(name):
    assert (ROOT / "pipelines" / name / "README.md").read_text().startswith(f"# {name}\n")
