"""What is deleted, and what is not.

Facts pinned:
- the lineage of the latest turn, of an alias, of an earlier champion and of a pinned run stays;
- what is unfinished, held, waiting in the spool or young stays;
- so does what a run under way reads, wherever it runs, and what a manifest names that is needed;
  a manifest that cannot be read is an error;
- looking deletes nothing; deleting takes run folders, cached models and objects that nothing names;
- an object that a publisher found or wrote meanwhile stays, in a folder and in S3;
- the remote `seed` is never touched, nor a shared one without the registry that knows its users.
"""

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowloom import runs
from flowloom.lifecycle import registry, remotes, retention, spool, storage, versioning
from flowloom.lifecycle.objects import object_key
from flowloom.lifecycle.pointer import dvc_file, read_pointer
from flowloom.lifecycle.records import PINNED, Records, entries_of

DAY_S = 86400.0


@dataclasses.dataclass(frozen=True)
class Config:
    """A stage's configuration."""

    seed: int = 0


def finished(stage, text, inputs=None):
    run = runs.open_run(stage, Config(), inputs or {})
    run.begin()
    (run.out / "a.txt").write_text(text)
    result = run.finish({})
    versioning.publish(result.out_dir)
    return result


def age(seconds=2 * DAY_S, root=None):
    """Make everything of the home that old."""
    then = time.time() - seconds
    for path in (root or runs.home()).rglob("*"):
        os.utime(path, (then, then))


def turn(name, *results, status="finished"):
    folder = runs.home() / "turns" / name
    (folder / "steps").mkdir(parents=True)
    (folder / "turn.json").write_text(json.dumps({"turn": name, "status": status}))
    for number, result in enumerate(results):
        step = {"step": str(number), "digest": result.digest}
        (folder / "steps" / f"{number}.json").write_text(json.dumps(step))


def look(records=None, **options):
    return retention.look(records or Records(), min_age_s=DAY_S, **options)


def names(found, kind):
    return {item.name for item in found.items if item.kind == kind}


def objects():
    return {item.digest for item in storage.objects(remotes.find("store"))}


def test_the_latest_turn_with_all_it_was_made_from_stays():
    pairs = finished("build_pairs", "pairs")
    designer = finished("train_sft", "designer", {"pairs": pairs.digest})
    old = finished("train_sft", "old")
    turn("0001", old)
    turn("0002", designer)
    age()
    before = objects()
    found = look()
    assert names(found, "run") == {str(old.out_dir.parent)}
    assert names(found, "object") == {old.digest, runs.hashlib.md5(b"old").hexdigest()}
    assert objects() == before  # it only looked
    assert retention.delete(found) == found.size > 0
    assert objects() == before - names(found, "object")
    assert not old.out_dir.parent.exists()
    assert designer.out_dir.is_dir()
    assert pairs.out_dir.is_dir()
    assert look().items == ()


def test_what_any_maker_of_a_needed_artifact_read_stays():
    inputs = [finished("build_pairs", text) for text in ("a", "b")]
    twins = [finished("train_sft", "same", {"pairs": result.digest}) for result in inputs]
    assert twins[0].digest == twins[1].digest
    turn("0001", twins[1])
    age()
    assert look().items == ()


def test_a_turn_that_did_not_end_well_stays():
    old, new = finished("train_sft", "old"), finished("train_sft", "new", {"x": "1"})
    turn("0001", old, status="failed")
    turn("0002", new)
    age()
    assert look().items == ()


def test_unfinished_held_waiting_and_young_stay():
    inputs = finished("build_pairs", "input")
    unfinished = runs.open_run("train_sft", Config(1), {"pairs": inputs.digest})
    unfinished.begin()
    held, waits = finished("train_sft", "held"), finished("train_reward", "waits")
    young, old = finished("evaluate", "young"), finished("report", "old")
    entry = spool.Entry(str(waits.out_dir.parent), "train_reward", "finished", None, 0)
    entry.path.parent.mkdir(parents=True, exist_ok=True)
    entry.path.write_text(json.dumps(dataclasses.asdict(entry)))
    age()
    age(3600, young.out_dir.parent)
    with runs.exclusive(runs.Run("train_sft", held.out_dir.parent)):
        found = look()
        assert names(found, "run") == {str(old.out_dir.parent)}
        assert found.young == 1
    assert retention.delete(found)
    for result in (inputs, held, waits, young):
        assert result.out_dir.is_dir()
    assert unfinished.dir.is_dir()


def test_what_somebody_takes_up_meanwhile_stays():
    old, shared = finished("report", "old"), finished("evaluate", "shared")
    age()
    found = look()
    assert len(names(found, "run")) == 2
    shutil.rmtree(old.out_dir.parent)
    versioning.publish(shared.out_dir)  # it finds its objects there, old
    gone = {old.digest, runs.hashlib.md5(b"old").hexdigest()}
    with runs.exclusive(runs.Run("evaluate", shared.out_dir.parent)):
        deleted = retention.delete(found)
    assert deleted == sum(item.size for item in found.items if item.name in gone)
    assert shared.out_dir.is_dir()
    assert objects() == {shared.digest, runs.hashlib.md5(b"shared").hexdigest()}


