"""A pipeline killed with SIGKILL at random moments: does the same command end with the same bytes?

    python -m benchmarks.pipeline_kill [--kills 10] [--recipe smoke] [--seed 0] [--quick] [--json]

`python -m pipelines run continuous_training` runs once left alone; then in a fresh home each time,
killed at a random moment of that duration, and called again. What is killed takes turns:

everything  the command, its steps and what records them
the runner  the command's own process: a step goes on, and the next call meets it
a step      one step's process: the command tries it again, or ends with an error that names it

Equal means: the second call ends with status 0, and every step's digest is that of the run left
alone. Status 1 if one is not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.pipeline import COMMAND, call, environment, turn

VICTIMS = ("everything", "the runner", "a step")
STEP = "kfp.dsl.executor_main"
"""Module that runs a step, in its command line."""
POLL_S = 0.02


def children():
    """Process id to the ids of those it started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found.setdefault(int(after_name[1]), []).append(int(path.parent.name))
    return found


def below(pid):
    """A process and all that come from it, in whatever session."""
    known, found = children(), [pid]
    for parent in found:
        found += known.get(parent, [])
    return found


def is_step(pid):
    """Whether a process runs a step."""
    try:
        return STEP.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def victims(pid, which):
    """Processes to kill now; none where no step runs at the moment."""
    if which == "the runner":
        return [pid]
    if which == "everything":
        return below(pid)
    return [other for other in below(pid) if is_step(other)][:1]


def kill(recipe, home, delay_s, which):
    """Start the command and kill; false if it was done before that."""
    process = subprocess.Popen(
        [sys.executable, "-m", *COMMAND, recipe],
        env=environment(home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(delay_s)
        return False
    except subprocess.TimeoutExpired:
        pass
    hit = False
    while not hit and process.poll() is None:
        for pid in victims(process.pid, which):
            # From the command on down, so that none of them starts another meanwhile.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                hit = True
        time.sleep(POLL_S)
    process.wait()
    return hit


def digests(home):
    """Step to the digest of its artifact."""
    return {step["step"]: step["digest"] for step in turn(home)[1]}


def measure(recipe, kills, rng, folder):
    """Seconds left alone, and one row per kill."""
    alone_s = call(folder / "alone", *COMMAND, recipe)
    expected = digests(folder / "alone")
    rows = []
    while len(rows) < kills:
        which = VICTIMS[len(rows) % len(VICTIMS)]
        home, moment_s = folder / f"kill-{len(rows)}", rng.uniform(0, alone_s)
        if not kill(recipe, home, moment_s, which):
            # Done before its moment came, as runs differ in time; another moment.
            home.rename(folder / f"unused-{time.monotonic_ns()}")
            continue
        ended = len(digests(home)) if any(home.glob("turns/*/turn.json")) else 0
        started_s = time.perf_counter()
        try:
            call(home, *COMMAND, recipe)
            got = digests(home)
            differ = sorted(name for name in expected | got if expected.get(name) != got.get(name))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            differ = ["no end"]
        rows.append(
            {
                "kill": len(rows) + 1,
                "victim": which,
                "moment_s": moment_s,
                "steps_ended": ended,
                "again_s": time.perf_counter() - started_s,
                "differ": differ,
            }
        )
    return {"recipe": recipe, "alone_s": alone_s, "steps": len(expected), "rows": rows}


def main():
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--recipe", default="smoke", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parsed = parser.parse_args()
    kills = 1 if parsed.quick else parsed.kills
    rng = random.Random(parsed.seed)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(parsed.recipe, kills, rng, Path(folder))
    rows = found["rows"]
    num_equal = sum(not row["differ"] for row in rows)
    if parsed.json:
        print(json.dumps({**found, "equal": num_equal, "kills": len(rows)}))
    else:
        print(f"left alone: {found['alone_s']:.1f} s, {found['steps']} steps")
        print(f"{'kill':>4}  {'of':12} {'moment':>8} {'steps done':>10} {'again':>8}  differ")
        for row in rows:
            differ = ", ".join(row["differ"]) or "-"
            print(
                f"{row['kill']:4}  {row['victim']:12} {row['moment_s']:6.1f} s "
                f"{row['steps_ended']:10} {row['again_s']:6.1f} s  {differ}"
            )
        print(f"{num_equal} of {len(rows)} equal")
    return int(num_equal < len(rows))


if __name__ == "__main__":
    sys.exit(main())
