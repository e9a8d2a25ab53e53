"""Publishing to a folder and fetching from it, by pointer.

Facts pinned:
- `runs.folder_digest` is the digest DVC itself gives a nested folder;
- what is published comes back through plain `dvc pull`, and through `fetch`, byte by byte; `fetch`
  gets what `dvc push` wrote, in a checkout and elsewhere; neither imports DVC;
- nothing is stored twice; a damaged object is mended by publishing again;
- a damaged, truncated or missing object is named: relative path, remote, digest; nothing appears;
- a publisher killed at any moment, or two at once, lose nothing; what the dead left is removed;
- pointers are read from `.dvc` files, JSON and MLflow's tags; what cannot be is refused by name;
- links, odd names, empty folders and manifests that lead out of the folder are refused.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flowloom import runs
from flowloom.lifecycle import objects, remotes, versioning
from flowloom.lifecycle.pointer import Pointer, dvc_file, read_pointer
from flowloom.lifecycle.versioning import Difference

ROOT = Path(__file__).parents[2]
DIGEST = "0123456789abcdef" * 2


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


def store():
    return Path(remotes.find("store").place)


def stored(digest):
    return store() / objects.object_key(digest)


def damage(digest, data):
    stored(digest).chmod(0o644)
    stored(digest).write_bytes(data)


def put_manifest(entries):
    """A manifest of these entries in the store, as a hostile publisher would write one."""
    data = json.dumps(entries).encode()
    digest = objects.md5_of(data) + ".dir"
    stored(digest).parent.mkdir(parents=True, exist_ok=True)
    stored(digest).write_bytes(data)
    return Pointer(digest, 1, len(entries))


def test_dvc_pulls_what_was_published_and_we_fetch_what_dvc_pushed(folder, tmp_path):
    repo = tmp_path / "repo"
    (repo / ".dvc").mkdir(parents=True)
    (repo / ".dvc" / "config").write_text(
        "[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n"
        f"    remote = other\n['remote \"store\"']\n    url = {store()}\n"
        "['remote \"other\"']\n    url = ../pushed\n"
    )
    pointer = versioning.publish(folder)
    (repo / "artifact.dvc").write_text(dvc_file(pointer, "artifact"))
    program = """
from pathlib import Path
from dvc.cli import main
assert main(["pull", "artifact.dvc"]) == 0
Path("artifact.dvc").unlink()  # what DVC computes from the files it pulled
assert main(["add", "artifact"]) == 0
assert main(["push"]) == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=repo, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert contents(repo / "artifact") == contents(folder)
    assert pointer.md5 == runs.folder_digest(folder)
    by_dvc = read_pointer(repo / "artifact.dvc")
    assert by_dvc == dataclasses.replace(pointer, remote="other")
    versioning.fetch(by_dvc, tmp_path / "again", near=repo)
    assert contents(tmp_path / "again") == contents(folder)


def test_the_data_of_the_checkout_comes_from_the_seed_remote(tmp_path, monkeypatch):
    pointer = read_pointer(ROOT / "data.dvc")
    assert pointer.remote == "seed"  # the default of .dvc/config: data.dvc names none
    versioning.fetch(pointer, tmp_path / "near", near=ROOT / "data.dvc")
    assert versioning.verify(tmp_path / "near", pointer) == []
    # elsewhere, where no checkout is around
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWLOOM_DATA", str(tmp_path / "data"))
    with pytest.raises(ValueError, match="got 'seed', expected one of seed, store; outside a"):
        versioning.fetch(pointer, tmp_path / "data")
    monkeypatch.setenv("FLOWLOOM_SEED", str(ROOT / "data-seed"))
    versioning.fetch(pointer, tmp_path / "data")
    assert runs.folder_digest(tmp_path / "data") == pointer.md5


def test_fetch_brings_it_back(folder, tmp_path):
    pointer = versioning.publish(folder)
    into = tmp_path / "new" / "again"
    versioning.fetch(pointer, into)
    assert contents(into) == contents(folder)
    assert sorted(into.parent.iterdir()) == [into]
    with pytest.raises(ValueError, match="expected a path where nothing is yet"):
        versioning.fetch(pointer, into)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a path where nothing is yet"):
        versioning.fetch(pointer, tmp_path / "link")


