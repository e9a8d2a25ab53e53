"""The compiled pipeline.

Facts pinned:
- the YAML is the golden file, byte by byte, under any hash seed;
- training steps ask for a GPU of the GPU pool and tolerate its taint; secrets are named, not held;
- the engine's own cache is off everywhere: run folders are the cache;
- at most 10 parameters, and every stage is a step;
- the second round renders the first's designs, refits the reward and goes on from the first's
  weights; what is judged and registered is the second's.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components.__main__ import names as component_names
from pipelines.__main__ import compile_to, names

ROOT = Path(__file__).parents[2]
CPU_STEPS = {"build_pairs", "publish_generator", "register", "promote", "report"}
TWICE = {"build_triplets", "train_reward", "calibrate_reward", "train_grpo"}


def component_of(task):
    """The component of a task: kfp numbers those that are used again."""
    return re.sub(r"-\d+$", "", task).replace("-", "_")


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
    assert {component_of(name) for name in steps} == set(component_names())
    for name, (container, cluster) in steps.items():
        secrets = {secret["secretName"] for secret in cluster["secretAsEnv"]}
        assert secrets == {"flowloom-tracking", "flowloom-store"}
        assert {"resourceCpuLimit", "resourceMemoryLimit"} <= set(container["resources"])
        if component_of(name) in CPU_STEPS:
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
    assert len(steps) == len(component_names()) + len(TWICE)
    assert all(task["cachingOptions"] == {} for task in steps)


def test_reward_members_are_trained_at_the_same_time(documents):
    tasks = documents[0]["root"]["dag"]["tasks"]
    loops = [task["parameterIterator"] for task in tasks.values() if "parameterIterator" in task]
    assert [loop["items"] for loop in loops] == 2 * [{"inputParameter": "pipelinechannel--members"}]
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]
    assert len(parameters) <= 10
    assert parameters["members"]["defaultValue"] == [0.0, 1.0, 2.0]


def test_the_second_round_goes_on_from_the_first(documents):
    tasks = documents[0]["root"]["dag"]["tasks"]
    sources = {
        name: {
            key: given["taskOutputArtifact"]["producerTask"]
            for key, given in task["inputs"].get("artifacts", {}).items()
        }
        for name, task in tasks.items()
    }
    data = {"catalogue": "publish-generator", "pairs": "build-pairs"}
    assert sources["build-triplets"] == data
    earlier = {"earlier": "build-triplets", "proposals": "train-grpo"}
    assert sources["build-triplets-2"] == {**data, **earlier}
    assert "start" not in sources["train-grpo"]
    second = {"triplets": "build-triplets-2", "reward": "calibrate-reward-2"}
    assert sources["calibrate-reward-2"]["triplets"] == second["triplets"]
    assert sources["calibrate-reward-2"]["members"] == "for-loop-2"
    assert sources["train-grpo-2"].items() >= {**second, "start": "train-grpo"}.items()
    for name in ("evaluate", "register"):
        assert sources[name].items() >= {**second, "adapter": "train-grpo-2"}.items()
    adapters = {"start": "train-grpo", "adapter": "train-grpo-2"}
    assert sources["report"].items() >= {"members": "for-loop-2", **adapters}.items()
    names = {task["taskInfo"]["name"] for task in tasks.values()}
    assert {"build-triplets", "build-triplets-round-2", "train-grpo-round-2"} <= names


@pytest.mark.parametrize("name", names())
def test_every_pipeline_has_a_readme(name):
    assert (ROOT / "pipelines" / name / "README.md").read_text().startswith(f"# {name}\n")
