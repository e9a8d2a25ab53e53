"""Pins: killed at random moments and started again, a build ends with the bytes of one that was
not; shards made on several machines join to the same bytes, in plans of one round and of several; a
shard that was cut, changed, lost or made for another plan is named, and never used."""

import dataclasses
import errno
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flowloom.dataset.cells import Cell
from flowloom.dataset.shards import Round, ShardFiles, estimate_work
from flowloom.dataset.triplet_rows import shard_schema
from flowloom.render.engine import Engine, batch_key
from flowloom.runs import folder_entries
from flowloom.shapes.prompts import parse
from tests.dataset.small import CONFIG, PLAIN, build, build_small_pairs
from tests.render.tiny import CHECKPOINTS, flow, write_world

SCHEMA = shard_schema(("faithfulness",))
KILLS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_small_pairs(write_world(tmp_path_factory.mktemp("world")))


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    build(world, folder, PLAIN)
    return folder


def entries(folder):
    return folder_entries(folder / "out.partial")


def shards(folder):
    return sorted((folder / "work").glob("round-*.parquet"))


def made_round(size=4):
    """Nine cells of two checkpoints with two seeds each; the last three steer nothing."""
    cells = []
    for k in range(9):
        workflow = flow(CHECKPOINTS[k % 2], steps=3 + k).canonical()
        split = "train" if k < 6 else "calibration"
        spec = parse(("a red circle", "two stars")[k % 2])
        name = workflow.template_fingerprint()
        cells.append(Cell(spec, workflow, name, split, "random", (2 * k, 2 * k + 1)))
    return Round(3, cells, size, "catalogue rubric")


def scores_of(shard):
    places = shard.places.astype(float)
    return {"score": places / 100, "faithfulness": places / 50, "flops": shard.places}


