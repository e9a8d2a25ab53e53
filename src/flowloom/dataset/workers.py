"""Tasks spread over processes that end when the parent does, however it ends.

A worker is a plain subprocess of this module: it imports no main module of the caller's, reads a
function and its tasks from its standard input and writes a result for each.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any


def run_tasks(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], num_processes: int
) -> list[Any]:
    """What `function(*task)` returns for each task, in their order.

    Args:
        function: A function of a module, since it travels by name.
        tasks: Arguments; task k is done by worker k mod `num_processes`.
        num_processes: Workers; with one of them, or one task, all is done in this process.

    Raises:
        ValueError: As raised by the function.
        RuntimeError: A worker died.
    """
    num = min(num_processes, len(tasks))
    if num <= 1:
        return [function(*task) for task in tasks]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flowloom.dataset.workers"]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        for _ in range(num)
    ]
    try:
        for k, worker in enumerate(workers):
            assert worker.stdin is not None
            pickle.dump((function, list(tasks[k::num])), worker.stdin)
            worker.stdin.flush()
        return [_receive(workers[place % num]) for place in range(len(tasks))]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def _receive(worker: subprocess.Popen[bytes]) -> Any:
    assert worker.stdout is not None
    try:
        value = pickle.load(worker.stdout)
    except EOFError:
        raise RuntimeError(f"worker died (exit status {worker.wait()})") from None
    if isinstance(value, Exception):
        raise value
    return value


def main() -> None:
    """Do the tasks that the standard input holds."""
    results_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task prints must not get among the results
    function, tasks = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for task in tasks:
        try:
            value = function(*task)
        except Exception as error:
            value = error
        pickle.dump(value, results_out)
        results_out.flush()


def _end_with_parent() -> None:
    """Exit once the parent's end of the pipe is closed."""
    # Not through `sys.stdin`: a buffer that a daemon thread waits in breaks the interpreter's end.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
