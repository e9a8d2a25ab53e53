"""A render worker: chunks come on standard input, answers go out on standard output.

Started by `flowloom.render.pool` as `python -m flowloom.render.worker`. A frame is 8 bytes of
length and a pickle. The first frame is (catalogue folder, batch size, function); each later one a
list of jobs, answered by (True, result) or (False, error).
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import IO, Any

_LENGTH = struct.Struct("<Q")


def send(stream: IO[bytes], value: Any) -> None:
    """Write one frame."""
    data = pickle.dumps(value)
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one frame.

    Raises:
        EOFError: The other side is gone.
    """
    return pickle.loads(_frame(stream))


def _frame(stream: IO[bytes]) -> bytes:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (size,) = _LENGTH.unpack(head)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def main() -> None:
    """Answer chunks until the parent closes the pipe."""
    # Interrupting is the parent's business; it ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What a library prints must not land between frames.
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        # A thread of its own, so that a dead parent ends a worker in the middle of a chunk too.
        while True:
            try:
                tasks.put(_frame(sys.stdin.buffer))
            except EOFError:
                os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    from flowloom.render.engine import Engine
    from flowloom.render.models import ModelStore

    engine = None
    catalogue_dir, batch_size, then = pickle.loads(tasks.get())
    while True:
        jobs = pickle.loads(tasks.get())
        try:
            engine = engine or Engine(ModelStore.open(catalogue_dir), batch_size)
            answer = (True, then(jobs, engine.render(jobs)))
        except (ValueError, FloatingPointError) as error:
            answer = (False, error)
        except Exception:
            # An error of the program: its trace counts, and its type may not travel.
            trace = traceback.format_exc()
            answer = (False, RuntimeError(f"{_name(jobs)}: render worker failed\n{trace}"))
        try:
            send(answers, answer)
        except BrokenPipeError:
            os._exit(1)


def _name(jobs: Sequence[Any]) -> str:
    return f"jobs {jobs[0].id} to {jobs[-1].id}"


if __name__ == "__main__":
    main()
