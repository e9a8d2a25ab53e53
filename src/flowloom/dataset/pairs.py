"""Pairs of prompts and valid workflows: the prior that SFT learns before it sees any score.

Place s of the dataset has a prompt, given by s alone. Workflows are drawn in shards, on any number
of processes or machines, and fill the places in order; what is a near-duplicate of an earlier pair
leaves its place to a workflow of a spare shard. So the bytes depend on the configuration only.

    flowloom run build_pairs --set num_pairs=500000
    flowloom run build_pairs --set part=0/4        # on each of 4 machines, then on one of them
    flowloom run build_pairs --input parts=A --input parts=B ...
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from flowloom.dataset import pair_shards
from flowloom.dataset.card import (
    Card,
    ContentDigest,
    describe_files,
    histogram,
    row_config,
    sorted_counts,
)
from flowloom.dataset.config import BuildPairsConfig
from flowloom.dataset.pair_places import Choice, Places, choose
from flowloom.dataset.prompts import Prompt, count_given
from flowloom.dataset.splits import PAIR_SPLITS, TRAIN, is_held_out_workflow, pair_split
from flowloom.dataset.tables import stream_tables, write_arrow
from flowloom.dataset.user_workflows import read_templates
from flowloom.dataset.workers import run_tasks
from flowloom.dataset.workflows import make_grammar
from flowloom.runs import Run, file_md5, write_json
from flowloom.workflow import Catalogue

SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("kind", pa.string()),
        ("wording", pa.string()),
        ("workflow", pa.string()),
        ("fingerprint", pa.string()),
        ("origin", pa.string()),
        ("num_tokens", pa.int32()),
        ("split", pa.string()),
    ]
)
COUNTED = ("split", "kind", "origin", "wording")
PART_FILE = "part.json"
Splits = str | Sequence[str] | None
_BIN = 8


def build_pairs(
    config: BuildPairsConfig,
    run: Run,
    *,
    catalogue: Path,
    parts: Path | Sequence[Path] = (),
) -> dict[str, float]:
    """Draw workflows and pair each with a prompt.

    Args:
        config: How many, and what they look like.
        run: Run folder; `out` gets `pairs-00000-of-00001.parquet` and so on, `card.json` and
            `card.md`; with `config.part`, shards for another run.
        catalogue: Folder that `publish_generator` wrote.
        parts: Folders of runs with a `part`, whose shards are taken instead of drawn.

    Returns:
        Counts.

    Raises:
        ValueError: There are too few different workflows for the prompts, a user's file cannot be
            used, or a part is of another configuration or broken.
    """
    facts = Catalogue.load(catalogue / "catalogue.json.gz")
    identity = {
        "config": row_config(config),
        "catalogue": facts.hash,
    }
    if config.part is not None:
        return _build_part(config, run, catalogue, identity)
    for folder in [parts] if isinstance(parts, Path) else parts:
        _take_part(folder, run.work, identity)

    # Draw
    _say_what_is_given(config, run, facts)
    places = Places.of(config)
    num_shards = pair_shards.num_shards(config)
    missing = pair_shards.draw_shards(config, catalogue, run.work, range(num_shards))
    run.log(f"{num_shards} shards, {num_shards - missing} of them drawn before")

    # Choose
    choice = choose(config, catalogue, run.work, places)

    # Write
    tasks = [
        (
            config,
            run.work,
            run.out,
            number,
            choice.rows(config, number),
            places.rows(config, number),
        )
        for number in range(num_shards)
    ]
    written = run_tasks(_write_shard, tasks, config.num_processes)
    card = _card(config, facts, run, places, choice, written)
    card.write(run.out)
    rows, different, prompts = len(places.prompt), card.extra["workflows"], card.extra["prompts"]
    run.log(
        f"{rows} pairs, {different} different workflows, {prompts} prompts; removed "
        f"{choice.num_equal} equal pairs and {choice.num_near} near-duplicates"
    )
    return {
        "pairs/num": float(rows),
        "pairs/train": float(card.counts["split"].get(TRAIN, 0)),
        "pairs/workflows": float(different),
        "pairs/prompts": float(prompts),
        "pairs/removed_equal": float(choice.num_equal),
        "pairs/removed_near": float(choice.num_near),
    }


def pair_files(path: str | Path) -> list[Path]:
    """The shards in the folder that `build_pairs` wrote, in order.

    Raises:
        ValueError: There are none.
    """
    files = sorted(Path(path).glob("pairs*.parquet"))
    if not files:
        raise ValueError(f"pairs: got {str(path)!r} without shards, expected one of build_pairs")
    return files


def stream_pairs(
    path: str | Path, split: Splits = TRAIN, columns: Sequence[str] | None = None
) -> Iterator[dict[str, list[Any]]]:
    """Columns of a few pairs at a time, in the dataset's order, in constant memory.

    Args:
        path: Folder that `build_pairs` wrote.
        split: One of `PAIR_SPLITS`, or several; None for all.
        columns: Names of those wanted; all by default.

    Raises:
        ValueError: An unknown split.
    """
    splits = PAIR_SPLITS if split is None else (split,) if isinstance(split, str) else split
    for name in splits:
        if name not in PAIR_SPLITS:
            raise ValueError(f"split: got {name!r}, expected one of {', '.join(PAIR_SPLITS)}")
    wanted = None if columns is None else list(dict.fromkeys([*columns, "split"]))
    for rows in stream_tables(pair_files(path), wanted):
        kept = [k for k, value in enumerate(rows["split"]) if value in splits]
        names = rows if columns is None else columns
        if kept:
            yield {name: [rows[name][k] for k in kept] for name in names}


def read_pairs(
    path: str | Path, split: Splits = TRAIN, columns: Sequence[str] | None = None
) -> dict[str, list[Any]]:
    """All columns of a split at once; see `stream_pairs`.

    Raises:
        ValueError: An unknown split, or it has no pairs.
    """
    found: dict[str, list[Any]] = {}
    for rows in stream_pairs(path, split, columns):
        for name, values in rows.items():
            found.setdefault(name, []).extend(values)
    if not found:
        raise ValueError(f"pairs: got no pairs of the split {split!r} in {str(path)!r}")
    return found


@dataclasses.dataclass(frozen=True)
class _Written:
    """What the card wants to know of a shard."""

    path: Path
    content: ContentDigest
    counts: dict[str, Counter[str]]
    num_tokens: np.ndarray
    prints: np.ndarray


def _write_shard(
    config: BuildPairsConfig,
    folder: Path,
    out: Path,
    number: int,
    chosen: tuple[np.ndarray, np.ndarray],
    prompts: Sequence[Prompt],
) -> _Written:
    shards, rows = chosen
    tables, first_row, total = [], {}, 0
    for shard in np.unique(shards).tolist():
        tables.append(parquet.read_table(pair_shards.shard_path(folder, shard)))
        first_row[shard] = total
        total += len(tables[-1])
    firsts = np.array([first_row[shard] for shard in shards.tolist()])
    flows = pa.concat_tables(tables).take(firsts + rows)
    prints: list[str] = flows["fingerprint"].to_pylist()
    splits = [
        pair_split(
            prompt_held_out=prompt.split != "train",
            workflow_held_out=is_held_out_workflow(fingerprint),
        )
        for prompt, fingerprint in zip(prompts, prints, strict=True)
    ]
    columns: dict[str, list[Any]] = {
        "prompt": [prompt.text for prompt in prompts],
        "kind": [prompt.kind for prompt in prompts],
        "wording": [prompt.wording for prompt in prompts],
        "workflow": flows["workflow"].to_pylist(),
        "fingerprint": prints,
        "origin": flows["origin"].to_pylist(),
        "num_tokens": flows["num_tokens"].to_pylist(),
        "split": splits,
    }
    content = ContentDigest()
    content.add(columns)
    path = out / f"pairs-{number:05d}-of-{pair_shards.num_shards(config):05d}.parquet"
    write_arrow(path, pa.table(columns, schema=SCHEMA))
    return _Written(
        path,
        content,
        {name: Counter(columns[name]) for name in COUNTED},
        np.array(columns["num_tokens"], np.int32),
        np.array([int(text[:16], 16) for text in prints], np.uint64),
    )


def _say_what_is_given(config: BuildPairsConfig, run: Run, facts: Catalogue) -> None:
    """Log what a person's files hold, and what of it is not used."""
    lists = config.prompts
    if lists.prompts_file is not None:
        there = count_given(lists)
        shown = ", ".join(f"{num} {split}" for split, num in there.items())
        run.log(f"{lists.prompts_file}: {shown} prompts, by meaning")
        if there["train"] > lists.num_train:
            run.log(f"only the first {lists.num_train} train prompts are used: prompts.num_train")
    if config.workflows_file is not None:
        grammar = make_grammar(facts, config.prior.budget)
        flows, problems = read_templates(config.workflows_file, grammar)
        run.log(f"{config.workflows_file}: {len(flows)} different workflows that can be used")
        for problem in problems:
            run.log(f"cannot be used: {problem}")


