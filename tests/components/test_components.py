"""Components.

Facts pinned:
- every stage of the recipe's turn has a component, and its folder is whole;
- a component is a door: at most 30 lines of code, one call of the library, and what it passes on is
  what its inputs are;
- an optional input is passed on if it is given, and left out if not;
- a step that works with other code or data than the turn began with is refused;
- training and evaluation write a summary for a person: metrics, digest, run;
- the turn begins with a frozen champion and what it goes on from, and its end is recorded;
- what an earlier turn left is handed on; where there is none, so is nothing, and left out again;
- its README has the table that its signature gives.
"""

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
from kfp import dsl

import flowloom.recipes
from components.__main__ import FOLDER, load, main, names, problems
from flowloom import stages
from flowloom.lifecycle import recall, registry, turns
from flowloom.lifecycle.config import GateConfig
from flowloom.lifecycle.steps import folders, markdown
from flowloom.runs import StageResult

MAX_LINES = 30
OPTIONAL = {
    "triplets", "decision", "training", "earlier", "proposals", "parts", "start", "evaluation",
    "generator",
}  # fmt: skip
"""Inputs that a stage can do without and its component may pass on."""


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Scripted stages: what was called, in order."""
    made = []
    out = tmp_path / "run" / "out"
    out.mkdir(parents=True)

    def run(name, config, inputs=None):
        made.append((name, config, dict(inputs or {})))
        return StageResult(name, out, "d.dir", {"eval/score": 0.5}, cached=False)

    monkeypatch.setattr(stages, "run", run)
    monkeypatch.setattr(
        flowloom.recipes,
        "stage_config",
        lambda recipe, stage, changes: GateConfig() if stage == "promote" else (stage, changes),
    )
    monkeypatch.setattr(
        registry,
        "register",
        lambda parts, expected: (run("register", expected, parts), "4"),
    )
    monkeypatch.setattr(
        registry,
        "decide",
        lambda config, version, evaluation, expected: run(
            "promote", (config, version, expected), {"evaluation": evaluation}
        ),
    )
    monkeypatch.setattr(
        registry, "opponent", lambda given: (given, Path("/models/3") if given else None)
    )
    return made


def artifact(kind, name, folder):
    return kind(name=name, uri=str(folder / name), metadata={})


def invoke(name, folder, **parameters):
    """Call a component's function with real artifacts; returns its outputs."""
    function = load(name).python_func
    arguments = {}
    for key, parameter in inspect.signature(function).parameters.items():
        text = str(parameter.annotation)
        if key in parameters:
            arguments[key] = parameters[key]
        elif key in ("members", "parts"):
            arguments[key] = [artifact(dsl.Model, f"{key[:-1]}-{k}", folder) for k in range(3)]
        elif parameter.default not in (inspect.Parameter.empty, None):
            continue
        elif key == "overrides":
            arguments[key] = {name: {"field": 3.0}}
        elif key == "recalled":
            arguments[key] = {}
        elif key == "recipe":
            arguments[key] = "demo"
        elif key == "sources":
            arguments[key] = turns.sources()
        else:
            kinds = (dsl.Dataset, dsl.Model, dsl.Metrics, dsl.HTML, dsl.Markdown)
            kind = next(kind for kind in kinds if kind.__name__ in text)
            arguments[key] = artifact(kind, key, folder)
    return function(**arguments), arguments


def test_every_stage_has_a_component():
    frame = {"begin_turn", "end_turn", "recall", "register", "promote"}
    assert set(names()) == set(stages.STAGES) | frame


