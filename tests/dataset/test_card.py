"""Pins: a content digest knows no order and no shards, and sees every changed value; the card adds
up, is read back, and holds nothing that varies."""

import hashlib
import json

import pyarrow as pa
import pytest

from flowloom.dataset.card import (
    Card,
    ContentDigest,
    count_values,
    describe_files,
    histogram,
    read_card,
)
from flowloom.dataset.tables import write_table

ROWS = {"prompt": ["a", "b", "b"], "score": [0.5, 0.25, 0.25]}


def digest(*parts):
    content = ContentDigest()
    for part in parts:
        content.add(part)
    return content.hexdigest()


def rows(*places):
    return {name: [values[place] for place in places] for name, values in ROWS.items()}


def test_content_digest_knows_no_order_and_no_shards():
    whole = digest(ROWS)
    assert digest(rows(2, 0, 1)) == digest(rows(1), rows(0, 2)) == whole
    assert digest({"score": ROWS["score"], "prompt": ROWS["prompt"]}) == whole
    one, other = ContentDigest(), ContentDigest()
    one.add(rows(1))
    other.add(rows(2, 0))
    one.merge(other)
    assert (one.hexdigest(), one.num_rows) == (whole, 3)


def test_content_digest_by_hand():
    text = '{"prompt":"a","score":0.5}'
    assert digest(rows(0)) == hashlib.sha256(text.encode()).hexdigest()
    twice = 2 * int(digest(rows(1)), 16) % 2**256
    assert digest(rows(1, 2)) == f"{twice:064x}"


def test_content_digest_sees_every_change():
    changed = [rows(0, 1), rows(0, 1, 2, 2), {**ROWS, "prompt": ["a", "b", "c"]}]
    changed.append({**ROWS, "score": [0.25, 0.5, 0.25]})  # values of another row
    changed.append({"text": ROWS["prompt"], "score": ROWS["score"]})
    assert len({digest(part) for part in [ROWS, *changed]}) == 6


def test_histogram_adds_up():
    assert histogram([0.0, 0.05, 0.1, 1.0], [0, 0.1, 1.0]) == {"from": [0, 0.1], "rows": [2, 2]}
    with pytest.raises(ValueError, match=r"histogram: got 1.5, expected 0 to 1"):
        histogram([1.5], [0, 1])


def test_card_is_written_and_read(tmp_path):
    schema = pa.schema([("prompt", pa.string()), ("score", pa.float64())])
    path = tmp_path / "rows-00000-of-00001.parquet"
    write_table(path, ROWS, schema)
    card = Card(
        title="rows",
        summary="A row is a row.",
        catalogue="c" * 64,
        config={"seed": 0},
        files=describe_files([path]),
        content=digest(ROWS),
        counts={"prompt": count_values(ROWS["prompt"])},
        histograms={"score": histogram(ROWS["score"], [0, 0.5, 1])},
        extra={"removed": 7},
    )
    card.write(tmp_path)
    first = {name: (tmp_path / name).read_bytes() for name in ("card.json", "card.md")}
    found = read_card(tmp_path)
    assert found["rows"] == sum(found["counts"]["prompt"].values()) == 3
    assert found["counts"] == {"prompt": {"a": 1, "b": 2}}
    assert (found["removed"], found["content"]) == (7, digest(ROWS))
    assert found["files"][0]["md5"] == hashlib.md5(path.read_bytes()).hexdigest()
    for part in ("# rows", "| b | 2 |", "| rows | 3 |", path.name, found["content"]):
        assert part in first["card.md"].decode()
    card.write(tmp_path)
    assert first == {name: (tmp_path / name).read_bytes() for name in first}
    assert str(tmp_path) not in json.dumps(found)
    with pytest.raises(ValueError, match=r"card: got no .*card.json"):
        read_card(tmp_path / "none")
