"""Facts pinned: what is drawn is valid, follows the constraints and depends on the seed alone; a
file appears whole or not at all."""

import json

import pytest

from flowloom.cli import sample as module
from flowloom.workflow import Catalogue, Workflow, validate

EXAMPLE = ("--catalogue", "example")
CORE = "CheckpointLoaderSimple,CLIPTextEncode,EmptyLatentImage,KSampler,VAEDecode,SaveImage"


@pytest.fixture
def draw(run, tmp_path):
    """Draw workflows; gives the rows and the bytes."""

    def command(name, *options, n=20, seed=1):
        path = tmp_path / f"{name}.jsonl"
        status, out, err = run("sample", "--n", n, "--seed", seed, "--out", path, *options)
        assert (status, out) == (0, ""), err
        rows = [json.loads(line)["workflow"] for line in path.read_text().splitlines()]
        assert len(rows) == n
        return rows, path.read_bytes()

    return command


def _values(rows, name):
    return {node["inputs"][name] for row in rows for node in row.values() if name in node["inputs"]}


def _classes(rows):
    return {node["class_type"] for row in rows for node in row.values()}


def _valid(rows, name):
    catalogue = Catalogue.load(name)
    return all(not validate(Workflow.from_api(row), catalogue) for row in rows)


def test_the_seed_alone_decides(draw):
    embedded = ("--catalogue", "embedded")
    rows, first = draw("first", *embedded, n=40)
    assert _valid(rows, "embedded")
    assert draw("again", *embedded, n=40)[1] == first
    assert draw("other", *embedded, n=40, seed=2)[1] != first
    # The first of many are the few.
    assert first.startswith(draw("few", *embedded, n=7)[1])


def test_constraints_hold_over_a_server_s_catalogue(draw):
    path = "data/catalogues/example.json.gz"
    rows, _ = draw("free", *EXAMPLE, n=60)
    assert _valid(rows, path)
    assert len(_values(rows, "steps")) > 1
    rows, _ = draw("bound", *EXAMPLE, "--require", "steps=20", "--forbid", "LoraLoader")
    assert _valid(rows, path)
    assert _values(rows, "steps") == {20}
    assert "LoraLoader" not in _classes(rows)
    rows, _ = draw("few", *EXAMPLE, "--classes", CORE)
    assert _classes(rows) <= set(CORE.split(","))


def test_a_profile_may_be_a_file(draw, tmp_path):
    _, by_option = draw("option", *EXAMPLE, "--classes", CORE)
    (tmp_path / "lines.txt").write_text(CORE.replace(",", "\n") + "\nUnheard\n")
    assert draw("lines", *EXAMPLE, "--profile", tmp_path / "lines.txt")[1] == by_option
    (tmp_path / "list.json").write_text(json.dumps(CORE.split(",")))
    assert draw("list", *EXAMPLE, "--profile", tmp_path / "list.json")[1] == by_option


def test_a_budget_bounds_the_length(draw, run_json, tmp_path):
    draw("short", *EXAMPLE, "--classes", CORE, "--budget", 36, n=400)
    status, answer = run_json("encode", tmp_path / "short.jsonl", *EXAMPLE)
    assert status == 0
    assert max(len(row["tokens"]) for row in answer["results"]) <= 36
    draw("long", *EXAMPLE, "--classes", CORE, n=400)
    _, answer = run_json("encode", tmp_path / "long.jsonl", *EXAMPLE)
    assert max(len(row["tokens"]) for row in answer["results"]) > 36


def test_examples_draw_more_like_them(draw, run, good, workflow, tmp_path):
    embedded = ("--catalogue", "embedded")

    def share(rows):
        samplers = [n for row in rows for n in row.values() if n["class_type"] == "KSampler"]
        return sum(node["inputs"]["steps"] == 8 for node in samplers) / len(samplers)

    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(workflow) + "\n" for _ in range(200)))
    free, _ = draw("free", *embedded, n=200)
    like, _ = draw("like", *embedded, "--like", path, good, n=200)
    assert share(like) > 0.9 > share(free)
    assert _valid(like, "embedded")
    out = tmp_path / "x.jsonl"
    status, _, err = run(
        "sample", *embedded, "--n", 1, "--out", out, "--like", good, "--like", "gone"
    )
    assert status == 2
    assert err.splitlines()[0] == "flowloom sample: gone: no such file or folder"
    assert out.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--classes", "Unheard"), "Unheard"),
        (("--forbid", "Unheard"), "Unheard"),
        (("--require", "steps=none"), "steps"),
        (("--budget", "3"), "budget"),
        (("--profile", "gone.txt"), "gone.txt"),
        (("--classes", CORE, "--profile", "t2i"), "not allowed with"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(run, tmp_path, options, says):
    out = tmp_path / "x.jsonl"
    status, _, err = run("sample", "--catalogue", "embedded", "--n", 1, "--out", out, *options)
    assert status == 2
    assert says in err
    assert len(err.splitlines()) == 1
    assert not out.exists()


def test_an_interrupt_leaves_no_file(run, monkeypatch, tmp_path):
    def stream(*arguments):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(module, "stream", stream)
    out = tmp_path / "x.jsonl"
    status, _, err = run("sample", "--catalogue", "embedded", "--n", 1, "--out", out)
    assert (status, err) == (130, "flowloom sample: interrupted\n")
    assert list(tmp_path.iterdir()) == []
