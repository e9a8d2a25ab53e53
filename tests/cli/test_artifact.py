"""Facts pinned: a pointer that `publish` prints or writes is what `fetch` and `verify` take; a
difference is status 1 and named, wrong usage one line and status 2; nothing heavy is imported;
`doctor` names the file of `data/` that is not as recorded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flowloom import runs
from flowloom.lifecycle.objects import md5_of, object_key

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "artifact"
    (root / "model").mkdir(parents=True)
    (root / "model" / "weights.bin").write_bytes(bytes(1000))
    (root / "card.md").write_text("# card")
    return root


def test_publish_fetch_verify(run, run_json, folder, tmp_path):
    status, pointer = run_json("artifact", "publish", folder)
    digest = runs.folder_digest(folder)
    assert (status, pointer) == (
        0,
        {"md5": digest, "size": 1006, "nfiles": 2, "remote": "store"},
    )
    into = tmp_path / "again"
    assert run("artifact", "fetch", json.dumps(pointer), "--into", into) == (
        0,
        f"{into}: 2 files, 1006 bytes\n",
        "",
    )
    assert runs.folder_digest(into) == digest
    pointer_path = tmp_path / "artifact.dvc"
    assert run("artifact", "publish", folder, "--out", pointer_path)[0] == 0
    assert run("artifact", "verify", pointer_path, into) == (
        0,
        f"{into}: 2 files as in {digest}\n",
        "",
    )
    assert run("artifact", "verify", pointer_path)[0] == 0
    status, answer = run_json("artifact", "fetch", pointer_path, "--into", tmp_path / "more")
    assert (status, answer) == (0, {"path": str(tmp_path / "more"), **pointer})


def test_a_difference_is_named_with_status_1(run, run_json, folder, tmp_path):
    pointer_path = tmp_path / "p.json"
    assert run("artifact", "publish", folder, "--out", pointer_path)[0] == 0
    expected = md5_of(b"# card")
    (folder / "card.md").write_text("# cart")
    said = f"card.md: got digest {md5_of(b'# cart')}, expected {expected}"
    assert run("artifact", "verify", pointer_path, folder) == (1, f"{folder}: {said}\n", "")
    status, answer = run_json("artifact", "verify", pointer_path, folder)
    assert (status, answer) == (
        1,
        {"differences": [{"relpath": "card.md", "expected": expected, "got": md5_of(b"# cart")}]},
    )
    (runs.home() / "store" / object_key(expected)).unlink()
    status, out, _ = run("artifact", "verify", pointer_path)
    assert (status, out) == (1, f"remote store: card.md: missing, expected digest {expected}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("publish",), "the following arguments are required: DIR"),
        (("publish", "nowhere"), "got 'nowhere', expected a folder"),
        (("publish", "empty"), "empty: got an empty folder, expected at least one file"),
        (("publish", "full", "--remote", "seed"), "remote 'seed': is read-only"),
        (("publish", "full", "--remote", "x"), "remote: got 'x', expected one of seed, store"),
        (("publish", "full", "--out", "p.txt"), "--out: got 'p.txt', expected FILE.dvc or"),
        (("fetch", "nowhere.dvc", "--into", "x"), "got 'nowhere.dvc', expected a .dvc file"),
        (("fetch", "{}", "--into", "x"), "pointer: got no field 'md5'"),
        (("fetch", "good.json", "--into", "full"), "got 'full', expected a path where nothing"),
        (("fetch", "good.json", "--into", "x"), "got no manifest 00000000000000000000000000000000"),
        (("fetch", "good.json"), "the following arguments are required: --into"),
        (("verify", "good.json", "nowhere"), "got 'nowhere', expected a folder"),
        (("verify", "good.json", "--remote", "x"), "remote: got 'x', expected one of"),
        (("bogus",), "invalid choice: 'bogus'"),
    ],
)
def test_what_a_person_gets_wrong_is_one_line(run, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full", "file").touch()
    Path("good.json").write_text(
        json.dumps({"md5": f"{'0' * 32}.dir", "size": 1, "nfiles": 1, "remote": "store"})
    )
    status, out, err = run("artifact", *arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("flowloom artifact")
    assert said in err
    assert not Path("x").exists()


def test_nothing_heavy_is_imported(folder):
    program = (
        "import sys; from flowloom.cli import main; main(sys.argv[1:])\n"
        "print(sorted({'dvc', 'boto3', 'torch', 'mlflow', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, "artifact", "publish", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_doctor_names_the_file_that_is_not_as_recorded(run_json, tmp_path, monkeypatch):
    for name in ("data.dvc", ".dvc/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "data-seed").symlink_to(ROOT / "data-seed")
    assert run_json("artifact", "fetch", tmp_path / "data.dvc", "--into", tmp_path / "data")[0] == 0
    monkeypatch.setenv("FLOWLOOM_DATA", str(tmp_path / "data"))

    def found():
        findings = run_json("doctor")[1]["findings"]
        return next(finding for finding in findings if finding["name"] == "data.dvc")

    assert found()["ok"]
    path = tmp_path / "data" / "models" / "files.json"
    data = bytearray(path.read_bytes())
    expected = md5_of(data)
    data[10] ^= 1
    path.write_bytes(data)
    assert not found()["ok"]
    assert found()["detail"] == (
        f"models/files.json: got digest {md5_of(data)}, expected {expected}"
    )
    shutil.rmtree(tmp_path / ".dvc")  # as in an image: no checkout says where the remote is
    assert "the folder is another; remote: got 'seed'" in found()["detail"]
    data[10] ^= 1
    path.write_bytes(data)
    assert found()["ok"]
