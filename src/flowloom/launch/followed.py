"""A sign of life of the step that follows a job: killed, it cannot delete the job any more.

The step touches a file of the run folder; a pod that sees it untouched for long ends, and with it
the job. Whoever runs the step again goes on from the checkpoints.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

VARIABLE = "FLOWLOOM_FOLLOWED"
"""Names the file, for the pods."""
LEFT_S = 1800.0
"""So long a job goes on by itself: an outage of the API, or a step's next try, takes less."""
_LOOK_S = 10.0


def path_of(run_dir: Path) -> Path:
    """The file of a run."""
    return run_dir / "followed"


def end_when_left(path: Path, left_s: float = LEFT_S, look_s: float = _LOOK_S) -> None:
    """End this process, as SIGTERM does, once a file has not been touched for so long.

    Machines' clocks differ, so only whether its time changes is looked at.

    Args:
        path: The file.
        left_s: For how long, in seconds.
        look_s: Seconds between two looks.
    """

    def look() -> None:
        seen, since_s = _touched_ns(path), time.monotonic()
        while time.monotonic() - since_s < left_s:
            time.sleep(look_s)
            now = _touched_ns(path)
            if now != seen:
                seen, since_s = now, time.monotonic()
        said = f"[launch] no step has followed this job for {left_s:.0f} s: it ends"
        print(said, file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()


def _touched_ns(path: Path) -> int:
    """When the file was touched, in nanoseconds since the epoch; 0 where it cannot be seen."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
