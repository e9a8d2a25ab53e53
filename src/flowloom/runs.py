"""A stage's run folder: frozen inputs in, one digested artifact out, resumed by the same command.

.flowloom/runs/<stage>/<key>/
    config.json      resolved configuration, inputs and code digest: what the key is made of
    metrics.jsonl    one object per logged step
    log.txt
    work/            checkpoints and shards of an unfinished run; not part of the artifact
    out/             the artifact; appears whole or not at all
    result.json      final metrics and the artifact's digest; written last: the run is done
    timing.json      measured seconds: a sidecar, since nothing that varies enters `out`
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flowloom.config import to_dict

_EXPECTED = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "room in the quota",
    errno.EFBIG: "no limit on the size of a file",
    errno.EROFS: "a file system that takes files",
    errno.EACCES: "permission",
    errno.EPERM: "permission",
    errno.ENOTDIR: "a folder",
}
"""What a folder must have for what the operating system refused."""


class StorageError(ValueError):
    """A folder takes no more files: full, read-only or barred. The same call may work later."""


@contextmanager
def storing(who: str, folder: Path) -> Iterator[None]:
    """Have a refusal of the file system said in one line, wherever inside it comes from.

    Args:
        who: What writes, such as a stage.
        folder: Where it writes, named if the error does not name a file.

    Raises:
        StorageError: Instead of such an error, which stays its cause. Others pass.
    """
    try:
        yield
    except ValueError:  # said already
        raise
    except Exception as error:
        refused = _refusal(error)
        if refused is None:
            raise
        code, text, where = refused
        raise StorageError(
            f"{who}: {where or folder}: got {text!r}, expected {_EXPECTED[code]}; "
            "the same command goes on from here"
        ) from error


_WORDS = {"database or disk is full": errno.ENOSPC, "readonly database": errno.EROFS}
"""SQLite's own."""


def _said(text: str) -> int | None:
    """Number of a refusal by its words: writers that are not Python's have nothing else."""
    found = re.search(r"os error (\d+)", text)
    if found:
        return int(found[1])
    return next((number for words, number in _WORDS.items() if words in text), None)


def _refusal(error: BaseException | None) -> tuple[int, str, str | None] | None:
    """Number, text and file of the refusal that `error` is or comes from, if it does."""
    while error is not None:
        if isinstance(error, OSError):
            number, file = error.errno, error.filename2 or error.filename
        else:
            number, file = _said(str(error)), None
        if number in _EXPECTED:
            return number, os.strerror(number), str(file) if file else None
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def home() -> Path:
    """Folder of runs, store and tracking: `FLOWLOOM_HOME`, else `.flowloom` where one stands."""
    return Path(os.environ.get("FLOWLOOM_HOME", ".flowloom")).absolute()


def is_follower() -> bool:
    """Whether another process of this one's group (torchrun, rank 0) writes for it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


def data_dir() -> Path:
    """The read-only input folder: `FLOWLOOM_DATA`, else `data` where one stands."""
    return Path(os.environ.get("FLOWLOOM_DATA", "data")).absolute()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    with _replaced(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a training checkpoint so that a kill leaves the old or the new one."""
    import torch

    # A file of Python's: torch's own hides why it could not be written.
    with _replaced(path) as partial, partial.open("wb") as file:
        torch.save(dict(state), file)


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place at the end; after an error nothing is left."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except Exception as error:
        with suppress(OSError):
            partial.unlink()
        refused = _refusal(error)
        if refused is None or refused[2]:
            raise
        number, text, _ = refused
        raise OSError(number, text, str(path)) from error