def test_an_object_that_is_found_while_it_is_deleted_stays(monkeypatch):
    finished("report", "old")
    store, digest = remotes.find("store"), runs.hashlib.md5(b"old").hexdigest()
    path, before_s, replace = Path(store.place, object_key(digest)), time.time(), os.replace
    os.utime(path, (before_s - DAY_S, before_s - DAY_S))

    def late(source, target):
        if Path(source) == path:
            os.utime(path, (before_s + 1, before_s + 1))  # a publisher finds it
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", late)
    assert not storage.remove(store, digest, before_s)
    assert path.read_text() == "old"
    monkeypatch.setattr(storage.os, "replace", None)  # a young one is never away
    assert not storage.remove(store, digest, before_s)


def test_what_a_young_manifest_names_stays():
    old = finished("report", "old")
    age()
    store = Path(remotes.find("store").place)
    manifest = store / "files" / "md5" / old.digest[:2] / old.digest[2:]
    os.utime(manifest)  # its publisher put it a moment ago; its object is old
    assert names(look(), "object") == set()


def test_needed_objects_are_what_the_remote_itself_says(monkeypatch):
    result, rest = finished("train_sft", "designer"), finished("report", "old")
    turn("0001", result)
    age()
    shutil.rmtree(result.out_dir)  # the remote knows
    unneeded = {rest.digest, runs.hashlib.md5(b"old").hexdigest()}
    assert names(look(), "object") == unneeded
    Path(remotes.find("store").place, object_key(result.digest)).unlink()
    result.out_dir.mkdir()
    (result.out_dir / "a.txt").write_text("designer")
    age()
    assert names(look(), "object") == unneeded  # its publisher is not done: the manifest is last

    def read(self, digest):
        raise ValueError("remote 'store': no answer")

    monkeypatch.setattr(remotes.LocalRemote, "read", read)
    with pytest.raises(ValueError, match="no answer"):
        look()


def test_a_cached_model_that_no_alias_names_goes():
    folder = runs.home() / "models" / ("1" * 32)
    folder.mkdir(parents=True)
    (folder / "card.md").write_text("x")
    age()
    found = look()
    assert [(item.kind, item.size) for item in found.items] == [("model cache", 1)]
    retention.delete(found)
    assert not folder.exists()


class Tracker:
    """As much of a client as pins need."""

    def __init__(self, **tags):
        self.tags = {"run": tags}

    def get_run(self, run_id):
        info = SimpleNamespace(run_id=run_id, status="FINISHED")
        return SimpleNamespace(info=info, data=SimpleNamespace(tags=self.tags[run_id], params={}))

    def set_tag(self, run_id, name, value):
        self.tags[run_id][name] = value

    def delete_tag(self, run_id, name):
        del self.tags[run_id][name]


class Pinning(Records):
    """Finds the runs of a `Tracker` with a tag."""

    def search(self, query):
        pinned = PINNED in query
        return [
            self.client.get_run(r) for r, t in self.client.tags.items() if pinned and PINNED in t
        ]


class Scripted(Records):
    """Answers a query with runs of the tags given, by a part of the query."""

    def __init__(self, **answers):
        super().__init__(Tracker())
        self.answers = answers

    def search(self, query):
        tags = next((tags for part, tags in self.answers.items() if part in query), [])
        return [
            SimpleNamespace(info=SimpleNamespace(run_id=f"run{n}"), data=SimpleNamespace(tags=each))
            for n, each in enumerate(tags)
        ]


@pytest.mark.parametrize(
    "answers",
    [
        {"RUNNING": ["flowloom.input.pairs"]},
        {"'turn'": [None], "parentRunId": ["flowloom.digest"]},
        {PINNED: [None], "parentRunId": ["flowloom.digest"]},
    ],
    ids=["read by a run under way", "of the latest turn recorded", "below a pinned turn"],
)
def test_what_the_tracker_says_is_needed_stays(monkeypatch, answers):
    monkeypatch.setattr(retention, "aliases", lambda client: {})
    needed, rest = finished("build_pairs", "pairs"), finished("report", "old")
    age()
    found = look(
        Scripted(**{
            part: [{name: needed.digest} if name else {} for name in names]
            for part, names in answers.items()
        })
    )  # fmt: skip
    assert names(found, "run") == {str(rest.out_dir.parent)}


def test_what_is_held_stays_and_what_nobody_holds_goes():
    older, newer = finished("report", "older"), finished("report", "newer", {"x": "1"})
    turn("0001", older)
    turn("0002", newer)
    lock = runs.home() / "turns" / "0001" / "lock"
    left = runs.home() / "reproduce" / "1"
    left.mkdir(parents=True)
    age()
    with remotes.held(lock, wait=True), remotes.held(left / "lock", wait=True):
        age()
        assert look().items == ()
    age()
    found = look()
    assert {item.kind for item in found.items} == {"run", "object", "reproduction"}
    with remotes.held(left / "lock", wait=True):  # somebody takes it up meanwhile
        retention.delete(found)
    assert left.is_dir()
    (left / "new").touch()
    retention.delete(found)
    assert left.is_dir()
    age()
    (left / "lock").touch()  # whoever looks whether it is held opens it
    retention.delete(found)
    assert not left.exists()


