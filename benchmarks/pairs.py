"""Prompt-workflow pairs at the paper's size: time, memory, size, near-duplicates, streaming.

    python -m benchmarks.pairs [--quick] [--json] [--num N] [--processes P] [--out FOLDER]

Builds `--num` pairs (500,000; 20,000 with `--quick`) over all kinds of prompts with the embedded
catalogue, reads them once with the library's reader and once with `datasets` in streaming mode, in
fresh processes, and builds a twentieth of them alone and as the parts of 4 machines: the digests
must be equal. Memory is the peak of the parent, which is larger than a worker. With `--out` the
dataset stays.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowloom.dataset.card import read_card
from flowloom.dataset.config import BuildPairsConfig, PromptsConfig
from flowloom.dataset.pairs import build_pairs, pair_files, stream_pairs
from flowloom.render.model_records import save_catalogue
from flowloom.runs import Run, folder_digest
from flowloom.shapes.prompts import KINDS
from flowloom.workflow import Catalogue

NUM, NUM_QUICK = 500_000, 20_000
NUM_TRAIN, NUM_TEST = 4_900, 2_100
NUM_PARTS = 4
READERS = ("own", "datasets")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and print it; the last line is one JSON object with `--json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairs", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20,000 pairs, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    parser.add_argument("--num", type=int, help="how many pairs")
    parser.add_argument("--processes", type=int, default=2, help="processes that share the work")
    parser.add_argument("--out", type=Path, help="where the dataset stays")
    parser.add_argument("--read", choices=READERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.read:
        result = read(options.out, options.read)
        print(json.dumps(result))
        return result
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch) / "pairs"
        num = options.num or (NUM_QUICK if options.quick else NUM)
        result = measure(folder, Path(scratch), num, options.processes)
    for name, value in result.items():
        print(f"{name:28s} {value:>14,.4f}" if isinstance(value, float) else f"{name:28s} {value}")
    if options.json:
        print(json.dumps(result))
    return result


def measure(folder: Path, scratch: Path, num: int, processes: int) -> dict[str, Any]:
    """Figures by name."""
    catalogue = scratch / "catalogue"
    catalogue.mkdir()
    save_catalogue(catalogue / "catalogue.json.gz", Catalogue.load("embedded"))
    prompts = PromptsConfig(kinds=KINDS, num_train=NUM_TRAIN, num_test=NUM_TEST)
    config = BuildPairsConfig(prompts=prompts, num_pairs=num, num_processes=processes)

    before, start = _cpu_s(), time.perf_counter()
    out = build(config, folder, catalogue)
    wall_s, cpu_s = time.perf_counter() - start, _cpu_s() - before
    card = read_card(out)
    size = sum(file.stat().st_size for file in pair_files(out))
    result = {
        "pairs": card["rows"],
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "pairs_per_cpu_s": num / cpu_s,
        "peak_mb": _peak_mb(),
        "size_mb": size / 2**20,
        "shards": len(card["files"]),
        "prompts": card["prompts"],
        "workflows": card["workflows"],
        "distinct_workflow_frac": card["workflows"] / card["rows"],
        "drawn": card["drawn"],
        "removed_equal": card["removed"]["equal"],
        "removed_near": card["removed"]["near"],
        "removed_frac": sum(card["removed"].values()) / card["drawn"],
        **{f"split_{name}": count for name, count in card["counts"]["split"].items()},
        "content": card["content"],
    }
    for reader in READERS:
        command = [sys.executable, "-m", "benchmarks.pairs", "--read", reader, "--out", str(out)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        result |= {f"{reader}_{name}": value for name, value in figures.items()}
    return result | parts_equal(config, scratch, catalogue)


def build(
    config: BuildPairsConfig, folder: Path, catalogue: Path, parts: Sequence[Path] = ()
) -> Path:
    """Run the stage in a folder; returns the dataset."""
    run = Run("build_pairs", folder)
    run.begin()
    run.finish(build_pairs(config, run, catalogue=catalogue, parts=parts))
    return folder / "out"


def parts_equal(config: BuildPairsConfig, scratch: Path, catalogue: Path) -> dict[str, Any]:
    """Whether parts built in folders of their own and merged are what is built alone."""
    num = max(config.num_pairs // 20, 1_000)
    small = dataclasses.replace(config, num_pairs=num, shard_size=num // 10)
    alone = build(small, scratch / "alone", catalogue)
    parts = [
        build(dataclasses.replace(small, part=f"{k}/{NUM_PARTS}"), scratch / f"part-{k}", catalogue)
        for k in range(NUM_PARTS)
    ]
    merged = build(small, scratch / "merged", catalogue, parts)
    return {"parts_equal": folder_digest(merged) == folder_digest(alone)}


def read(folder: Path, reader: str) -> dict[str, float]:
    """Stream a dataset once: rows, seconds, and how far memory rose above the imports."""
    if reader == "own":
        batches = (len(rows["prompt"]) for rows in stream_pairs(folder, split=None))
    else:
        import datasets

        files = [str(file) for file in pair_files(folder)]
        rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        batches = (1 for _ in rows)
    before = _peak_mb()
    start = time.perf_counter()
    num = sum(batches)
    seconds = time.perf_counter() - start
    return {"rows": num, "stream_s": seconds, "stream_rise_mb": _peak_mb() - before}


def _peak_mb() -> float:
    """Most memory that this process ever held; what it had from its parent does not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