def test_a_round_is_cut_into_shards():
    round_ = made_round()
    assert round_.num_renders == 18
    steering, others = round_.shards[:3], round_.shards[3:]
    assert round_.num_steering == len(steering) == 3
    assert sorted(place for s in steering for place in s.places) == list(range(12))
    assert sorted(place for s in others for place in s.places) == list(range(12, 18))
    assert sorted(shard.name for shard in round_.shards) == [f"round-3-{k:05d}" for k in range(5)]
    for shards_ in (steering, others):
        work = [sum(estimate_work(job.workflow) for job in round_.jobs(shard)) for shard in shards_]
        assert work == sorted(work, reverse=True)
        numbered = sorted(shards_, key=lambda shard: shard.number)
        places = [place for shard in numbered for place in shard.places.tolist()]
        keys = [batch_key(round_.cells[place // 2].workflow) for place in places]
        assert keys == sorted(keys)
    jobs = {}
    for shard in round_.shards:
        jobs |= zip(shard.places.tolist(), round_.jobs(shard), strict=True)
    assert jobs[7].prompt == "two stars"
    assert jobs[7].id.endswith("on 'two stars', seed 7")
    rendered = round_.rendered(np.arange(18.0))
    assert rendered[3].scores == (6.0, 7.0)
    assert rendered[8].scores == ()
    assert made_round().shards[0].content == round_.shards[0].content
    assert len({shard.content for shard in round_.shards}) == 5


def test_work_counts_steps_guidance_order_and_size():
    assert estimate_work(flow(steps=4, cfg=1.0)) == 4
    assert estimate_work(flow(steps=4, cfg=2.0, sampler="heun")) == 16
    assert estimate_work(flow(steps=4, cfg=2.0, second_pass={"steps": 2})) == 8 + 2.25 * 4


def test_a_shard_is_read_as_it_was_written(tmp_path):
    round_, lines = made_round(), []
    files = ShardFiles(tmp_path, [], lines.append)
    shard = round_.shards[0]
    assert files.read(shard) is None
    written = files.write(shard, scores_of(shard), SCHEMA)
    again = ShardFiles(tmp_path, [], lines.append)
    read = again.read(shard)
    assert {k: v.tolist() for k, v in read.items()} == {k: v.tolist() for k, v in written.items()}
    assert read["score"].dtype == np.float32
    assert again.own_paths == files.own_paths
    assert again.read(round_.shards[1]) is None
    assert lines == []


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("harm", [flip, cut, lambda path: path.write_bytes(b"")])
def test_a_damaged_shard_is_named_and_made_again_or_refused(tmp_path, harm):
    round_, lines = made_round(), []
    shard = round_.shards[0]
    files = ShardFiles(tmp_path, [], lines.append)
    files.write(shard, scores_of(shard), SCHEMA)
    (path,) = files.own_paths
    harm(path)
    with pytest.raises(ValueError, match=rf"{path.name}: got \d+ bytes with digest .* is damaged"):
        ShardFiles(tmp_path / "other", [tmp_path], lines.append).read(shard)
    assert ShardFiles(tmp_path, [], lines.append).read(shard) is None
    assert not path.exists()
    assert path.name in lines[0]
    assert lines[0].endswith("is damaged; it is rendered again")


def test_a_shard_of_another_plan_is_refused(tmp_path):
    round_ = made_round()
    shard = round_.shards[0]
    ShardFiles(tmp_path, [], print).write(shard, scores_of(shard), SCHEMA)
    other = dataclasses.replace(shard, content="0" * 64)
    with pytest.raises(ValueError, match="got a shard of another plan"):
        ShardFiles(tmp_path / "own", [tmp_path], print).read(other)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    shard = made_round().shards[0]
    files = ShardFiles(tmp_path, [], print)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*round-3-0000\d\.\w+\.parquet'"):
        files.write(shard, scores_of(shard), SCHEMA)
    assert list(tmp_path.iterdir()) == []


def test_parts_of_a_plain_plan_join_to_the_same_bytes(world, plain, tmp_path, monkeypatch):
    folders = [tmp_path / str(k) for k in range(3)]
    for k, folder in enumerate(folders):
        _, metrics = build(world, folder, dataclasses.replace(PLAIN, part=f"{k}/3"))
        assert metrics["triplets/shards"] == len(shards(folder)) > 0
    assert sum(len(shards(folder)) for folder in folders) == len(shards(plain))
    parts = [folder / "out.partial" for folder in folders]
    monkeypatch.setattr(Engine, "render", None)  # all is there
    build(world, tmp_path / "all", PLAIN, parts=parts)
    assert entries(tmp_path / "all") == entries(plain)

    with pytest.raises(ValueError, match="parts: got no shard in"):
        build(world, tmp_path / "all", PLAIN, parts=world)
    changed = dataclasses.replace(PLAIN, seed=1)
    with pytest.raises(ValueError, match="got a shard of another plan"):
        build(world, tmp_path / "all", changed, parts=parts)
    lost = next(parts[1].glob("round-*"))
    lost.unlink()
    with pytest.raises(ValueError, match=rf"parts: got no '.*{lost.name}', which part.json lists"):
        build(world, tmp_path / "all", PLAIN, parts=parts)


def test_a_part_may_have_no_shard(world, plain, tmp_path):
    config = dataclasses.replace(PLAIN, shard_size=1000)  # a shard that steers, one that does not
    build(world, tmp_path / "alone", config)
    parts = []
    for k in range(3):
        out, metrics = build(world, tmp_path / str(k), dataclasses.replace(config, part=f"{k}/3"))
        assert metrics["triplets/shards"] == (k < 2)
        parts.append(out)
    build(world, tmp_path / "all", config, parts=parts)
    assert entries(tmp_path / "all") == entries(tmp_path / "alone")


def test_parts_of_a_plan_of_rounds_join_round_by_round(world, tmp_path):
    config = dataclasses.replace(CONFIG, evolved_cells=(1,), evolved_seeds=(2,))
    alone, parts = tmp_path / "alone", []
    build(world, alone, config)
    for number in range(2):
        new = []
        for k in range(2):
            folder = tmp_path / f"{number}-{k}"
            out, _ = build(world, folder, dataclasses.replace(config, part=f"{k}/2"), parts=parts)
            assert {path.name[:8] for path in out.glob("*.parquet")} == {f"round-{number}-"}
            new.append(out)
        parts += new
        # With the first round's parts alone the others are rendered here.
        together = tmp_path / f"together-{number}"
        build(world, together, config, parts=parts)
        assert entries(together) == entries(alone)
        rendered = {path.name[:8] for path in shards(together)}
        assert rendered == ({"round-1-"} if number == 0 else set())


def test_a_damaged_shard_is_rendered_again(world, plain, tmp_path, capsys):
    shutil.copytree(plain / "work", tmp_path / "work")
    broken = shards(tmp_path)[2]
    flip(broken)
    shards(tmp_path)[5].unlink()
    # What a killed process left half written.
    Path(f"{shards(tmp_path)[0]}.7.partial").write_bytes(b"half")
    build(world, tmp_path, PLAIN)
    assert f"{broken.name}: got" in capsys.readouterr().err
    assert entries(tmp_path) == entries(plain)


def test_killed_at_random_moments_ends_with_the_same_bytes(world, plain, tmp_path):
    program = (
        "import dataclasses, sys; from pathlib import Path; "
        "from tests.dataset.small import PLAIN, build; world, folder, num = sys.argv[1:]; "
        "config = dataclasses.replace(PLAIN, num_processes=int(num)); "
        "build(Path(world), Path(folder), config)"
    )
    rng, total = random.Random(0), len(shards(plain))
    for k in range(KILLS):
        command = [sys.executable, "-c", program, world, tmp_path, str(1 + k % 2)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        # Once it has got somewhere, at any moment.
        while len(shards(tmp_path)) < (k + 1) * total // (KILLS + 2):
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    build(world, tmp_path, PLAIN)
    assert entries(tmp_path) == entries(plain)