def test_neither_publishing_nor_fetching_imports_dvc_or_an_s3_client(folder, tmp_path):
    program = (
        "import sys; from pathlib import Path; from flowloom.lifecycle import versioning as v\n"
        f"v.fetch(v.publish(Path({str(folder)!r})), Path({str(tmp_path / 'again')!r}))\n"
        "print({'dvc', 'boto3', 'botocore', 'yaml', 'torch', 'mlflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"set()\n"


def test_objects_are_stored_once(folder):
    first = versioning.publish(folder)
    there = sorted(store().rglob("*"))
    # four distinct contents and the manifest
    assert sum(path.is_file() for path in there) == 5
    inodes = {path: path.stat().st_ino for path in there}
    assert versioning.publish(folder) == first
    assert {path: path.stat().st_ino for path in sorted(store().rglob("*"))} == inodes


def test_a_run_gets_its_pointer(make_run):
    run = make_run()
    pointer = versioning.publish(run.dir / "out")
    assert pointer.md5 == run.result().digest
    assert (run.dir / "pointer.json").read_text() == (
        f'{{\n "md5": "{pointer.md5}",\n "nfiles": 2,\n "remote": "store",\n "size": 14\n}}\n'
    )
    assert read_pointer(run.dir / "pointer.json") == pointer


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"between b and b/c in orderX", "got 27 bytes of digest 72ca"),
        (b"betweex b and b/c in order", "got 26 bytes of digest "),
        (b"between", "got 7 bytes of digest "),
        (None, ""),
    ],
)
def test_damage_is_named_and_mended_by_publishing_again(folder, tmp_path, data, said):
    pointer = versioning.publish(folder)
    digest = runs.file_md5(folder / "b-file.txt")
    if data is None:
        stored(digest).unlink()
        expected = f"remote 'store' ({store()}): b-file.txt: got no object {digest}"
    else:
        damage(digest, data)
        expected = f"remote 'store' ({store()}): b-file.txt: object {digest}: "
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        versioning.fetch(pointer, tmp_path / "new" / "again")
    assert said[:22] in str(caught.value)
    assert list((tmp_path / "new").iterdir()) == []
    (difference,) = versioning.verify_remote(pointer)
    got = None if data is None else objects.md5_of(data)
    assert difference == Difference("b-file.txt", digest, got)

    assert versioning.publish(folder) == pointer
    assert versioning.verify_remote(pointer) == []
    versioning.fetch(pointer, tmp_path / "new" / "again")


