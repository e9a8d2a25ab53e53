"""What is not as it was when a run was made.

Facts pinned:
- another code, data file, catalogue, package version or configuration is named, each once, with how
  to bring it back;
- of many files that differ a few are named and the rest counted;
- a remote that does not answer is passed over, and a value too long to be recorded is no change.
"""

import dataclasses

import pytest

from flowloom import runs
from flowloom.lifecycle import packages, remotes, surroundings, tracking, versioning
from flowloom.lifecycle.pointer import dvc_file
from flowloom.lifecycle.records import Records
from flowloom.lifecycle.run_facts import MAX_TEXT


@dataclasses.dataclass(frozen=True)
class Config:
    """A stage's configuration."""

    text: str = "x"


@pytest.fixture
def record():
    """A run of this checkout."""
    run = runs.open_run("train_sft", Config(), {})
    run.begin()
    (record,) = Records().by_digest(run.finish({}).digest)
    return record


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of data, published; where it is and its pointer."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(surroundings.MAX_FILES + 1):
        (folder / f"{number}.txt").write_text(str(number))
    monkeypatch.setenv("FLOWLOOM_DATA", str(folder))
    return folder, versioning.publish(folder)


def test_what_surrounds_a_run_is_compared(record):
    assert surroundings.changes(Records(), [record]) == []
    other = dataclasses.replace(
        record, code="0" * 64, commit="abc", packages={"numpy": "0.1", "python": "0"}
    )
    lines = surroundings.changes(Records(), [other])
    assert lines[0].endswith("expected 000000000000; git checkout abc")
    assert lines[1] == f"package numpy: got {packages.installed('numpy')}, expected 0.1"
    assert lines[2].startswith("package python")
    assert surroundings.changes(Records(), [other, other]) == lines  # each once


def test_a_changed_data_file_is_named(record, monkeypatch, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("a")
    (data / "b.txt").write_text("b")
    pointer = versioning.publish(data)
    (tmp_path / "data.dvc").write_text(dvc_file(pointer, "data"))
    monkeypatch.setenv("FLOWLOOM_DATA", str(data))
    record = dataclasses.replace(record, data=pointer.md5)
    assert surroundings.changes(Records(), [record]) == []
    (data / "b.txt").write_text("c")  # data.dvc still says that nothing changed
    lines = surroundings.changes(Records(), [record])
    assert lines[0].startswith("data: got ")
    assert "`rm -r data && make data` brings it back" in lines[0]
    digests = [runs.hashlib.md5(text).hexdigest() for text in (b"c", b"b")]
    assert lines[1] == f"data: b.txt: got digest {digests[0]}, expected {digests[1]}"
    find = remotes.find

    def without_seed(name):
        if name == remotes.SEED:
            raise ValueError("remote 'seed': no answer")
        return find(name)

    monkeypatch.setattr(remotes, "find", without_seed)
    assert surroundings.changes(Records(), [record]) == lines  # another remote tells
    monkeypatch.setenv("FLOWLOOM_DATA", str(tmp_path / "nowhere"))
    (line,) = surroundings.changes(Records(), [record])
    assert line == f"data: got nothing at {tmp_path / 'nowhere'}, expected {pointer.md5}"


def test_a_config_json_that_is_not_as_it_was_recorded_is_named(tracked, make_run):
    run = make_run()
    tracking.record_now(run)
    (record,) = Records().by_digest(run.result().digest)
    identity = Records().identity(record)
    assert surroundings.config_changes(Records(), record, identity, identity["config"]) == []
    tampered = {**identity, "config": {"lr": 0.2}}
    lines = surroundings.config_changes(Records(), record, tampered, tampered["config"])
    assert "is not the one the run was made with" in lines[0]
    assert lines[1:] == ["train_sft: config: lr: config.json has 0.2, recorded was 0.1"]


def test_another_catalogue_is_named(record):
    class Turned(Records):
        def turn_param(self, record, name):
            return "0" * 64

    lines = surroundings.changes(Turned(), [record])
    assert len(lines) == 1
    assert lines[0].startswith("catalogue: got hash ")
    assert lines[0].endswith("expected 000000000000")


def test_of_many_files_that_differ_the_rest_is_counted(record, data):
    folder, pointer = data
    record = dataclasses.replace(record, data=pointer.md5)
    for number in range(surroundings.MAX_FILES):
        (folder / f"{number}.txt").write_text("other")
    lines = surroundings.changes(Records(), [record])
    assert len(lines) == 1 + surroundings.MAX_FILES
    assert not any("more files" in line for line in lines)
    (folder / f"{surroundings.MAX_FILES}.txt").write_text("other")
    assert surroundings.changes(Records(), [record])[-1] == "data: 1 more files differ"


def test_the_commit_of_other_data_is_named(record, data):
    folder, pointer = data
    record = dataclasses.replace(record, data=pointer.md5, commit="abc")
    (folder / "0.txt").write_text("other")  # and no data.dvc says otherwise
    line = surroundings.changes(Records(), [record])[0]
    assert line.endswith(f"expected {pointer.md5}; git checkout abc -- data.dvc && make data")


def test_a_value_too_long_to_be_recorded_is_no_change(tracked):
    run = runs.open_run("train_sft", Config(text="x" * (MAX_TEXT + 1)), {})
    run.begin()
    run.finish({})
    tracking.record_now(run)
    (record,) = Records().by_digest(run.result().digest)
    identity = Records().identity(record)
    assert surroundings.config_changes(Records(), record, identity, identity["config"]) == []