def _append(path: Path, line: str) -> None:
    """Add a line, or nothing: a disk that fills up takes the first bytes of what it refuses."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        data = line.encode() + b"\n"
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            error.filename = error.filename or str(path)
            file.truncate(size)
            raise


def file_md5(path: Path) -> str:
    """MD5 of a file, the digest DVC uses."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, the digest model files are known by."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_entries(path: Path) -> list[dict[str, str]]:
    """`[{"md5", "relpath"}]` of every file below `path`, in DVC's order."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    entries = [{"md5": file_md5(f), "relpath": f.relative_to(path).as_posix()} for f in files]
    return sorted(entries, key=lambda entry: entry["relpath"])


def folder_digest(path: Path) -> str:
    """Digest of a folder as DVC writes it into a `.dvc` file (`<md5>.dir`)."""
    manifest = json.dumps(folder_entries(path), sort_keys=True).encode()
    return hashlib.md5(manifest, usedforsecurity=False).hexdigest() + ".dir"


@functools.cache
def code_digest() -> str:
    """Digest of flowloom's own source; `FLOWLOOM_CODE_DIGEST` (an image digest) replaces it."""
    given = os.environ.get("FLOWLOOM_CODE_DIGEST")
    if given:
        return given
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def input_digest(path: Path) -> str:
    """Digest of a stage input: recorded when a run wrote it, else computed from its bytes.

    Raises:
        ValueError: If nothing is there.
    """
    record = path.parent / "result.json"
    if path.name == "out" and record.is_file():
        return json.loads(record.read_text())["digest"]
    if path.is_dir():
        return folder_digest(path)
    if path.is_file():
        return file_md5(path)
    raise ValueError(f"input: got {str(path)!r}, expected an existing file or folder")


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a finished stage leaves behind."""

    stage: str
    """Name of the stage."""
    out_dir: Path
    """The artifact: a folder."""
    digest: str
    """Its digest, as DVC writes it."""
    metrics: dict[str, float]
    """Final metrics by `area/name`."""
    cached: bool
    """Whether the stage had been finished before."""


class Run:
    """One run of one stage. Stage functions write to `out` and `work`, and log through it."""

    def __init__(self, stage: str, folder: Path):
        """Open the run folder `folder`, making it if needed."""
        self.stage = stage
        self.dir = folder
        self.dir.mkdir(parents=True, exist_ok=True)
        self.work = folder / "work"
        self._final_out = folder / "out"
        self.out = folder / "out.partial"
        self._started_s = time.perf_counter()

    @property
    def done(self) -> bool:
        """Whether the run was finished, by this process or an earlier one."""
        return (self.dir / "result.json").is_file()

    def begin(self) -> None:
        """Start the clock and empty the artifact folder; `work` stays, to resume from."""
        self._started_s = time.perf_counter()
        for folder in (self.out, self._final_out):
            shutil.rmtree(folder, ignore_errors=True)
        self.out.mkdir()
        self.work.mkdir(exist_ok=True)

    def log(self, message: str) -> None:
        """Add a line to `log.txt` and standard error."""
        _append(self.dir / "log.txt", message)
        print(f"[{self.stage}] {message}", file=sys.stderr, flush=True)

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Append `values` (by `area/name`) at `step` to `metrics.jsonl`."""
        _append(self.dir / "metrics.jsonl", json.dumps({"step": step, **values}))

    def finish(self, metrics: Mapping[str, float]) -> StageResult:
        """Seal the artifact: rename it into place, then write `result.json`."""
        os.replace(self.out, self._final_out)
        entries = [file for file in self._final_out.rglob("*") if file.is_file()]
        result = {
            "digest": folder_digest(self._final_out),
            "metrics": dict(metrics),
            "nfiles": len(entries),
            "size": sum(file.stat().st_size for file in entries),
        }
        write_json(self.dir / "timing.json", {"seconds": time.perf_counter() - self._started_s})
        write_json(self.dir / "result.json", result)
        shutil.rmtree(self.work, ignore_errors=True)
        return self.result(cached=False)

    def result(self, cached: bool = True) -> StageResult:
        """The finished run's result."""
        record = json.loads((self.dir / "result.json").read_text())
        return StageResult(self.stage, self._final_out, record["digest"], record["metrics"], cached)


def data_md5() -> str | None:
    """The digest of `data/` that `data.dvc` records, or `None` where there is no such file."""
    pointer = data_dir().parent / "data.dvc"
    if not pointer.is_file():
        return None
    found = re.search(r"md5: *([0-9a-f]{32}(?:\.dir)?)", pointer.read_text())
    return found.group(1) if found else None


def open_run(stage: str, config: Any, inputs: Mapping[str, str]) -> Run:
    """Find or make the run folder of (stage, configuration, inputs, data, code).

    Args:
        stage: Name of the stage.
        config: Its resolved configuration.
        inputs: Input name to digest or other fixed value.

    Raises:
        StorageError: The home folder takes no files.
    """
    identity = {
        "stage": stage,
        "config": to_dict(config),
        "inputs": dict(inputs),
        "data": data_md5(),
        "code": code_digest(),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = home() / "runs" / stage / key
    with storing(stage, folder):
        run = Run(stage, folder)
        if not is_follower():
            write_json(run.dir / "config.json", identity)
    return run


@contextmanager
def exclusive(run: Run) -> Iterator[None]:
    """Hold the run folder: a second process waits, then finds the work done.

    Raises:
        StorageError: A folder that is written to inside takes no more files.
    """
    import fcntl

    with storing(run.stage, run.dir), (run.dir / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            with storing(run.stage, run.dir):
                yield
        except StorageError:
            # The next attempt starts it anew, from the checkpoints in `work`.
            shutil.rmtree(run.out, ignore_errors=True)
            raise
