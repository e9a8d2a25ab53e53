"""One process of a launched stage: `python -m flowloom.launch.worker REQUEST`, started by torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

_LOOK_S = 1.0


def die_with_parent() -> None:
    """End this process, as SIGTERM does, once the one that started it is gone, however it went."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()


def main(path: str) -> None:
    """Take part in what the request at `path` asks for."""
    # Read when torch is first imported: busy waiting makes a step 4 to 200 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    die_with_parent()
    from flowloom.launch import request

    request.read(Path(path)).run()


if __name__ == "__main__":
    main(sys.argv[1])
