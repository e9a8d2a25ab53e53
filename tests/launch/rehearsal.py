"""A stage that trains nothing: its processes meet in the run folder, fail or wait as told."""

import dataclasses
import os
import sys
import time

from flowloom.stages import STAGES, Stage

NAME = "rehearse"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RehearsalConfig:
    mode: str = "well"
    shares: tuple[float, ...] = (0.5, 0.25)


def rehearse(config, run, *, script=None):
    rank, num = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    run.work.mkdir(exist_ok=True)  # the first process may not have begun
    (run.work / f"pid-{rank}").write_text(f"{os.getpid()} {os.getppid()}")
    while rank == 0 and len(list(run.work.glob("pid-*"))) < num:
        time.sleep(0.02)
    if rank == 0:
        run.log(f"{num} processes, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY')}")
    if config.mode == "rank 1 fails" and rank == 1:
        print("about to divide by zero", file=sys.stderr)
        raise ZeroDivisionError("rank 1 divides by zero")
    if config.mode == "rank 1 is killed" and rank == 1:
        print("about to be killed", file=sys.stderr)
        os.kill(os.getpid(), 9)
    while config.mode != "well":
        time.sleep(0.1)
    if rank == 0:
        (run.out / "text").write_text(script.read_text() if script else "no script")
    return {"rehearse/total": sum(config.shares)}


def register():
    STAGES[NAME] = Stage(function=f"{__name__}:rehearse", optional=("script",), joint=True)
