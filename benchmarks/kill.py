"""Loops killed with SIGKILL at random moments: does the same command end with the same bytes?

    python -m benchmarks.kill [--kills 10] [--loops train_grpo,...] [--seed 0] [--quick] [--json]

Each loop of the recipe `smoke` runs through `flowloom run` with a checkpoint at every step: once
left alone, then killed at a random step and a random moment in it, and started again. The artifacts
are equal if their digests are. Status 1 if one is not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flowloom.runs import code_digest

LOOPS = {
    "tune_generator": (6, "num_epochs=6"),
    "train_sft": (9,),
    "train_reward": (20,),
    "train_grpo": (8, "num_steps=8", "watch_every=3", "watch_prompts=2", "num_proposals=16"),
}
"""Steps of each loop, and fields set beside the recipe's."""
POLL_S = 0.002
MAX_TRIES = 5


def start(loop, home):
    """Start a loop's command in a process group of its own."""
    changes = [
        part for field in (*LOOPS[loop][1:], "checkpoint_every=1") for part in ("--set", field)
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "flowloom", "run", loop, "--recipe", "smoke", *changes, "--json"],
        # One digest for all: an edit while this runs would start other runs.
        env={**os.environ, "FLOWLOOM_HOME": str(home), "FLOWLOOM_CODE_DIGEST": code_digest()},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def finish(loop, home):
    """Run a loop's command to its end; what it prints."""
    process = start(loop, home)
    text, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{loop}: got exit status {process.returncode}, expected 0")
    return json.loads(text)


def kill(loop, home, folder, step, delay_s):
    """Start a loop anew and kill it after a step; False if it was done before."""
    shutil.rmtree(folder)
    process = start(loop, home)
    logged = folder / "metrics.jsonl"
    while process.poll() is None:
        steps = len(logged.read_text().splitlines()) if logged.is_file() else 0
        if steps >= step and (folder / "work").is_dir():
            time.sleep(delay_s)
            break
        time.sleep(POLL_S)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL and not (folder / "result.json").is_file()


def measure(loop, home, kills, rng):
    """One row per kill."""
    alone = finish(loop, home)
    folder = Path(alone["out"]).parent
    seconds = json.loads((folder / "timing.json").read_text())["seconds"]
    num_steps = LOOPS[loop][0]
    rows = []
    for number in range(kills):
        for _ in range(MAX_TRIES):
            step, delay_s = rng.randrange(num_steps), rng.uniform(0, seconds / num_steps)
            if kill(loop, home, folder, step, delay_s):
                break
        else:
            raise RuntimeError(f"{loop}: got {MAX_TRIES} runs that were too quick to kill")
        logged = folder / "metrics.jsonl"
        steps = len(logged.read_text().splitlines()) if logged.is_file() else 0
        saved = (folder / "work" / "state.pt").is_file()
        again = finish(loop, home)
        equal = again["digest"] == alone["digest"]
        rows.append(
            {"loop": loop, "kill": number + 1, "steps": steps, "saved": saved, "equal": equal}
        )
    return rows


def main():
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="kills of each loop")
    parser.add_argument("--quick", action="store_true", help="one kill of each loop")
    parser.add_argument("--loops", default=",".join(LOOPS), help="which, with commas between")
    parser.add_argument("--seed", type=int, default=0, help="of steps and moments")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.kills = 1
    rng = random.Random(parsed.seed)
    rows = []
    with tempfile.TemporaryDirectory() as home:
        for loop in parsed.loops.split(","):
            rows += measure(loop, Path(home), parsed.kills, rng)
    num_equal = sum(row["equal"] for row in rows)
    if parsed.json:
        print(json.dumps({"rows": rows, "equal": num_equal, "kills": len(rows)}, indent=1))
    else:
        print(f"{'loop':16} {'kill':>4} {'steps logged':>13} {'checkpoint':>11} {'equal':>6}")
        for row in rows:
            saved, equal = ("yes" if row[name] else "no" for name in ("saved", "equal"))
            print(f"{row['loop']:16} {row['kill']:4} {row['steps']:13} {saved:>11} {equal:>6}")
        print(f"{num_equal} of {len(rows)} equal")
    return int(num_equal < len(rows))


if __name__ == "__main__":
    sys.exit(main())