@pytest.mark.parametrize("name", names())
def test_a_component_is_a_door(name):
    tree = ast.parse((FOLDER / name / "component.py").read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    docstring = function.body[0]
    lines = function.end_lineno - function.lineno + 1
    code = lines - (docstring.end_lineno - docstring.lineno + 1)
    assert code <= MAX_LINES
    documented = ast.get_docstring(function)
    for argument in function.args.args:
        assert f"{argument.arg}: " in documented


@pytest.mark.parametrize("name", [name for name in names() if name in stages.STAGES])
def test_a_stage_gets_its_inputs_and_hands_its_artifact_on(name, calls, tmp_path):
    more = {"member": 1.0} if name == "train_reward" else {}
    more |= {"champion": ""} if name == "evaluate" else {}
    _, arguments = invoke(name, tmp_path, **more)
    ((stage, config, inputs),) = calls
    assert stage == name
    changes = {"field": 3.0} | ({"member": 1} if name == "train_reward" else {})
    assert config == (name, changes)
    optional = set(inputs) & OPTIONAL
    assert set(inputs) == set(stages.STAGES[name].inputs) | optional
    for key, given in inputs.items():
        if key in ("members", "parts"):
            assert given == [tmp_path / f"{key[:-1]}-{k}" for k in range(3)]
        elif isinstance(given, list):
            assert all(path.parent == tmp_path for path in given)
        else:
            assert given == tmp_path / key
    pointing = [a for a in arguments.values() if isinstance(a, dsl.Artifact) and "out" in a.uri]
    (output,) = (a for a in pointing if a.uri.startswith(str(tmp_path / "run" / "out")))
    assert output.metadata["digest"] == "d.dir"
    if "metrics" in arguments:
        assert arguments["metrics"].metadata == {"eval/score": 0.5}


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("build_triplets", ("earlier", "proposals", "parts")),
        ("train_grpo", ("start",)),
        ("publish_generator", ("generator", "earlier")),
    ],
)
def test_an_input_that_is_not_given_is_left_out(name, absent, calls, tmp_path):
    invoke(name, tmp_path)
    assert set(calls[0][2]) == {*stages.STAGES[name].inputs, *absent}
    invoke(name, tmp_path, **dict.fromkeys(absent))
    assert set(calls[1][2]) == set(stages.STAGES[name].inputs)
    inputs = load(name).component_spec.inputs
    artifacts = {key: field for key, field in inputs.items() if "system." in str(field.type)}
    assert {key for key, field in artifacts.items() if field.optional} == set(absent)


def test_a_part_is_a_field_of_the_stage(calls, tmp_path):
    invoke("build_triplets", tmp_path, part="1/4")
    assert calls[0][1] == ("build_triplets", {"field": 3.0, "part": "1/4"})


CURVES = ("designer", "members", "start", "adapter")


@pytest.mark.parametrize("absent", [(), ("start",), CURVES])
def test_the_report_shows_the_rounds_in_order(absent, calls, tmp_path):
    invoke("report", tmp_path, **dict.fromkeys(absent))
    names = [path.name for path in calls[0][2].get("training", ())]
    every = ["designer", "member-0", "member-1", "member-2", "start", "adapter"]
    assert names == [
        name for name in every if name.split("-")[0].replace("member", "members") not in absent
    ]
    assert ("training" in calls[0][2]) == bool(names)


@pytest.mark.parametrize("name", ["build_pairs", "train_reward"])
def test_other_code_than_the_turn_began_with_is_refused(name, calls, tmp_path):
    more = {"member": 1} if name == "train_reward" else {}
    message = f"{name}: sources: got code-.*, expected the turn's code-other-data-x"
    with pytest.raises(ValueError, match=message):
        invoke(name, tmp_path, sources="code-other-data-x", **more)
    assert calls == []


def test_every_step_that_trains_or_compares_has_a_summary(calls, tmp_path):
    more = {"train_reward": {"member": 1.0}, "evaluate": {"champion": ""}}
    told = [name for name in names() if "summary" in (load(name).component_spec.outputs or {})]
    assert set(told) == {
        "tune_generator", "train_sft", "train_reward", "calibrate_reward", "train_grpo", "evaluate",
    }  # fmt: skip
    for name in told:
        _, arguments = invoke(name, tmp_path / name, **more.get(name, {}))
        text = Path(arguments["summary"].path).read_text()
        assert text.startswith(f"## {name}\n")
        assert "| `eval/score` | 0.5 |" in text
        assert text.endswith(f"Digest `d.dir`, run `{name}/run`\n")


def test_a_summary_is_short(tmp_path):
    metrics = {f"m/{number:03}": 1.0 for number in range(40)}
    result = StageResult("train_sft", tmp_path / "key" / "out", "d.dir", metrics, cached=False)
    text = markdown(result)
    assert text.count("\n| `m/") == 30
    assert "10 more in the step's metrics" in text


