"""A throw-away PostgreSQL on loopback, of the machine's binaries (`apt-get install postgresql`).

PostgreSQL runs as no root: where the tests do, it runs as `nobody`.
"""

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

USER = "mlflow"


class Postgres:
    """A cluster of databases in a folder of its own."""

    def __init__(self, binaries, folder):
        self.binaries = binaries
        self._folder = folder
        self._password = secrets.token_hex(8)
        self._owner = _owner()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]

    def uri(self, database):
        return f"postgresql://{USER}:{self._password}@127.0.0.1:{self._port}/{database}"

    def make(self):
        password = self._folder / "password"
        password.write_text(self._password)
        if self._owner:
            for path in (self._folder, password):
                os.chown(path, self._owner.pw_uid, self._owner.pw_gid)
        self._run("initdb", f"--username={USER}", f"--pwfile={password}", "--auth=scram-sha-256",
                  "--encoding=UTF8", "--locale=C", "--no-sync")  # fmt: skip

    def start(self):
        settings = f"-c listen_addresses=127.0.0.1 -p {self._port} -k {self._folder} -c fsync=off"
        self._run("pg_ctl", "start", "--wait", f"--log={self._folder / 'log'}", "-o", settings)

    def stop(self):
        """As a crash does: no connection is asked."""
        self._run("pg_ctl", "stop", "--mode=immediate")

    def create(self, database):
        self.client("createdb", f"--maintenance-db={self.uri('postgres')}", database)

    def drop(self, database):
        self.client("dropdb", "--force", f"--maintenance-db={self.uri('postgres')}", database)

    def client(self, program, *arguments):
        subprocess.run([self.binaries / program, *arguments], check=True)

    def _run(self, program, *arguments):
        owner = self._owner
        as_owner = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        subprocess.run(
            [self.binaries / program, f"--pgdata={self._folder / 'data'}", *arguments],
            check=True,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            **(as_owner if owner else {}),
        )


@contextlib.contextmanager
def postgres():
    """A running cluster; the test is skipped where the machine has no PostgreSQL."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL on this machine: `apt-get install postgresql` brings it")
    # Not below pytest's folders: these are closed to any other user.
    folder = Path(tempfile.mkdtemp(prefix="flowloom-postgres-"))
    try:
        server = Postgres(binaries, folder)
        server.make()
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def _binaries():
    """The newest of Debian's, which are not on the PATH, or else what is there."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=_version)
    path = found[-1] if found else shutil.which("initdb")
    return Path(path).resolve().parent if path else None


def _version(path):
    return int(path.parts[-3]) if path.parts[-3].isdigit() else 0


def _owner():
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None