def test_a_damaged_or_missing_manifest_is_named(folder, tmp_path):
    pointer = versioning.publish(folder)
    damage(pointer.md5, stored(pointer.md5).read_bytes()[:-5])
    with pytest.raises(ValueError, match=rf"manifest {pointer.md5}: got 352 bytes .*: damaged"):
        versioning.fetch(pointer, tmp_path / "again")
    unknown = dataclasses.replace(pointer, md5=f"{DIGEST}.dir")
    with pytest.raises(ValueError, match=f"got no manifest {DIGEST}.dir, expected it published"):
        versioning.fetch(unknown, tmp_path / "again")
    assert versioning.publish(folder) == pointer
    miscounted = dataclasses.replace(pointer, nfiles=7)
    with pytest.raises(ValueError, match="nfiles: got 7, expected 5"):
        versioning.fetch(miscounted, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_that_differs_is_told_file_by_file(folder):
    pointer = versioning.publish(folder)
    assert versioning.verify(folder, pointer) == []
    flipped = bytearray((folder / "b" / "same.bin").read_bytes())
    flipped[100] ^= 1
    expected = runs.file_md5(folder / "b" / "same.bin")
    (folder / "b" / "same.bin").write_bytes(flipped)
    (folder / "empty").rename(folder / "other")
    found = versioning.verify(folder, pointer)
    empty = objects.md5_of(b"")
    assert [str(item) for item in found] == [
        f"b/same.bin: got digest {objects.md5_of(flipped)}, expected {expected}",
        f"empty: missing, expected digest {empty}",
        f"other: not part of it, digest {empty}",
    ]
    with pytest.raises(ValueError, match="expected a folder"):
        versioning.verify(folder / "nowhere", pointer)


PUBLISHER = """
import os, shutil, signal, sys
from pathlib import Path
from flowloom.lifecycle import versioning
copies, copyfile = 0, shutil.copyfile
def copy(source, target):
    global copies
    copies += 1
    if copies == int(sys.argv[2]):
        Path(target).write_bytes(Path(source).read_bytes()[:10])
        os.kill(os.getpid(), signal.SIGKILL)
    return copyfile(source, target)
shutil.copyfile = copy
versioning.publish(Path(sys.argv[1]))
"""


def test_a_killed_publisher_leaves_whole_objects_and_what_the_next_removes(folder, tmp_path):
    command = [sys.executable, "-c", PUBLISHER, folder, "3"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    for path in (store() / "files").rglob("*"):
        assert path.is_dir() or runs.file_md5(path) == path.parent.name + path.name
    assert any((store() / "partial").iterdir())
    assert not list(store().rglob("*.dir"))
    # One that is being written is nobody's leftover.
    with remotes.held(store() / "partial" / f"{DIGEST}.live", wait=False) as mine:
        assert mine
        pointer = versioning.publish(folder)
        assert [path.name for path in (store() / "partial").iterdir()] == [f"{DIGEST}.live"]
    versioning.fetch(pointer, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


TWO = """
import sys, time
from pathlib import Path
from flowloom.lifecycle import versioning
while not Path(sys.argv[1], "go").exists():
    time.sleep(0.001)
for k in range(10):
    for name in sys.argv[2:]:
        versioning.publish(Path(sys.argv[1], f"{name}{k}"))
"""


def test_two_publishers_at_once_lose_nothing(tmp_path):
    for k in range(10):
        for name in ("left", "right", "both"):
            (tmp_path / f"{name}{k}").mkdir()
            for i in range(5):
                (tmp_path / f"{name}{k}" / f"{i}.bin").write_bytes(f"{name}{k % 5}{i}".encode() * k)
    publishers = [
        subprocess.Popen([sys.executable, "-c", TWO, tmp_path, "both", name])
        for name in ("left", "right")
    ]
    (tmp_path / "go").touch()
    assert [publisher.wait() for publisher in publishers] == [0, 0]
    assert not any((store() / "partial").iterdir())
    for k in range(10):
        for name in ("left", "right", "both"):
            folder = tmp_path / f"{name}{k}"
            pointer = Pointer(runs.folder_digest(folder), 0, 5)
            versioning.fetch(pointer, tmp_path / "again" / folder.name)
            assert contents(tmp_path / "again" / folder.name) == contents(folder)


def test_an_interrupted_fetch_goes_on_and_leaves_nothing(folder, tmp_path, monkeypatch):
    pointer = versioning.publish(folder)
    got = []

    class Flaky(remotes.LocalRemote):
        limit = 2

        def get(self, digest, target):
            if len(got) == self.limit:
                raise remotes.UnreachableError("gone")
            got.append(digest)
            return super().get(digest, target)

    monkeypatch.setattr(remotes, "LocalRemote", Flaky)
    monkeypatch.setattr(remotes, "WORKERS", 1)
    with pytest.raises(remotes.UnreachableError):
        versioning.fetch(pointer, tmp_path / "new" / "again")
    (partial,) = (tmp_path / "new").iterdir()
    assert partial.name == f"again.{pointer.md5[:12]}.partial"
    (partial / "files" / "b-file.txt").write_text("")  # by a disk that lost what was written
    first = set(got)
    got.clear()
    monkeypatch.setattr(Flaky, "limit", 9)
    (tmp_path / "new" / f"again.{DIGEST[:12]}.partial").mkdir()  # of a fetch long dead
    versioning.fetch(pointer, tmp_path / "new" / "again")
    assert contents(tmp_path / "new" / "again") == contents(folder)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["again"]
    txt = runs.file_md5(folder / "b-file.txt")
    assert first & set(got) <= {txt}
    assert len(first | set(got)) == 4


def test_a_file_that_changes_while_it_is_published_is_named(folder, monkeypatch):
    entries, size = objects.read_folder(folder)
    (folder / "b-file.txt").write_text("changed")
    monkeypatch.setattr(versioning, "read_folder", lambda _: (entries, size))
    with pytest.raises(ValueError, match=r"b-file.txt: got digest .*: changed meanwhile"):
        versioning.publish(folder)
    assert not list(store().rglob("*.dir"))


def link(folder):
    (folder / "link").symlink_to(folder / "empty")


def link_to_folder(folder):
    (folder / "link").symlink_to(folder / "b")


def pipe(folder):
    os.mkfifo(folder / "pipe")


def backslash(folder):
    (folder / "a\\b").touch()


def not_utf8(folder):
    (folder / os.fsdecode(b"\xff")).touch()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (link, "'link': is a symbolic link"),
        (link_to_folder, "'link': is a symbolic link"),
        (pipe, "'pipe': is no regular file"),
        (backslash, r"'a\\\\b': has a backslash"),
        (not_utf8, "is not UTF-8"),
    ],
)
def test_what_a_store_cannot_hold_is_refused(folder, spoil, said):
    spoil(folder)
    with pytest.raises(ValueError, match=said):
        versioning.publish(folder)
    assert not store().exists()


def test_nothing_to_publish_and_nowhere_to_publish_to_are_refused(folder, tmp_path, monkeypatch):
    (tmp_path / "nothing" / "in" / "it").mkdir(parents=True)
    for path, said in ((tmp_path / "nothing", "empty folder"), (folder / "empty", "a folder")):
        with pytest.raises(ValueError, match=said):
            versioning.publish(path)
    with pytest.raises(ValueError, match="'seed': is read-only"):
        versioning.publish(folder, "seed")
    with pytest.raises(ValueError, match="remote: got 'backup', expected one of seed, store"):
        versioning.publish(folder, "backup")
    monkeypatch.setenv("FLOWLOOM_STORE", "gs://bucket/store")
    with pytest.raises(ValueError, match="got 'gs://bucket/store', expected a folder or s3://"):
        versioning.publish(folder)


@pytest.mark.parametrize(
    "relpath",
    [
        "../x",
        "a/../../x",
        "/etc/x",
        "a//b",
        "./a",
        "",
        ".",
        "..",
        "a\\..\\x",
        "a\nb",
        "a/",
        3,
        None,
    ],
)
def test_a_manifest_that_leads_out_of_the_folder_is_refused(relpath, tmp_path):
    pointer = put_manifest([{"md5": DIGEST, "relpath": relpath}])
    with pytest.raises(ValueError, match=rf"manifest {pointer.md5}: .*: ") as caught:
        versioning.fetch(pointer, tmp_path / "new" / "again")
    assert repr(relpath) in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{"md5": DIGEST, "relpath": "a"}, {"md5": DIGEST, "relpath": "a"}], "'a': is there twice"),
        ([{"md5": DIGEST, "relpath": "a"}, {"md5": DIGEST, "relpath": "a/b"}], "'a' is a file"),
        ([{"md5": "../../x", "relpath": "a"}], "got md5 '../../x', expected 32"),
        ([{"relpath": "a"}], "got no list of md5 and relpath"),
        ({"md5": DIGEST}, "got no list of md5 and relpath"),
    ],
)
def test_a_manifest_that_makes_no_folder_is_refused(entries, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        versioning.fetch(put_manifest(entries), tmp_path / "again")


def test_pointers_are_read_from_wherever_they_are_written(tmp_path, monkeypatch):
    pointer = Pointer(f"{DIGEST}.dir", 10, 2)
    fields = dataclasses.asdict(pointer)
    (tmp_path / "p.json").write_text(json.dumps(fields))
    (tmp_path / "p.dvc").write_text(dvc_file(pointer, "a: b"))
    tags = {"flowloom.artifact": json.dumps(fields), "mlflow.user": "x"}
    for source in (tmp_path / "p.json", str(tmp_path / "p.dvc"), fields, json.dumps(fields), tags):
        assert read_pointer(source) == pointer
    assert read_pointer(fields, remote="seed").remote == "seed"
    del fields["remote"]
    with pytest.raises(ValueError, match="got no field 'remote'"):
        read_pointer(fields)


DVC = f"outs:\n- md5: {DIGEST}.dir\n  size: 1\n  nfiles: 1\n  hash: md5\n  remote: store\n"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.dvc", DVC.replace("  hash: md5\n", ""), "hash: got None, expected 'md5'"),
        ("p.dvc", DVC + f"- md5: {DIGEST}\n", "expected a .dvc file with one output"),
        ("p.dvc", "outs: [", "expected a .dvc file with one output"),
        ("p.dvc", "- 1", "expected a .dvc file with one output"),
        ("p.dvc", DVC.replace(".dir", ""), "md5: got '[0-9a-f]*', expected a folder's"),
        ("p.dvc", DVC.replace("nfiles: 1", "desc: x"), "got no field 'nfiles'"),
        ("p.dvc", DVC.replace("size: 1", "size: -1"), "size: got -1, expected an integer"),
        ("p.dvc", DVC.replace("store", "a/b"), "remote: got 'a/b', expected a remote's name"),
        ("p.dvc", DVC.replace("remote", "desc"), "got no field 'remote'"),
        ("p.json", "{", "expected a JSON object"),
        ("p.json", "[]", "expected a JSON object"),
        ("p.json", '{"flowloom.artifact": 3}', "p.json: flowloom.artifact: expected a JSON object"),
        ("p.json", "\xff", "expected a JSON object"),
        (None, "", "expected a .dvc file, a JSON file or JSON text"),
    ],
)
def test_what_is_no_pointer_is_named(tmp_path, name, text, said):
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_pointer(tmp_path / (name or "nothing.dvc"))


def test_a_binary_file_is_no_pointer(tmp_path):
    (tmp_path / "p.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"p.json: got no text"):
        read_pointer(tmp_path / "p.json")
