"""The registered model in Python and behind `mlflow models serve`.

Facts pinned:
- one copy of the files is what `champion_dir`, `flowloom design` and MLflow read;
- MLflow answers prompts with workflows that are valid, their scores and intervals, and with what
  the designer itself says;
- a prompt or parameter out of bounds is refused in one line;
- the served model imports nothing that only training needs, and leaves no file;
- the server answers `inputs` and `dataframe_split` over HTTP.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from flowloom.cli import main
from flowloom.lifecycle import mlflow_model, registry, tracking
from flowloom.lifecycle.config import GateConfig
from flowloom.lifecycle.gate import gate
from flowloom.runs import folder_digest, home, write_json
from flowloom.workflow import Catalogue, Workflow, validate
from tests.evaluation.parts import write_parts

PROMPT = "three red circles"
GUIDANCE = 1.25
ABSENT = ("kfp", "kubernetes", "dvc", "boto3", "datasets", "diffusers", "accelerate", "peft")
"""What a serving image may lack."""
START_S = 480
"""A server imports for half a minute on a free machine, and for minutes on a busy one."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def champion(tracked, parts, tmp_path, evaluation):
    """The champion's version; an untrained designer, promoted on a made-up evaluation."""
    folder = tmp_path / "evaluation"
    folder.mkdir()
    write_json(folder / "evaluation.json", evaluation | {"guidance": GUIDANCE})
    version = registry.register({**parts, "evaluation": folder})[1]
    assert registry.promote(version, gate(evaluation, GateConfig())).promoted
    return registry.champion()


@pytest.fixture
def mlflow(champion, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.tracking_uri())
    import mlflow

    mlflow.set_tracking_uri(tracking.tracking_uri())
    return mlflow


def problems(workflow):
    catalogue = Catalogue.load(registry.champion_dir() / "catalogue.json.gz")
    found = validate(Workflow.from_api(workflow), catalogue)
    return [problem for problem in found if problem.severity == "error"]


def check(answer, prompts, n):
    assert [row["prompt"] for row in answer] == list(prompts)
    for row in answer:
        assert len(row["designs"]) == n
        for design in row["designs"]:
            low, high = design["interval"]
            assert low <= design["score"] <= high
            assert problems(design["workflow"]) == []
            texts = [node["inputs"].get("text") for node in design["workflow"].values()]
            assert row["prompt"] in texts


def test_python_answers_what_the_designer_says(champion, mlflow, capsys):
    import pandas as pd

    from flowloom.designer.design import Designer

    model = mlflow.pyfunc.load_model(registry.CHAMPION_URI)
    answer = model.predict([PROMPT])
    check(answer, [PROMPT], mlflow_model.NUM_DESIGNS)
    folder = registry.champion_dir()
    assert folder_digest(folder) == champion.digest
    # The defaults are the ones of the command line, guidance that of the evaluation.
    (own,) = Designer.load(folder).design([PROMPT], n=4, guidance=GUIDANCE, seed=0)
    assert [d["fingerprint"] for d in answer[0]["designs"]] == [d.fingerprint for d in own]
    assert [d["score"] for d in answer[0]["designs"]] == [d.score for d in own]

    # A table, by whatever name its column goes, and parameters.
    table = pd.DataFrame({"prompt": [PROMPT, "a star"]})
    params = {"n": 2, "guidance": 0.5, "seed": 7}
    several = model.predict(table, params=params)
    check(several, [PROMPT, "a star"], 2)
    own, _ = Designer.load(folder).design([PROMPT, "a star"], **params)
    assert [d["fingerprint"] for d in several[0]["designs"]] == [d.fingerprint for d in own]
    filled = [design.workflow.fill(PROMPT, seed=7).to_api() for design in own]
    assert [design["workflow"] for design in several[0]["designs"]] == filled

    # The command line reads the same files.
    capsys.readouterr()
    asked = ["--n", "2", "--guidance", "0.5", "--seed", "7", "--json"]
    assert main(["design", PROMPT, "--model", registry.CHAMPION_URI, *asked]) == 0
    (said,) = json.loads(capsys.readouterr().out)["results"]
    assert [design["workflow"] for design in said["designs"]] == filled

    for prompts, given, message in (
        ([""], {}, "prompt 1: got an empty prompt"),
        ([PROMPT], {"n": 0}, "n: got 0, expected an integer >= 1"),
        ([PROMPT], {"guidance": -1.0}, "guidance: got -1.0, expected a finite number >= 0"),
    ):
        with pytest.raises(mlflow.exceptions.MlflowException, match=message):
            model.predict(prompts, params=given)


def test_a_version_says_what_it_is(champion, tracked):
    from mlflow.models import Model

    found = tracked.get_model_version(registry.NAME, champion.version)
    assert found.description.startswith("# flow-designer")
    assert "| grpo | 0.5000 | 0.0100 |" in found.description
    folder = tracked.download_artifacts(champion.run_id, mlflow_model.ROOT)
    told = Model.load(folder)
    assert [column["type"] for column in told.signature.inputs.to_dict()] == ["string"]
    defaults = {spec.name: spec.default for spec in told.signature.params.params}
    assert defaults == {"n": 4, "guidance": GUIDANCE, "seed": 0}
    assert str(home()) not in told.to_yaml()
    needed = (Path(folder) / "requirements.txt").read_text()
    assert needed.splitlines() == mlflow_model.requirements()
    listed = [item.path for item in tracked.list_artifacts(champion.run_id, champion.files)]
    assert f"{champion.files}/config.json" in listed


def test_it_needs_little_and_leaves_nothing(champion, mlflow, tmp_path):
    empty = tmp_path / "elsewhere"
    (empty / "tmp").mkdir(parents=True)
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import mlflow
model = mlflow.pyfunc.load_model({registry.CHAMPION_URI!r}, dst_path={str(tmp_path)!r})
print(len(model.predict([{PROMPT!r}], params={{"n": 1}})[0]["designs"]))
"""
    inside = {
        "FLOWLOOM_HOME": str(empty / "home"),
        "HOME": str(empty),
        "TMPDIR": str(empty / "tmp"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=empty, env=os.environ | inside, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "1", done.stderr
    assert [path for path in empty.rglob("*") if path.is_file()] == []


def post(url, body):
    request = urllib.request.Request(
        f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["predictions"]


@pytest.fixture
def server(champion, mlflow, tmp_path):
    """`mlflow models serve` of the champion on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["-m", registry.CHAMPION_URI, "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path / "server.log"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | {"PATH": path}, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/ping", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_answers_over_http(server):
    check(post(server, {"inputs": [PROMPT]}), [PROMPT], 4)
    table = {"columns": ["prompt"], "data": [["a star"], [PROMPT]]}
    body = {"dataframe_split": table, "params": {"n": 2, "guidance": 1.0, "seed": 3}}
    first = post(server, body)
    check(first, ["a star", PROMPT], 2)
    assert post(server, body) == first
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(server, {"inputs": [""]})
    assert refused.value.code == 400
    assert "prompt 1: got an empty prompt" in json.load(refused.value)["message"]
