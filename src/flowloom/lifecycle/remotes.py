"""DVC remotes by name: `store`, `seed`, and those of a checkout's `.dvc/config`.

`store` is `FLOWLOOM_STORE` (a folder, or `s3://bucket/prefix`), else `store` in the home folder.
`seed` is `FLOWLOOM_SEED`, else what `.dvc/config` says; nobody publishes to it. DVC itself takes
seconds to import and is not needed to read or write what it reads and writes.
"""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from flowloom.lifecycle.objects import FOLDER, object_key
from flowloom.runs import data_dir, file_md5, home, storing

STORE = "store"
"""Where stages publish."""
SEED = "seed"
"""What a fresh clone brings along; read-only."""
S3 = "s3://"
WORKERS = 8
"""Objects on their way at once."""


class UnreachableError(ValueError):
    """A remote did not answer, or stopped answering: the same call may work later."""


class Remote(Protocol):
    """Where objects are kept. Digests of manifests end in `.dir`."""

    name: str
    """Its name in `.dvc/config`."""
    place: str
    """Its folder or address."""

    def has(self, digest: str, size: int) -> bool:
        """Whether it holds this object of `size` bytes; if so, its age begins anew.

        So nobody who deletes what is old takes an object away from a publisher that relies on it.
        """
        ...

    def put(self, digest: str, source: Path) -> None:
        """Add a file; raises `ValueError` where its bytes are not those of `digest`."""
        ...

    def put_manifest(self, digest: str, data: bytes) -> None:
        """Add a manifest."""
        ...

    def get(self, digest: str, target: Path) -> bool:
        """Bring an object; goes on where `target` ends. `False` where there is no such object."""
        ...

    def read(self, digest: str) -> bytes | None:
        """A manifest's bytes, or `None`."""
        ...

    def digest_of(self, digest: str) -> str | None:
        """The MD5 of what is kept under `digest`, or `None`."""
        ...

    def sweep(self) -> None:
        """Remove what dead publishers left half-written."""
        ...

    def stop(self) -> None:
        """End transfers under way in other threads."""
        ...


def find(name: str, near: Path | None = None) -> Remote:
    """The remote of a name.

    Args:
        name: `store`, `seed`, or a remote of `.dvc/config`.
        near: A file or folder in the checkout whose `.dvc/config` is meant; else the one around
            the working folder, or around the data folder.

    Raises:
        ValueError: There is no such remote, or its address is no folder and not of S3.
    """
    given = {STORE: "FLOWLOOM_STORE", SEED: "FLOWLOOM_SEED"}.get(name)
    url = os.environ.get(given) if given else None
    if url:
        return _open(name, url, Path.cwd(), None)
    if name == STORE:
        return LocalRemote(name, home() / "store")
    known = {STORE, SEED}
    for folder in _checkouts(near):
        config = _dvc_config(folder)
        section = f"'remote \"{name}\"'"
        if config.has_option(section, "url"):
            endpoint = config.get(section, "endpointurl", fallback=None)
            return _open(name, config.get(section, "url"), folder, endpoint)
        known |= {s.split('"')[1] for s in config.sections() if s.startswith("'remote \"")}
    advice = "; outside a checkout FLOWLOOM_SEED says where it is" if name == SEED else ""
    raise ValueError(f"remote: got {name!r}, expected one of {', '.join(sorted(known))}{advice}")


def default_name(near: Path) -> str | None:
    """The default remote of the checkout around `near`, or `None`."""
    for folder in _checkouts(near):
        name = _dvc_config(folder).get("core", "remote", fallback=None)
        if name:
            return name
    return None


def expect(digest: str, got: str, source: Path) -> None:
    """Raises `ValueError` where a file is no longer the one that was to be published."""
    if got != digest:
        raise ValueError(f"{source}: got digest {got}, expected {digest}: changed meanwhile")


