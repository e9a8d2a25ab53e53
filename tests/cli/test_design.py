"""Facts pinned: the JSON shape of `design`; pictures carry their workflow; constraints hold; the
same seed gives the same designs."""

import json

import pytest

from flowloom.render import png
from flowloom.workflow import Catalogue, Workflow, validate
from flowloom.workflow.canvas import from_ui
from flowloom.workflow.png import read_chunks
from tests.evaluation.parts import write_model, write_parts

FIELDS = {"workflow", "score", "interval", "tokens", "fingerprint", "images", "rendered_score"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    return write_model(root / "model", write_parts(root))


def test_designs_are_ranked_valid_and_complete(run_json, model):
    status, answer = run_json(
        "design", "two red stars", "a circle", "--model", model, "--n", 3, "--seed", 7
    )
    assert status == 0
    assert [result["prompt"] for result in answer["results"]] == ["two red stars", "a circle"]
    catalogue = Catalogue.load(model / "catalogue.json.gz")
    for result in answer["results"]:
        designs = result["designs"]
        assert len(designs) == 3
        assert [set(design) for design in designs] == [FIELDS] * 3
        scores = [design["score"] for design in designs]
        assert scores == sorted(scores, reverse=True)
        for design in designs:
            workflow = Workflow.from_api(design["workflow"])
            assert validate(workflow, catalogue) == []
            assert "{prompt}" not in json.dumps(design["workflow"])
            low, high = design["interval"]
            assert 0 <= low <= high <= 1
            assert (design["images"], design["rendered_score"]) == ([], None)
            template = workflow.template_fingerprint(prompt=result["prompt"])
            assert template == design["fingerprint"]
    again = run_json("design", "two red stars", "a circle", "--model", model, "--n", 3, "--seed", 7)
    assert again == (0, answer)


def test_render_writes_pictures_and_scores_them(run_json, model, tmp_path):
    out = tmp_path / "out"
    status, answer = run_json(
        "design", "a red star", "--model", model, "--n", 2, "--render", "--out", out
    )
    assert status == 0
    for rank, design in enumerate(answer["results"][0]["designs"], start=1):
        assert design["images"] == [str(out / f"a-red-star-{rank}.png")]
        assert 0 <= design["rendered_score"] <= 1
        workflow = Workflow.from_api(design["workflow"])
        embedded = png.read(design["images"][0])[1]
        assert embedded is not None
        assert embedded.fingerprint() == workflow.fingerprint()
        assert json.loads((out / f"a-red-star-{rank}.json").read_text()) == design["workflow"]


def test_designs_for_the_editor_are_the_same_workflows(run_json, model, tmp_path):
    command = ("design", "a red star", "--model", model, "--n", 2, "--out", tmp_path / "out")
    catalogue = Catalogue.load(model / "catalogue.json.gz")
    _, plain = run_json(*command)
    status, answer = run_json(*command, "--format", "ui")
    assert status == 0
    pairs = zip(plain["results"][0]["designs"], answer["results"][0]["designs"], strict=True)
    for rank, (api, ui) in enumerate(pairs, start=1):
        assert json.loads((tmp_path / f"out/a-red-star-{rank}.json").read_text()) == ui["workflow"]
        assert len(ui["workflow"]["nodes"]) == len(api["workflow"])
        back = from_ui(ui["workflow"], catalogue).workflow
        assert back.fingerprint() == Workflow.from_api(api["workflow"]).fingerprint()
    # A picture then opens in the editor as it was laid out.
    _, answer = run_json(*command, "--format", "ui", "--render")
    (design, _) = answer["results"][0]["designs"]
    chunks = read_chunks(design["images"][0])
    assert json.loads(chunks["workflow"]) == design["workflow"]
    assert "class_type" in chunks["prompt"]


def test_table_for_people_and_explanation(run, model, tmp_path):
    status, out, err = run("design", "a star", "--model", model, "--n", 2, "--explain")
    assert status == 0
    assert "predicted" in out
    assert "1: SaveImage" in out
    assert err == "--out DIR writes the workflows\n"


def test_a_prompt_the_rubric_cannot_judge_is_rendered_but_not_scored(run, model, tmp_path):
    out = tmp_path / "out"
    command = ("design", "a lion", "--model", model, "--n", 1, "--render", "--out", out)
    status, _, err = run(*command)
    assert status == 0
    assert "not scored" in err
    assert "lion" in err
    assert (out / "a-lion-1.png").is_file()


@pytest.mark.parametrize("policy", ["sft", "best_fixed", "retrieval", "random"])
def test_every_policy_answers(run_json, model, policy):
    status, answer = run_json("design", "a star", "--model", model, "--n", 1, "--policy", policy)
    assert status == 0
    assert len(answer["results"][0]["designs"]) == 1


def test_the_prompt_stands_in_the_workflow(run_json, model):
    # Not in each: a workflow may leave the text out, and a barely trained designer often does.
    command = ("design", "two red stars", "--model", model, "--n", 16, "--policy", "random")
    _, answer = run_json(*command)
    assert "two red stars" in json.dumps(answer["results"][0]["designs"])


def test_constraints_hold(run_json, run, model):
    options = ("--model", model, "--n", 2, "--policy", "random")
    constraints = ("--require", "steps=8", "--forbid", "ImageSharpen")
    status, answer = run_json("design", "a star", *options, *constraints)
    assert status == 0
    for design in answer["results"][0]["designs"]:
        nodes = design["workflow"].values()
        assert all(node["class_type"] != "ImageSharpen" for node in nodes)
        assert {n["inputs"]["steps"] for n in nodes if "steps" in n["inputs"]} <= {8}
    status, _, err = run("design", "a star", *options, "--forbid", "Bogus")
    assert status == 2
    assert "Bogus" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("star " * 2000, "prompt 2: got a prompt of 9999 characters"), (" ", "got an empty prompt")],
)
def test_prompts_without_end_or_content_are_refused(run, model, prompt, said):
    status, out, err = run("design", "a star", prompt, "--model", model)
    assert (status, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
