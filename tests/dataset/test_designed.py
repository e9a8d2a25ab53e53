"""A round of triplets that renders what a policy designed.

Facts pinned here:
- Its rows follow those of the earlier rounds, which stay as they are; a cell that was rendered
  before keeps its number and gets other noise.
- The most uncertain designs come first, or random ones; calibration prompts' designs join too, and
  a held-out workflow is not trained on.
- Best fixed, prompt lists and standardisation stay those of a dataset of triplets.
- Rendered in parts, they join to the same bytes.
- Proposals of other prompts, earlier triplets of other models, and one input alone are refused.
"""

import dataclasses
import json

import pytest

from flowloom.dataset import triplets
from flowloom.dataset.designed import PROPOSALS_FILE
from flowloom.dataset.splits import is_held_out_workflow
from flowloom.dataset.tables import write_table
from flowloom.designer.proposals import SCHEMA
from flowloom.render.engine import Engine
from flowloom.runs import folder_entries
from tests.dataset.small import CONFIG, build, build_small_pairs
from tests.render.tiny import write_world

TWICE = dataclasses.replace(CONFIG, num_designed=3, designed_seeds=2)
RANDOM = dataclasses.replace(CONFIG, num_designed=3, designed_by="random")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_small_pairs(write_world(tmp_path_factory.mktemp("world")))


@pytest.fixture(scope="module")
def earlier(world, tmp_path_factory):
    return build(world, tmp_path_factory.mktemp("earlier"))[0]


@pytest.fixture
def proposals(earlier, tmp_path):
    """Known workflows on train prompts, spread rising with the row, and on calibration prompts."""
    rows = triplets.load(earlier)
    flows = dict(zip(rows["fingerprint"], rows["workflow"], strict=True))
    prompts = triplets.load_unrendered_prompts(earlier)[:6]
    chosen = [(row, "train") for row in prompts]
    chosen += [(row, "calibration") for row in triplets.load_calibration_prompts(earlier)[:2]]
    columns = {name: [] for name in SCHEMA.names}
    for k, ((row, split), (name, text)) in enumerate(
        zip(chosen, sorted(flows.items()), strict=False)
    ):
        values = (row["prompt"], row["kind"], split, text, name, 0.5, 0.1 * k)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    write_table(tmp_path / PROPOSALS_FILE, columns, SCHEMA)
    return tmp_path, columns


def test_designs_join_the_earlier_rows(world, earlier, proposals, tmp_path):
    folder, columns = proposals
    inputs = {"earlier": earlier, "proposals": folder}
    out, metrics = build(world, tmp_path / "run", TWICE, **inputs)
    before, rows = triplets.load(earlier), triplets.load(out)
    first = len(before["cell"])
    assert {name: values[:first] for name, values in rows.items()} == before
    new = {name: values[first:] for name, values in rows.items()}
    assert set(new["origin"]) == {"designed"}
    expected = [(columns["prompt"][k], columns["fingerprint"][k]) for k in (5, 5, 4, 4, 3, 3)]
    in_train = [
        (prompt, name)
        for prompt, name, split in zip(new["prompt"], new["fingerprint"], new["split"], strict=True)
        if split != "calibration"
    ]
    assert in_train == expected
    for name, split in zip(new["fingerprint"], new["split"], strict=True):
        if split != "calibration":
            assert split == ("held_out_workflow" if is_held_out_workflow(name) else "train")
    calibration = [
        p for p, s in zip(new["prompt"], new["split"], strict=True) if s == "calibration"
    ]
    assert set(calibration) == set(columns["prompt"][6:])
    cells = {}
    for values in zip(rows["prompt"], rows["fingerprint"], rows["cell"], strict=True):
        assert cells.setdefault(values[:2], values[2]) == values[2]
    seeds = list(zip(rows["cell"], rows["seed"], strict=True))
    assert len(set(seeds)) == len(seeds)
    assert metrics["triplets/renders"] == len(seeds)
    for name in ("best_fixed.json", "prompts.json", "unrendered_prompts.json", "files.json"):
        assert (out / name).read_bytes() == (earlier / name).read_bytes()


def test_parts_join_to_the_same_bytes(world, earlier, proposals, tmp_path, monkeypatch):
    inputs = {"earlier": earlier, "proposals": proposals[0]}
    config = dataclasses.replace(TWICE, shard_size=2)
    alone, _ = build(world, tmp_path / "alone", config, **inputs)
    parts = [
        build(world, tmp_path / str(k), dataclasses.replace(config, part=f"{k}/2"), **inputs)[0]
        for k in range(2)
    ]
    assert all(any(part.glob("round-0-*")) for part in parts)
    monkeypatch.setattr(Engine, "render", None)  # all is there
    whole, _ = build(world, tmp_path / "all", config, parts=parts, **inputs)
    assert folder_entries(whole) == folder_entries(alone)


def test_random_order_ignores_the_spread(world, earlier, proposals, tmp_path):
    inputs = {"earlier": earlier, "proposals": proposals[0]}
    out, _ = build(world, tmp_path / "run", RANDOM, **inputs)
    new = triplets.load(out)["prompt"][len(triplets.load(earlier)["prompt"]) :]
    assert set(new) != set(proposals[1]["prompt"][3:])


def test_what_does_not_fit_is_refused(world, earlier, proposals, tmp_path):
    folder, columns = proposals
    with pytest.raises(ValueError, match="got one of these inputs"):
        build(world, tmp_path / "one", earlier=earlier)
    with pytest.raises(ValueError, match="expected a folder of train_grpo with proposals"):
        build(world, tmp_path / "none", earlier=earlier, proposals=tmp_path / "run")
    columns["prompt"][0] = "a dog"
    write_table(folder / PROPOSALS_FILE, columns, SCHEMA)
    with pytest.raises(ValueError, match="design for 'a dog'"):
        build(world, tmp_path / "dog", earlier=earlier, proposals=folder)
    other = tmp_path / "other"
    other.mkdir()
    for path in earlier.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    files = json.loads((other / "files.json").read_text())
    (other / "files.json").write_text(json.dumps({**files, "loras/gone.safetensors": "ab" * 32}))
    with pytest.raises(ValueError, match=r"loras/gone\.safetensors: got none"):
        build(world, tmp_path / "gone", earlier=other, proposals=folder)
