"""The processes of a launched stage on one machine: `python -m flowloom.launch REQUEST`.

What torchrun does, with its settings from the environment (`PET_*`, as Kubeflow Trainer sets them)
and one thing more: when a process fails, the last thing said is which, and its last lines.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from flowloom.launch import followed
from flowloom.launch.errors import NUM_LINES
from flowloom.launch.worker import die_with_parent

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

WORKER = "flowloom.launch.worker"


def main(request: str, worker: str = WORKER) -> int:
    """Start this machine's processes and wait for them; returns the exit status."""
    die_with_parent()
    if followed.VARIABLE in os.environ:
        followed.end_when_left(Path(os.environ[followed.VARIABLE]))
    # The first process of each machine is shown as it is; the others are asked if they fail.
    os.environ.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[${rank}] ")
    os.environ["PYTHONUNBUFFERED"] = "1"
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    with tempfile.TemporaryDirectory(prefix="flowloom-") as logs:
        shown = ["--log-dir", logs, "--tee", "3", "--local-ranks-filter", "0"]
        config, command, arguments = config_from_args(parse_args([*shown, "-m", worker, request]))
        try:
            elastic_launch(config, command)(*arguments)
        except ChildFailedError as error:
            rank, failure = _first(error.failures, Path(logs))
            log = _log(Path(logs), failure)
            at = datetime.fromtimestamp(_written_s(log), UTC).isoformat(timespec="milliseconds")
            num = config.max_nodes * config.nproc_per_node
            print(
                f"[launch] rank {rank} of {num} failed at {at}, exit code {failure.exitcode}; "
                "its last lines:",
                *(log.read_text(errors="replace").splitlines()[-NUM_LINES:] if log else []),
                sep="\n  ", file=sys.stderr, flush=True,
            )  # fmt: skip
            return 1
        except SignalException as error:
            print(f"[launch] ended by {error.sigval.name}", file=sys.stderr, flush=True)
            return 128 + error.sigval
    return 0


def _first(failures: dict[int, ProcessFailure], logs: Path) -> tuple[int, ProcessFailure]:
    """The process that failed first: what it wrote last is older than its peers' complaints.

    Those that were told to end, as the rest are once one has failed, come last.
    """

    def order(rank: int) -> tuple[bool, float]:
        told = failures[rank].exitcode == -signal.SIGTERM
        return told, _written_s(_log(logs, failures[rank]))

    rank = min(failures, key=order)
    return rank, failures[rank]


def _log(logs: Path, failure: ProcessFailure) -> Path | None:
    """What a process wrote to standard error, in its last attempt."""
    found = sorted(logs.glob(f"*/attempt_*/{failure.local_rank}/stderr.log"))
    return found[-1] if found else None


def _written_s(log: Path | None) -> float:
    return log.stat().st_mtime if log else 0.0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m flowloom.launch REQUEST")
    sys.exit(main(sys.argv[1]))
