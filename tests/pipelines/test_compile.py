"""The compiled pipelines.

Facts pinned:
- the YAML of each is its golden file, byte by byte, under any hash seed;
- each has at most 10 parameters, a README, and a file of at most two screens;
- every step's name is told to it and occurs once, whatever sub-pipeline it is in;
- the engine may cache what is decided by its inputs, digests of code and data among them;
- every step but `promote` is tried again; the exit handler hears of everything;
- what an earlier turn left goes into the catalogue and the first round's triplets, nowhere else;
- the tuned generator is in the catalogue before the designer is trained; the second round renders
  the first's designs, refits the reward and goes on from the first's weights; what is judged and
  registered is the second's.
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
from tests.pipelines.tracing import trace_anew

ROOT = Path(__file__).parents[2]
TWICE = {"build_triplets", "train_reward", "calibrate_reward", "train_grpo"}
DATA_STAGES = {"publish_generator", "build_pairs"} | TWICE | {"train_sft"}
"""What the inputs of a step decide."""
FRAME = {"begin_turn", "end_turn", "report"}
JUDGING = {"evaluate", "register", "promote"}
STEPS = {
    "tune_generator": FRAME | {"tune_generator", "publish_generator"},
    "train_flow_designer": FRAME | DATA_STAGES | JUDGING | {"recall"},
    "continuous_training": FRAME | DATA_STAGES | JUDGING | {"recall", "tune_generator"},
}
MAX_LINES = 100


def component_of(task):
    """The component of a task: the compiler numbers those that are used again."""
    return re.sub(r"-\d+$", "", task).replace("-", "_")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        trace_anew(patch, folder)  # whatever images the cluster's overlay now names
        for name in names():
            compile_to(name, folder / f"{name}.yaml")
    return folder


@pytest.fixture(scope="module", params=names())
def name(request):
    return request.param


@pytest.fixture(scope="module")
def documents(compiled, name):
    return list(yaml.safe_load_all((compiled / f"{name}.yaml").read_text()))


def dags_of(spec):
    """Tasks by name, of the pipeline and of all its sub-pipelines and loops."""
    return [spec["root"]["dag"]] + [c["dag"] for c in spec["components"].values() if "dag" in c]


def steps_of(documents):
    """Every step: its task, its container, what it asks of the cluster."""
    spec, platform = documents
    executors = spec["deploymentSpec"]["executors"]
    kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(kubernetes) == set(executors)
    steps = {}
    for dag in dags_of(spec):
        for task in dag["tasks"].values():
            label = spec["components"][task["componentRef"]["name"]].get("executorLabel")
            if label:
                container = executors[label]["container"]
                env = {item["name"]: item["value"] for item in container["env"]}
                assert env["FLOWLOOM_STEP"] not in steps
                steps[env["FLOWLOOM_STEP"]] = (task, container, kubernetes[label])
    assert len(steps) == len(executors)
    return steps


def test_there_are_three():
    assert set(names()) == set(STEPS)


def test_it_is_the_golden_file(compiled, name, golden):
    golden(f"{name}.yaml", (compiled / f"{name}.yaml").read_text())


def test_another_process_with_another_hash_seed_writes_the_same(compiled, tmp_path):
    out = tmp_path / "again.yaml"
    program = (
        "import pathlib; from pipelines import __main__, clusters; "
        "clusters.OVERLAYS = pathlib.Path('nowhere'); "
        "raise SystemExit(__main__.main())"
    )
    command = [sys.executable, "-c", program, "compile", "continuous_training"]
    subprocess.run(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env=dict(os.environ, PYTHONHASHSEED="7"),
        check=True,
    )
    assert out.read_bytes() == (compiled / "continuous_training.yaml").read_bytes()


def test_each_stage_is_a_step_named_once(documents, name):
    steps = set(steps_of(documents))
    twice = TWICE & STEPS[name]
    assert steps == STEPS[name] | {f"{step}_round_2" for step in twice}
    shown = {task["taskInfo"]["name"] for task, _, _ in steps_of(documents).values()}
    assert shown == {step.replace("_", "-") for step in steps}


def test_every_component_is_used():
    assert set().union(*STEPS.values()) == set(component_names())


def test_the_home_is_where_the_images_have_it():
    assert "FLOWLOOM_HOME=/var/lib/flowloom" in (ROOT / "infra" / "Dockerfile").read_text()


def test_the_engine_caches_what_inputs_decide(documents):
    for step, (task, _, _) in steps_of(documents).items():
        cached = step.removesuffix("_round_2") in DATA_STAGES | {"recall", "tune_generator"}
        assert task["cachingOptions"] == ({"enableCache": True} if cached else {}), step
        given = task.get("inputs", {}).get("parameters", {})
        assert ("sources" in given) == cached, step


def test_steps_are_tried_again_but_promotion(documents):
    for step, (task, _, _) in steps_of(documents).items():
        retries = task.get("retryPolicy", {}).get("maxRetryCount", 0)
        assert retries == (0 if step == "promote" else 2), step


def test_the_exit_handler_hears_of_every_step(documents):
    tasks = documents[0]["root"]["dag"]["tasks"]
    (body,) = set(tasks) - {"end-turn"}
    end = tasks["end-turn"]
    assert end["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    status = end["inputs"]["parameters"]["status"]
    assert status == {"taskFinalStatus": {"producerTask": body}}


def test_parameters_are_few(documents, name):
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]
    assert len(parameters) <= 10
    assert all("defaultValue" in parameter for parameter in parameters.values())
    if name != "tune_generator":
        assert parameters["previous"]["defaultValue"] == "auto"
        assert parameters["members"]["defaultValue"] == [0.0, 1.0, 2.0]


def tasks_of(documents, *path):
    """Where each input of each task comes from, in a sub-pipeline reached through `path`."""
    spec = documents[0]
    dag = spec["root"]["dag"]
    for task in path:
        dag = spec["components"][dag["tasks"][task]["componentRef"]["name"]]["dag"]
    return {
        name: {
            key: given["taskOutputArtifact"]["producerTask"]
            if "taskOutputArtifact" in given
            else f"given {given['componentInputArtifact']}"
            for key, given in task.get("inputs", {}).get("artifacts", {}).items()
        }
        for name, task in dag["tasks"].items()
    }


@pytest.fixture(scope="module")
def whole(compiled):
    return list(yaml.safe_load_all((compiled / "continuous_training.yaml").read_text()))


def test_the_tuned_generator_is_there_before_the_designer_is_trained(whole):
    (body,) = set(tasks_of(whole)) - {"end-turn"}
    sources = tasks_of(whole, body)
    before = {"earlier": "recall", "proposals": "recall"}
    assert sources["train-designer"] == {"catalogue": "tune-and-publish", **before}
    assert sources["tune-and-publish"] == {"earlier": "recall"}
    assert sources["judge-designer"]["catalogue"] == "tune-and-publish"
    assert sources["report"]["generator"] == "tune-and-publish"


def test_the_second_round_goes_on_from_the_first(whole):
    (body,) = set(tasks_of(whole)) - {"end-turn"}
    sources = tasks_of(whole, body, "train-designer")
    data = {"catalogue": "given catalogue", "pairs": "build-pairs"}
    before = {"earlier": "given earlier", "proposals": "given proposals"}
    assert sources["build-triplets"] == {**data, **before}
    earlier = {"earlier": "build-triplets", "proposals": "train-grpo"}
    assert sources["build-triplets-2"] == {**data, **earlier}
    assert "start" not in sources["train-grpo"]
    second = {"triplets": "build-triplets-2", "reward": "calibrate-reward-2"}
    assert sources["calibrate-reward-2"]["triplets"] == second["triplets"]
    loops = [name for name in sources if name.startswith("for-loop")]
    assert len(loops) == 2
    assert sources["calibrate-reward"]["members"] == loops[0]
    assert sources["calibrate-reward-2"]["members"] == loops[1]
    assert sources["train-grpo-2"].items() >= {**second, "start": "train-grpo"}.items()

    dag = whole[0]["components"]["comp-train-designer"]["dag"]
    made = {
        key: selected["artifactSelectors"][0]["producerSubtask"]
        for key, selected in dag["outputs"]["artifacts"].items()
    }
    assert made == {
        **second,
        "designer": "train-sft",
        "start": "train-grpo",
        "adapter": "train-grpo-2",
        "ensemble": loops[1],
    }
    judged = tasks_of(whole, body, "judge-designer")
    for step in ("evaluate", "register"):
        assert judged[step].items() >= {"adapter": "given adapter"}.items()
    assert set(tasks_of(whole, body)["report"]) == {
        "evaluation", "generator", "decision", "designer", "members", "start", "adapter",
    }  # fmt: skip


def test_reward_members_are_trained_at_the_same_time(whole):
    loops = [
        task["parameterIterator"]
        for dag in dags_of(whole[0])
        for task in dag["tasks"].values()
        if "parameterIterator" in task
    ]
    assert [loop["items"] for loop in loops] == 2 * [{"inputParameter": "pipelinechannel--members"}]


def test_it_fits_on_two_screens_and_has_a_readme(name):
    folder = ROOT / "pipelines" / name
    assert len((folder / "pipeline.py").read_text().splitlines()) <= MAX_LINES
    readme = (folder / "README.md").read_text()
    assert readme.startswith(f"# {name}\n")
    assert "| Parameter | Default | Meaning |" in readme
