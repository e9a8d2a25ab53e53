"""Facts pinned: what needs no model imports no torch, mlflow or kfp, and errors are one line."""

import json
import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "mlflow", "kfp", "pyarrow", "transformers", "diffusers", "dvc", "pandas"}
PROBE = """
import sys
from flowloom.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("\\n" + " ".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def _imported(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


def test_help_imports_the_standard_library_alone():
    imported = _imported("--help")
    assert not imported & (HEAVY | {"numpy", "rich", "jinja2"})


def test_commands_without_a_model_import_nothing_heavy(good, tmp_path):
    commands = [
        ("validate", good, "--catalogue", "embedded"),
        ("encode", good, "--catalogue", "embedded", "--json"),
        ("sample", "--catalogue", "embedded", "--n", 2, "--out", tmp_path / "s.jsonl"),
        ("catalogue", "show"),
        ("run", "evaluate", "--dry-run"),
        ("doctor",),
    ]
    for command in commands:
        assert not _imported(*command) & HEAVY, command


def test_busy_waiting_is_off_before_torch_can_be_imported():
    program = "import os; from flowloom.cli import main\ntry: main(['--version'])\n"
    program += "except SystemExit: print(os.environ['OMP_WAIT_POLICY'])"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.split()[-1] == "passive"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("bogus",),
        ("validate",),
        ("validate", "x.json"),
        ("validate", "nothing.json", "--catalogue", "embedded"),
        ("validate", ".", "--catalogue", "nothing.json"),
        ("validate", ".", "--catalogue", "http://127.0.0.1:9"),
        ("sample", "--catalogue", "embedded", "--n", "0", "--out", "x.jsonl"),
        ("sample", "--catalogue", "embedded", "--n", "1", "--out", "x.txt"),
        ("encode", "nothing.json", "--cat", "embedded"),
        ("render", "nothing.json", "--out", "x"),
        ("score", "nothing.png", "--prompt", "a star"),
        ("catalogue", "snapshot", "--catalogue", "embedded", "--out", "x.txt"),
        ("run", "bogus"),
        ("run", "evaluate", "--dry-run", "--recipe", "bogus"),
        ("run", "evaluate", "--dry-run", "--set", "num_prompts"),
        ("run", "evaluate", "--dry-run", "--set", "bogus=1"),
        ("run", "evaluate", "--dry-run", "--set", "num_prompts=0"),
        ("run", "evaluate", "--dry-run", "--set", "num_prompts=many"),
        ("run", "evaluate", "--dry-run", "--input", "bogus=."),
        ("run", "evaluate", "--dry-run", "--input", "catalogue=nothing"),
        ("design", "a star", "--n", "none"),
        ("design", "a star", "--model", "nothing"),
        ("design", "a star"),
        ("promote",),
        ("rollback",),
    ],
)
def test_what_a_person_gets_wrong_is_one_line_and_status_2(run, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert status == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("flowloom")
    assert "Traceback" not in err


def test_a_command_names_itself_in_its_error(run):
    _, _, err = run("validate", "nothing.json", "--catalogue", "embedded")
    assert err == "flowloom validate: nothing.json: no such file or folder\n"


def test_json_of_doctor_lists_what_is_missing(run_json, monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWLOOM_DATA", str(tmp_path / "data"))
    status, answer = run_json("doctor")
    assert status == 1
    by_name = {finding["name"]: finding for finding in answer["findings"]}
    assert not by_name["data"]["ok"]
    assert "dvc pull" in by_name["data"]["fix"]
    assert not by_name["champion"]["ok"]
    assert by_name["torch"]["ok"]
    assert by_name["torch"]["fix"] == ""
    assert json.dumps(answer)