def test_what_data_dvc_names_stays(monkeypatch, tmp_path):
    result = finished("report", "data")
    pointer = read_pointer(result.out_dir.parent / "pointer.json")
    (tmp_path / "data.dvc").write_text(dvc_file(pointer, "data"))
    age()
    assert names(look(), "object") == {result.digest, runs.hashlib.md5(b"data").hexdigest()}
    monkeypatch.setenv("FLOWLOOM_DATA", str(tmp_path / "data"))
    assert names(look(), "object") == set()


def test_a_pinned_run_stays_until_it_is_unpinned(monkeypatch):
    monkeypatch.setattr(retention, "aliases", lambda client: {})
    old = finished("report", "old")
    age()
    records = Pinning(Tracker(**{"flowloom.digest": old.digest, "mlflow.runName": "report"}))
    assert names(look(records), "run") == {str(old.out_dir.parent)}
    retention.pin(records, "run", True)
    assert look(records).items == ()
    assert look(records).kept == {"of pinned run report": 1}
    records.client.tags["run"]["flowloom.artifact"] = json.dumps({"md5": old.digest})
    del records.client.tags["run"]["flowloom.digest"]  # as older runs have it
    assert look(records).items == ()
    retention.pin(records, "run", False)
    retention.pin(records, "run", False)  # twice is no error
    assert names(look(records), "run") == {str(old.out_dir.parent)}


def test_aliases_and_earlier_champions_stay(monkeypatch):
    digests = {v: finished("register", v).digest for v in ("1", "2", "3")}
    age()
    versions = lambda client, version: SimpleNamespace(digest=digests[version])  # noqa: E731
    monkeypatch.setattr(retention, "aliases", lambda client: {"champion": "2"})
    monkeypatch.setattr(
        retention.journal, "read", lambda client: SimpleNamespace(champions=["1", "2"])
    )
    monkeypatch.setattr(retention, "get_version", versions)
    found = look(Pinning(Tracker()))
    (gone,) = names(found, "run")
    assert json.loads((Path(gone) / "result.json").read_text())["digest"] == digests["3"]
    assert found.kept == {
        "of flow-designer@champion": 1, "of an earlier champion, version 1": 1,
    }  # fmt: skip


def test_of_two_registered_versions_the_one_without_an_alias_goes(tracked, make_parts):
    one, _ = registry.register(make_parts("a", weights=b"a"))
    two, version = registry.register(make_parts("b", weights=b"b"))
    assert registry.champion_dir(f"models:/flow-designer/{version}").is_dir()
    age()
    found = look()
    assert names(found, "run") == {str(one.out_dir.parent)}
    assert found.kept["of flow-designer@candidate"] == 1 + len(registry.PARTS)
    retention.delete(found)
    records = Records()
    assert records.subject("flow-designer@candidate").record.folder == two.out_dir.parent
    assert entries_of(two.digest)
    assert entries_of(one.digest) is None


def test_the_seed_and_a_shared_store_are_not_touched(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="never deleted"):
        look(remote="seed")
    seed = Path(remotes.find("seed").place)
    monkeypatch.setenv("FLOWLOOM_STORE", str(seed))
    with pytest.raises(ValueError, match="never deleted"):
        look()
    monkeypatch.setenv("FLOWLOOM_STORE", str(tmp_path / "shared"))
    with pytest.raises(ValueError, match="expected MLFLOW_TRACKING_URI to name it"):
        look()


@pytest.fixture
def bucket(monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("FLOWLOOM_STORE", "s3://artifacts/store")
    client = remotes.find("store")._client
    client.create_bucket(Bucket="artifacts")
    yield client
    server.stop()


def test_objects_in_s3_are_listed_renewed_and_removed(bucket, monkeypatch):
    from flowloom.lifecycle import s3

    old = finished("report", "old")
    store = remotes.find("store")
    listed = {item.digest: item for item in storage.objects(store)}
    digest = runs.hashlib.md5(b"old").hexdigest()
    assert set(listed) == {old.digest, digest}
    assert listed[digest].size == 3
    assert not storage.remove(store, digest, time.time() - 60)
    monkeypatch.setattr(s3, "REFRESH_S", -60.0)  # every object is old
    assert store.has(digest, 3)
    assert store.digest_of(digest) == digest
    bucket.delete_object(Bucket="artifacts", Key=store._at(old.digest)["Key"])
    assert not store._renew(old.digest)
    assert storage.remove(store, digest, time.time() + 60)
    assert not storage.remove(store, digest, time.time() + 60)
    assert objects() == set()