def test_a_turn_begins_with_what_it_goes_by(monkeypatch):
    asked = []
    monkeypatch.setattr(turns, "begin", lambda *given: asked.append(given) or "3")
    monkeypatch.setattr(turns, "recalled", lambda *given: found.append(given) or {"version": "2"})
    begin, found = load("begin_turn").python_func, []
    assert begin("p", "demo", {}, "auto", "2") == ("3", {"version": "2"}, turns.sources())
    assert found == [(flowloom.recipes.resolve("demo").build_triplets, "2")]
    with pytest.raises(ValueError, match="recipe: got 'huge', expected one of"):
        begin("p", "huge", {}, "auto", "")
    assert asked == [("p", "demo", {}, "auto"), ("p", "huge", {}, "auto")]


LEFT = ("catalogue", "triplets", "adapter")


def test_what_an_earlier_turn_left_is_handed_on(monkeypatch, tmp_path):
    for name in LEFT:
        (tmp_path / "left" / name).mkdir(parents=True)
    monkeypatch.setattr(recall, "bring", lambda digest: tmp_path / "left" / digest.split()[1])
    digests = {name: f"of {name}" for name in LEFT}
    _, arguments = invoke("recall", tmp_path, recalled={"version": "2", **digests})
    given = folders(**{name: arguments[name] for name in LEFT})
    assert given == {name: tmp_path / "left" / name for name in LEFT}
    assert all(arguments[name].metadata["digest"] == digests[name] for name in LEFT)
    with pytest.raises(
        ValueError, match=r"recall: sources: got code-.*, expected the turn's code-x"
    ):
        invoke("recall", tmp_path, recalled={}, sources="code-x")


def test_a_first_turn_is_handed_nothing(tmp_path):
    _, arguments = invoke("recall", tmp_path, recalled={})
    nothing = {name: arguments[name] for name in LEFT}
    assert folders(**nothing) == {}
    assert folders(members=list(nothing.values())) != {}  # in a list a gap would go unseen


def test_the_end_of_a_turn_is_recorded(monkeypatch):
    told = []
    monkeypatch.setattr(turns, "close", lambda *given: told.append(given))
    status = SimpleNamespace(state="FAILED", error_message="Task turn failed.")
    load("end_turn").python_func(status)
    assert told == [("FAILED", "Task turn failed.")]


def test_evaluate_compares_with_the_champion(calls, tmp_path):
    compared, _ = invoke("evaluate", tmp_path, champion="3")
    assert compared == "3"
    assert calls[0][2]["champion"] == Path("/models/3")


def test_register_gives_the_version(calls, tmp_path):
    version, _ = invoke("register", tmp_path, champion="3")
    assert version == "4"
    ((_, expected, parts),) = calls
    assert expected == "3"
    assert set(parts) == set(registry.PARTS)


def test_promote_decides_for_the_version(calls, tmp_path):
    invoke("promote", tmp_path, version="4", champion="")
    assert calls == [
        ("promote", (GateConfig(), "4", None), {"evaluation": tmp_path / "evaluation"})
    ]


@pytest.mark.parametrize("name", names())
def test_the_folder_is_whole(name):
    assert problems(name, write=False) == []


def test_a_stale_readme_is_reported(monkeypatch, tmp_path, capsys):
    import components.__main__ as command

    folder = tmp_path / "build_pairs"
    folder.mkdir()
    for file in ("README.md", "metadata.yaml", "component.py"):
        text = (FOLDER / "build_pairs" / file).read_text()
        (folder / file).write_text(text.replace("| `recipe` | String |", "| `recipe` | Text |"))
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    assert main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().out
    assert main(["--write"]) == 0
    assert main(["--check"]) == 0


def test_the_wrong_usage_is_told(capsys):
    assert main([]) == 2


def test_images_are_named_in_one_place():
    found = SimpleNamespace(cpu=set(), gpu=set())
    for name in names():
        image = load(name).component_spec.implementation.container.image
        (found.gpu if "/gpu:" in image else found.cpu).add(name)
    frame = {"begin_turn", "end_turn", "recall", "register", "promote", "report"}
    assert found.cpu == frame | {"build_pairs", "publish_generator"}
    assert found.cpu | found.gpu == set(names())
