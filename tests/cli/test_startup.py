"""Facts pinned: what needs no model imports no torch, mlflow or kfp, and for a pipe not even rich;
errors are one line; an interrupt and a reader that leaves end a command quietly."""

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
        ("validate", good, "--catalogue", "comfyui-0.33"),
        ("convert", good, "--to", "ui", "--catalogue", "embedded", "--out", tmp_path / "ui"),
        ("encode", good, "--catalogue", "embedded", "--json"),
        ("sample", "--catalogue", "embedded", "--n", 2, "--out", tmp_path / "s.jsonl"),
        ("catalogue", "diff", "embedded", "comfyui-0.33"),
        ("catalogue", "show"),
        ("run", "evaluate", "--dry-run"),
        ("doctor",),
    ]
    for command in commands:
        assert not _imported(*command) & HEAVY, command


@pytest.mark.parametrize("command", ["validate", "encode"])
def test_plain_text_needs_no_rich(good, command):
    assert "rich" not in _imported(command, good, "--catalogue", "embedded")


def test_validation_needs_no_numpy(good):
    assert "numpy" not in _imported("validate", good, "--catalogue", "comfyui-0.33")


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
        ("convert", ".", "--catalogue", "embedded", "--out", "x"),
        ("convert", ".", "--to", "png", "--catalogue", "embedded", "--out", "x"),
        ("validate", ".", "--catalogue", "embedded", "--header", "secret"),
        ("catalogue",),
        ("catalogue", "diff", "embedded"),
        ("sample", "--catalogue", "embedded", "--n", "1", "--out", "x.jsonl", "--profile", "x"),
        ("design", "a star", "--format", "png"),
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


def test_a_reader_that_leaves_ends_the_command_quietly(good, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        good.read_text().replace("\n", "") + "\n" + "{}\n" * 20_000
    )
    command = [sys.executable, "-m", "flowloom", "validate", tmp_path / "rows.jsonl"]
    with subprocess.Popen(
        [*command, "--catalogue", "embedded"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == f"{tmp_path}/rows.jsonl:1: valid\n".encode()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_an_interrupt_is_one_line(run, monkeypatch, good):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("flowloom.cli.validate.check", interrupted)
    status, out, err = run("validate", good, "--catalogue", "embedded")
    assert (status, out, err) == (130, "", "flowloom validate: interrupted\n")


def test_json_stays_alone_on_standard_output(good, tmp_path):
    command = [sys.executable, "-m", "flowloom", "validate", good, "gone", "--json"]
    done = subprocess.run(
        [*command, "--catalogue", "embedded"], capture_output=True, text=True, check=False
    )
    assert len(done.stdout.splitlines()) == 1
    assert len(json.loads(done.stdout)["results"]) == 2
    assert done.stderr == "flowloom validate: gone: no such file or folder\n"
    assert done.returncode == 2


def test_names_that_the_encoding_lacks_are_spelled(tmp_path, good):
    path = tmp_path / "\u661f.json"
    path.write_text(good.read_text())
    done = subprocess.run(
        [sys.executable, "-m", "flowloom", "validate", path, "--catalogue", "embedded"],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.stdout.splitlines()[0].endswith(b"\\u661f.json: valid")


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