def _card(
    config: BuildPairsConfig,
    facts: Catalogue,
    run: Run,
    places: Places,
    choice: Choice,
    written: Sequence[_Written],
) -> Card:
    content = ContentDigest()
    for part in written:
        content.merge(part.content)
    lengths = np.concatenate([part.num_tokens for part in written])
    edges = range(0, config.prior.budget + 2 * _BIN, _BIN)
    return Card(
        title="pairs",
        summary=(
            "A row is a prompt with a valid workflow (API JSON, a template with slots for text and "
            "seed). Train on the split `train` alone: prompts are held out by meaning, workflows "
            "by template fingerprint."
        ),
        catalogue=facts.hash,
        config=row_config(config),
        files=describe_files(part.path for part in written),
        content=content.hexdigest(),
        counts={
            name: sorted_counts(sum((part.counts[name] for part in written), Counter()))
            for name in COUNTED
        },
        histograms={"tokens per workflow": histogram(lengths, edges)},
        extra={
            "prompts": len(np.unique(places.prompt)),
            "workflows": len(np.unique(np.concatenate([part.prints for part in written]))),
            "drawn": choice.num_drawn,
            "removed": {"equal": choice.num_equal, "near": choice.num_near},
        },
    )


def _build_part(
    config: BuildPairsConfig, run: Run, catalogue: Path, identity: dict[str, Any]
) -> dict[str, float]:
    """Draw the shards of one part, for `parts` of another run."""
    assert config.part is not None
    first, _, step = config.part.partition("/")
    numbers = range(int(first), pair_shards.num_shards(config), int(step))
    pair_shards.draw_shards(config, catalogue, run.work, numbers)
    digests = {}
    for number in numbers:
        path = pair_shards.shard_path(run.work, number)
        shutil.copyfile(path, run.out / path.name)
        digests[path.name] = file_md5(path)
    write_json(run.out / PART_FILE, {**identity, "shards": digests})
    run.log(f"part {config.part}: {len(numbers)} of {pair_shards.num_shards(config)} shards")
    return {"pairs/shards": float(len(numbers))}


def _take_part(folder: Path, work: Path, identity: dict[str, Any]) -> None:
    """Copy the shards of a part.

    Raises:
        ValueError: It is no part, of another configuration or catalogue, or a shard is broken.
    """
    record = folder / PART_FILE
    if not record.is_file():
        raise ValueError(f"parts: got {str(folder)!r}, expected the folder of a run with a part")
    part = json.loads(record.read_text())
    for name, value in identity.items():
        if part[name] != value:
            raise ValueError(f"parts: got {str(folder)!r} of another {name}, expected the same")
    for name, digest in part["shards"].items():
        path = folder / name
        got = file_md5(path) if path.is_file() else "no file"
        if got != digest:
            raise ValueError(f"parts: {path}: got {got}, expected md5 {digest}")
        partial = work / f"{name}.partial"
        shutil.copyfile(path, partial)
        partial.replace(work / name)
