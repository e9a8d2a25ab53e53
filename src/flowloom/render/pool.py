"""Rendering in several processes. The caller fixes the chunks, their number changes nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, NamedTuple

from flowloom.config import check
from flowloom.render.engine import BATCH_SIZE, Engine, RenderJob, RenderResult, batch_key
from flowloom.render.models import ModelStore
from flowloom.render.worker import receive, send

Then = Callable[[Sequence[Any], list[RenderResult]], Any]
"""What a worker makes of a rendered chunk; a function of a module, since it travels by name."""


def keep_results(jobs: Sequence[RenderJob], results: list[RenderResult]) -> list[RenderResult]:
    """The pictures themselves."""
    return results


class _Worker(NamedTuple):
    process: subprocess.Popen
    tasks: IO[bytes]
    answers: IO[bytes]


class RenderPool:
    """Worker processes that render chunks of jobs; a context manager.

    Workers are plain subprocesses (`flowloom.render.worker`): they do not import the caller's main
    module, use one torch thread each, and end when the parent does, however it ends.
    """

    def __init__(
        self,
        catalogue_dir: Path | None,
        num_processes: int = 2,
        then: Then = keep_results,
        batch_size: int = BATCH_SIZE,
    ):
        """Start workers.

        Args:
            catalogue_dir: See `ModelStore.open`.
            num_processes: Workers; 1 renders in this process.
            then: Applied to each rendered chunk where it was rendered.
            batch_size: Sampler rows per batch.
        """
        check(num_processes >= 1, "num_processes", num_processes, "at least 1")
        self._then = then
        self._workers: list[_Worker] = []
        self._engine: Engine | None = None
        if num_processes == 1:
            self._engine = Engine(ModelStore.open(catalogue_dir), batch_size)
            return
        for _ in range(num_processes):
            process = subprocess.Popen(
                [sys.executable, "-m", "flowloom.render.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **_worker_environment()},
            )
            assert process.stdin is not None
            assert process.stdout is not None
            self._workers.append(_Worker(process, process.stdin, process.stdout))
        for worker in self._workers:
            send(worker.tasks, (catalogue_dir, batch_size, then))

    def __enter__(self) -> RenderPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers at once."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
            for stream in (worker.tasks, worker.answers):
                with contextlib.suppress(OSError):  # an unsent frame cannot be flushed any more
                    stream.close()
        self._workers = []

    def map(self, chunks: Sequence[Sequence[RenderJob]]) -> Iterator[Any]:
        """Render chunks; yields what `then` makes of each, in order, as soon as it is there.

        Raises:
            ValueError: A workflow cannot be executed; names the job.
            FloatingPointError: A sampler gave something that is not finite; names the jobs.
            RuntimeError: A worker died; names the chunk's jobs.
        """
        if self._engine is not None:
            return self._map_here(self._engine, chunks)
        return self._map_workers(chunks)

    def _map_here(self, engine: Engine, chunks: Sequence[Sequence[RenderJob]]) -> Iterator[Any]:
        import torch

        for chunk in chunks:
            # One thread, as in a worker: the number of threads changes rounding.
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                yield self._then(chunk, engine.render(chunk))
            finally:
                torch.set_num_threads(threads)

    def _map_workers(self, chunks: Sequence[Sequence[RenderJob]]) -> Iterator[Any]:
        futures: list[Future] = [Future() for _ in chunks]
        turns = itertools.count()
        lock = threading.Lock()

        def serve(worker: _Worker) -> None:
            while True:
                with lock:
                    index = next(turns)
                if index >= len(chunks):
                    return
                try:
                    send(worker.tasks, list(chunks[index]))
                    done, value = receive(worker.answers)
                except (EOFError, OSError):
                    names = f"{chunks[index][0].id} to {chunks[index][-1].id}"
                    code = worker.process.wait()
                    error = RuntimeError(f"render worker died (exit status {code}) on jobs {names}")
                    futures[index].set_exception(error)
                    continue
                except Exception as error:  # something that cannot travel, or a closed pool
                    futures[index].set_exception(error)
                    continue
                if done:
                    futures[index].set_result(value)
                else:
                    futures[index].set_exception(value)

        for worker in self._workers:
            threading.Thread(target=serve, args=(worker,), daemon=True).start()
        for future in futures:
            yield future.result()


def render_many(
    jobs: Sequence[RenderJob],
    catalogue_dir: Path | None = None,
    num_processes: int = 2,
    chunk_size: int = 64,
) -> list[RenderResult]:
    """Render workflows on several processes, results in their order.

    Args:
        jobs: Filled workflows.
        catalogue_dir: See `ModelStore.open`.
        num_processes: Workers; 1 renders in this process.
        chunk_size: Jobs per chunk. It fixes the batches, and what jobs can share.

    Raises:
        ValueError: A workflow cannot be executed; names the job.
    """
    keys = [batch_key(job.workflow) for job in jobs]
    order = sorted(range(len(jobs)), key=lambda place: (keys[place], place))
    chunks = [order[first : first + chunk_size] for first in range(0, len(order), chunk_size)]
    results: dict[int, RenderResult] = {}
    with RenderPool(catalogue_dir, min(num_processes, max(len(chunks), 1))) as pool:
        rendered = pool.map([[jobs[place] for place in chunk] for chunk in chunks])
        for chunk, pictures in zip(chunks, rendered, strict=True):
            results.update(zip(chunk, pictures, strict=True))
    return [results[place] for place in range(len(jobs))]


def _worker_environment() -> dict[str, str]:
    return {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        # Without these glibc gives large buffers back and faults them in again, a third of the
        # scoring time.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 25),
    }
