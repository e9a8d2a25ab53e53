"""The store.

Facts pinned:
- `runs.folder_digest` is the digest DVC itself gives a nested folder;
- a published folder comes back through plain `dvc pull`, and through `fetch`, byte by byte;
- nothing is stored twice, a damaged or missing object is named.
"""

import subprocess
import sys

import pytest

from flowloom import runs
from flowloom.lifecycle import versioning


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "artifact"
    (root / "b" / "c").mkdir(parents=True)
    (root / "b-file.txt").write_text("between b and b/c in order")
    (root / "b" / "c" / "weights.bin").write_bytes(bytes(range(256)))
    (root / "b" / "same.bin").write_bytes(bytes(range(256)))
    (root / "empty").write_bytes(b"")
    (root / "Gross \u00e9.json").write_text("{}")
    return root


def contents(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_dvc_gives_the_same_digest_and_pulls_what_was_published(folder, tmp_path):
    def dvc(*arguments):
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    repo = tmp_path / "repo"
    (repo / ".dvc").mkdir(parents=True)
    (repo / ".dvc" / "config").write_text(
        "[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n"
        f"['remote \"store\"']\n    url = {versioning.store_dir()}\n"
    )
    pointer = versioning.publish(folder)
    (repo / "artifact.dvc").write_text(versioning.dvc_file(pointer, "artifact"))
    dvc("pull", "--remote", "store", "artifact.dvc")
    assert contents(repo / "artifact") == contents(folder)
    # What DVC computes from the files is what we computed.
    (repo / "artifact.dvc").unlink()
    dvc("add", "artifact")
    assert f"md5: {runs.folder_digest(folder)}\n" in (repo / "artifact.dvc").read_text()
    assert pointer.md5 == runs.folder_digest(folder)
    assert f"nfiles: {pointer.nfiles}\n" in (repo / "artifact.dvc").read_text()
    assert f"size: {pointer.size}\n" in (repo / "artifact.dvc").read_text()


def test_fetch_brings_it_back(folder, tmp_path):
    pointer = versioning.publish(folder)
    versioning.fetch(pointer, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    with pytest.raises(ValueError, match="expected a path where nothing is yet"):
        versioning.fetch(pointer, tmp_path / "again")


def test_objects_are_stored_once(folder):
    first = versioning.publish(folder)
    stored = sorted(versioning.store_dir().rglob("*"))
    # four distinct contents and the manifest
    assert sum(path.is_file() for path in stored) == 5
    assert versioning.publish(folder) == first
    assert sorted(versioning.store_dir().rglob("*")) == stored


def test_a_run_gets_its_pointer(make_run):
    run = make_run()
    pointer = versioning.publish(run.dir / "out")
    assert pointer.md5 == run.result().digest
    assert (run.dir / "pointer.json").read_text() == (
        f'{{\n "md5": "{pointer.md5}",\n "nfiles": 2,\n "remote": "store",\n "size": 14\n}}\n'
    )


def test_damage_is_named(folder, tmp_path):
    pointer = versioning.publish(folder)
    digest = runs.file_md5(folder / "b-file.txt")
    stored = versioning.store_dir() / "files" / "md5" / digest[:2] / digest[2:]
    stored.write_text("other")
    with pytest.raises(ValueError, match=f"object {digest} has digest .*: damaged"):
        versioning.fetch(pointer, tmp_path / "again")
    stored.unlink()
    with pytest.raises(ValueError, match=f"got no object {digest}"):
        versioning.fetch(pointer, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_url_is_refused_for_now(monkeypatch, folder):
    monkeypatch.setenv("FLOWLOOM_STORE", "s3://bucket/store")
    with pytest.raises(ValueError, match="FLOWLOOM_STORE: got 's3://bucket/store'"):
        versioning.publish(folder)
