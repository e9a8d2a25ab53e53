"""Broken, huge and senseless input through every public door of the workflow language.

    python -m benchmarks.hostile [--quick] [--json] [--processes 2]

A call must return, or raise the door's own kind of ValueError; it must take less than its bound of
CPU seconds, and memory must not grow. Input number k of a door is a function of the seed and k, so
that `--door NAME --first K --count 1` shows a failure again. Whole: 1,000,000 inputs and a few of
100 MB; with `--quick` a fraction. The exit status is 1 where something failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.garbage.doors import DOORS, Call
from benchmarks.garbage.giants import giants

NUM, NUM_QUICK = 1_000_000, 40_000
MOST_S, MOST_GIANT_S = 2.0, 30.0
MOST_GROWTH_MB = 400.0
_SHOWN, _MAX_MESSAGE = 20, 1000


@dataclass
class Tally:
    """What became of the inputs of one door."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    num_failed: int = 0
    num_untidy: int = 0
    """Messages of several lines, or too long for one."""
    total_s: float = 0.0
    slowest_s: float = 0.0
    slowest: int = -1

    def add(self, other: Tally) -> None:
        """Take in another process's tally."""
        self.outcomes += other.outcomes
        self.failures = (self.failures + other.failures)[:_SHOWN]
        self.num_failed += other.num_failed
        self.num_untidy += other.num_untidy
        self.total_s += other.total_s
        if other.slowest_s > self.slowest_s:
            self.slowest_s, self.slowest = other.slowest_s, other.slowest


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run and print; the last line is one JSON object with `--json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{NUM_QUICK} inputs, 10 MB texts")
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the work")
    parser.add_argument("--door", choices=sorted(DOORS), help="one door alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--count", type=int, help="inputs in all, or of the one door")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    count = options.count or (NUM_QUICK if options.quick else NUM)
    result = measure(
        count,
        options.seed,
        processes=options.processes,
        doors=[options.door] if options.door else None,
        first=options.first,
        giant_mb=0 if options.door else 10 if options.quick else 100,
    )
    for door, row in result["doors"].items():
        outcomes = ", ".join(f"{name} {num}" for name, num in row["outcomes"].items())
        untidy = f"; long messages {row['untidy']}" if row["untidy"] else ""
        print(f"{door:18s} {row['slowest_s']:8.3f} s at {row['slowest']:<9d} {outcomes}{untidy}")
        for failure in row["failures"]:
            print(f"  {failure}")
    for name in (
        "inputs",
        "failed",
        "cpu_s",
        "slowest_s",
        "slowest_giant_s",
        "grown_mb",
        "grown_giant_mb",
    ):
        print(f"{name:18s} {result[name]:.3f}" if isinstance(result[name], float) else
              f"{name:18s} {result[name]}")  # fmt: skip
    if options.json:
        print(json.dumps(result))
    return result


def measure(
    count: int,
    seed: int,
    processes: int = 1,
    doors: Sequence[str] | None = None,
    first: int = 0,
    giant_mb: int = 0,
) -> dict[str, Any]:
    """Figures of `count` inputs, dealt out to the doors by weight, and of a few giant ones.

    Args:
        count: Inputs of all doors together.
        seed: Of the mutations.
        processes: How many share the work.
        doors: Names of doors; all by default.
        first: Number of the first input of each door.
        giant_mb: Megabytes of a giant input; 0 for none.
    """
    chosen = list(doors or DOORS)
    weight = sum(DOORS[name].weight for name in chosen)
    jobs = []
    for name in chosen:
        num = max(1, round(count * DOORS[name].weight / weight))
        for k in range(processes):
            begin, end = first + num * k // processes, first + num * (k + 1) // processes
            jobs.append((name, begin, end, seed))
    if processes > 1:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            answers = pool.map(_share, jobs, chunksize=1)
    else:
        answers = [_share(job) for job in jobs]
    tallies: dict[str, Tally] = {name: Tally() for name in chosen}
    for (name, *_), (tally, _) in zip(jobs, answers, strict=True):
        tallies[name].add(tally)
    grown = max((growth for _, growth in answers), default=0.0)
    giant, before = Tally(), _peak_mb()
    for k, call in enumerate(giants(giant_mb) if giant_mb else ()):
        _judge(giant, k, call, MOST_GIANT_S)
    if giant_mb:
        tallies["giants"] = giant
    return {
        "inputs": sum(sum(tally.outcomes.values()) for tally in tallies.values()),
        "failed": sum(tally.num_failed for tally in tallies.values()) + (grown > MOST_GROWTH_MB),
        "cpu_s": sum(tally.total_s for tally in tallies.values()),
        "slowest_s": max(tally.slowest_s for name, tally in tallies.items() if name != "giants"),
        "slowest_giant_s": giant.slowest_s,
        "grown_mb": grown,
        "grown_giant_mb": _peak_mb() - before,
        "doors": {
            name: {
                "outcomes": dict(sorted(tally.outcomes.items())),
                "slowest_s": tally.slowest_s,
                "slowest": tally.slowest,
                "untidy": tally.num_untidy,
                "failures": tally.failures,
            }
            for name, tally in tallies.items()
        },
    }


def _share(job: tuple[str, int, int, int]) -> tuple[Tally, float]:
    """One process's part of a door: the tally, and the growth of its peak memory in MB."""
    name, begin, end, seed = job
    door = DOORS[name]
    make = door.make()
    tally, rng = Tally(), random.Random()
    warm = min(end, begin + 50)
    before = 0.0
    for k in range(begin, end):
        rng.seed((seed << 40) + k)
        call = make(rng)
        _judge(tally, k, call, MOST_S)
        if k == warm - 1:
            before = _peak_mb()
    return tally, _peak_mb() - before


def _judge(tally: Tally, number: int, call: Call, most_s: float) -> None:
    start = time.process_time()
    failure = ""
    try:
        outcome = call.run()
    except call.errors as error:
        outcome = type(error).__name__
        tally.num_untidy += "\n" in str(error) or len(str(error)) > _MAX_MESSAGE
    except Exception as error:
        outcome = "FAILED"
        failure = f"{type(error).__name__}: {str(error)[:160]!r} at {_place(error)}"
    taken = time.process_time() - start
    tally.total_s += taken
    if taken > tally.slowest_s:
        tally.slowest_s, tally.slowest = taken, number
    if taken > most_s and not failure:
        failure = f"took {taken:.2f} s"
    tally.outcomes[outcome] += 1
    if failure:
        tally.num_failed += 1
        if len(tally.failures) < _SHOWN:
            tally.failures.append(f"{call.name} {number}: {failure}")


def _place(error: BaseException) -> str:
    """File and line where an error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "?"
    return f"{trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}"


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(1 if main()["failed"] else 0)