@contextlib.contextmanager
def held(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock file, made if needed, while its owner lives; says whether it is held.

    A lock file that its last holder removed holds nothing, so the path must still name it.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("ab")
        except FileNotFoundError:  # its folder was removed in between
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            try:
                current = path.stat().st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                current = False
            if current:
                yield True
                return


class LocalRemote:
    """A folder. An object appears under its name whole, or not at all."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.place = str(root)
        self._root = root
        # Outside files/, where DVC lists objects; on the same file system, for the rename.
        self._partials = root / "partial"

    def has(self, digest: str, size: int) -> bool:
        """See `Remote`. Read again, so that publishing mends what was damaged."""
        path = self._path(digest)
        try:
            if path.stat().st_size != size or self.digest_of(digest) != digest:
                return False
            with contextlib.suppress(PermissionError):  # of another owner: its age stays
                os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def put(self, digest: str, source: Path) -> None:
        """See `Remote`."""
        with self._partial(digest) as partial:
            shutil.copyfile(source, partial)
            expect(digest, file_md5(partial), source)
            self._settle(partial, digest)

    def put_manifest(self, digest: str, data: bytes) -> None:
        """See `Remote`."""
        with self._partial(digest) as partial:
            partial.write_bytes(data)
            self._settle(partial, digest)

    def get(self, digest: str, target: Path) -> bool:
        """See `Remote`."""
        try:
            shutil.copyfile(self._path(digest), target)
        except FileNotFoundError:
            return False
        return True

    def read(self, digest: str) -> bytes | None:
        """See `Remote`."""
        try:
            return self._path(digest).read_bytes()
        except FileNotFoundError:
            return None

    def digest_of(self, digest: str) -> str | None:
        """See `Remote`."""
        ending = FOLDER if digest.endswith(FOLDER) else ""
        try:
            return file_md5(self._path(digest)) + ending
        except FileNotFoundError:
            return None

    def sweep(self) -> None:
        """See `Remote`. Whoever writes a partial holds it, so one that is not held is left over."""
        for path in self._partials.glob("*"):
            with held(path, wait=False) as dead:
                if dead:
                    path.unlink(missing_ok=True)

    def stop(self) -> None:
        """See `Remote`. Copies are short."""

    def _path(self, digest: str) -> Path:
        return self._root / object_key(digest)

    @contextlib.contextmanager
    def _partial(self, digest: str) -> Iterator[Path]:
        while True:
            path = self._partials / f"{digest}.{secrets.token_hex(4)}"
            with held(path, wait=False) as mine:
                if not mine:  # a sweep came between making and holding it
                    continue
                try:
                    with storing(f"remote {self.name!r}", self._root):
                        yield path
                finally:
                    path.unlink(missing_ok=True)
                return

    def _settle(self, partial: Path, digest: str) -> None:
        target = self._path(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, target)
        target.chmod(0o444)  # as DVC leaves objects


def _open(name: str, url: str, folder: Path, endpoint: str | None) -> Remote:
    if url.startswith(S3):
        from flowloom.lifecycle.s3 import S3Remote

        return S3Remote(name, url, endpoint)
    if "://" in url:
        raise ValueError(f"remote {name!r}: got {url!r}, expected a folder or {S3}bucket/prefix")
    return LocalRemote(name, Path(os.path.normpath(folder / Path(url).expanduser())))


def _checkouts(near: Path | None) -> Iterator[Path]:
    """The `.dvc` folders of the checkouts that may be meant."""
    starts = [Path.cwd(), data_dir().parent] if near is None else [near.absolute()]
    for start in starts:
        for folder in (start, *start.parents):
            if (folder / ".dvc" / "config").is_file():
                yield folder / ".dvc"
                break


def _dvc_config(folder: Path) -> configparser.ConfigParser:
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read([folder / "config", folder / "config.local"])
    except configparser.Error as error:
        raise ValueError(f"{folder / 'config'}: {error}") from None
    return config
