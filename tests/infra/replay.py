"""The steps of a Dockerfile's target, run in a folder that stands for `/`; no engine is needed.

    python -m tests.infra.replay [--target cpu] [--installed] [--build-arg NAME=VALUE]

Real: every COPY (what `.dockerignore` leaves out is not there, a link stays a link), ENV, ARG,
WORKDIR and RUN, in a clean environment: no variable of this one but pip's own settings, no program
but those listed here, an empty virtual environment, the wheel built from what was copied and
installed into it. Stages are built one at a time at the same place, so that a path inside holds
after a COPY from one to another.

Not run: what an engine keeps for the start (CMD, ENTRYPOINT, EXPOSE, HEALTHCHECK, LABEL).

Replaced:
- a base image: by this interpreter, its pip, and the few programs of `PROGRAMS`, so without git
  or a compiler, as the image; the image that has git has it here too. Nothing stops a step that
  names a file of this machine.
- a path in a RUN or ENV: by the same below the folder.
- users: `useradd` does nothing and `chown` looks at whether there is something to own; steps after
  USER run as who runs this.
- with `--installed`, each `pip install` from an index: by links to this environment's packages,
  after a check that they are of the versions that `requirements.lock` names. Without it they are
  downloaded: 2 GB, minutes.

`render` fetches a server's source: without a way to it, `--build-arg COMFYUI_SOURCE=file:///FOLDER`
names a copy (and COMFYUI_COMMIT, COMFYUI_VERSION another commit of it).
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from tests.infra import dockerfile
from tests.infra.dockerfile import Stage, Step

CHECKOUT = Path(__file__).parents[2]
FILE = CHECKOUT / "infra" / "Dockerfile"
PROGRAMS = ("sh", "mkdir", "rm", "env", "uname", "grep")
"""What the base image has too and a step may need."""
GIT_IMAGE = re.compile(r"python:[\d.]+-bookworm")
"""An image with git."""
PASSED = re.compile(r"PIP_\w+|SSL_CERT_FILE|https?_proxy|HTTPS?_PROXY|no_proxy|NO_PROXY")
OWN = re.compile(r"flowloom|__editable__|pip\b|__pycache__|_virtualenv|.*\.pth$|.*\.egg-link$")
"""Entries of this environment that are not packages of the lock."""


class Replay:
    """Runs stages below `folder`: one at a time in `root`, finished ones aside."""

    def __init__(self, folder: Path, installed: bool, args: dict[str, str] | None = None):
        """Work in `folder`; `installed`: link to packages of this one; `args`: of a build."""
        self.root = folder / "root"
        self._aside = folder / "stages"
        self._installed = installed
        self._args = args or {}
        self.stages = dockerfile.read(FILE)
        self.ran: list[tuple[str, Step, float]] = []
        self._aside.mkdir(parents=True)

    def build(self, name: str) -> Path:
        """Build a stage and those that it needs; its tree."""
        tree = self._aside / name
        if tree.exists():
            return tree
        stage = self.stages[name]
        if not stage.steps:
            return self.build(stage.parent)
        for needed in _needs(stage, self.stages):
            self.build(needed)
        if stage.parent in self.stages:
            shutil.copytree(self._aside / stage.parent, self.root, symlinks=True)
        else:
            _base(self.root, stage.parent)
        state = _State(self.root, self._args)
        for inherited in dockerfile.chain(self.stages, name)[:-1]:
            for step in inherited.steps:
                state.take(step)
        for step in stage.steps:
            started_s = time.perf_counter()
            state.take(step)
            if step.kind == "COPY":
                self._copy(step, state)
            elif step.kind == "RUN":
                self._run(step, state)
            self.ran.append((name, step, time.perf_counter() - started_s))
        self.root.rename(tree)
        return tree

    def _copy(self, step: Step, state: _State) -> None:
        origin, sources, target = dockerfile.copied(step)
        # Where the target ends in / or is a folder, a file goes into it; a folder is merged.
        into = self.root / state.inside(target).lstrip("/")
        for source in sources:
            found = (
                context(source)
                if origin is None
                else {"": self._aside / origin / source.lstrip("/")}
            )
            for relative, path in found.items():
                if path.is_dir():
                    shutil.copytree(path, into, symlinks=True, dirs_exist_ok=True)
                    continue
                whole = into / relative if relative else into
                if not relative and (target.endswith("/") or into.is_dir()):
                    whole = into / path.name
                whole.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, whole, follow_symlinks=False)

    def _run(self, step: Step, state: _State) -> None:
        if self._installed and re.match(r"pip install (?!.*--no-index)", step.text):
            link_packages(self.root / "opt" / "venv")
            return
        done = subprocess.run(
            ["/bin/sh", "-c", _mapped(step.text, self.root)],
            cwd=self.root / state.folder.lstrip("/"),
            env=state.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
            raise ValueError(
                f"{FILE.name}:{step.line}: RUN {step.text}: got exit status {done.returncode}, "
                f"expected 0\n{tail}"
            )


class _State:
    """Variables, folder and user as instructions leave them."""

    def __init__(self, root: Path, given: dict[str, str]):
        self._root = root
        self._given = given
        self.folder = "/"
        self.env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/root"}
        self._args: dict[str, str] = {}

    def take(self, step: Step) -> None:
        """Apply an instruction that changes only this."""
        known = self._args | self.env
        if step.kind == "ENV":
            self.env |= dockerfile.pairs(dockerfile.replaced(step.text, known))
        elif step.kind == "ARG":
            declared = dockerfile.pairs(step.text)
            self._args |= declared | {n: self._given[n] for n in declared if n in self._given}
        elif step.kind == "WORKDIR":
            self.folder = step.text
            (self._root / step.text.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def inside(self, path: str) -> str:
        """A path of a COPY, absolute."""
        path = dockerfile.replaced(path, self._args | self.env)
        return path if path.startswith("/") else f"{self.folder}/{path}"

    def environment(self) -> dict[str, str]:
        """What a RUN sees."""
        passed = {name: value for name, value in os.environ.items() if PASSED.fullmatch(name)}
        own = self._args | self.env
        return passed | {name: _mapped(value, self._root) for name, value in own.items()}


def context(source: str) -> dict[str, Path]:
    """Files of a COPY source that `.dockerignore` lets through, by path below the source.

    Raises:
        ValueError: There is none.
    """
    path = CHECKOUT / source
    found = [path] if path.is_file() else path.rglob("*")
    files = [file for file in found if file.is_file() or file.is_symlink()]
    kept = [file for file in files if not ignored(file.relative_to(CHECKOUT).as_posix())]
    if not kept:
        raise ValueError(f"COPY {source}: got nothing of the checkout, expected files")
    return {"" if file == path else file.relative_to(path).as_posix(): file for file in kept}


def ignored(name: str) -> bool:
    """Whether `.dockerignore` leaves a file out: the last pattern that fits decides."""
    out = False
    for line in (CHECKOUT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        kept, pattern = pattern.startswith("!"), pattern.lstrip("!")
        parts = name.split("/")
        starts = range(len(parts)) if pattern.startswith("**/") else (0,)
        heads = ["/".join(parts[a:b]) for a in starts for b in range(a + 1, len(parts) + 1)]
        if any(fnmatch.fnmatch(head, pattern.removeprefix("**/")) for head in heads):
            out = not kept
    return out


def link_packages(venv: Path) -> None:
    """Give a virtual environment the packages of this one, all but flowloom.

    Raises:
        ValueError: They are not those of `requirements.lock`.
    """
    wrong = differing(CHECKOUT / "requirements.lock")
    if wrong:
        raise ValueError(f"requirements.lock: {'; '.join(wrong)}")
    (here,) = {Path(metadata.distribution(name).locate_file("")) for name in ("kfp", "torch")}
    (there,) = venv.glob("lib/python3*/site-packages")
    for entry in there.iterdir():  # the setuptools that a new environment has
        if not OWN.match(entry.name) and not entry.is_symlink():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for entry in here.iterdir():
        target = there / entry.name
        if not OWN.match(entry.name) and not target.exists():
            target.symlink_to(entry)


def differing(lock: Path) -> list[str]:
    """Packages that are installed otherwise than a lock says, each with both versions."""
    wrong = []
    for name, version in re.findall(
        r"^([\w.-]+)(?:\[[\w,]+\])?==([^\s;\\]+)", lock.read_text(), re.M
    ):
        try:
            got = metadata.version(name)
        except metadata.PackageNotFoundError:
            got = "none"
        if got != version:
            wrong.append(f"{name}: got {got}, expected {version}")
    return wrong


def _needs(stage: Stage, stages: dict[str, Stage]) -> list[str]:
    origins = [dockerfile.copied(step)[0] for step in stage.steps if step.kind == "COPY"]
    return [name for name in (stage.parent, *origins) if name in stages]


def _base(root: Path, image: str) -> None:
    """What the replay has instead of a base image."""
    for name in ("tmp", "root", "home", "var/lib", "bin", "usr/local/bin", "opt"):
        (root / name).mkdir(parents=True)
    for name in (*PROGRAMS, *(["git"] if GIT_IMAGE.fullmatch(image) else [])):
        (root / "bin" / name).symlink_to(str(shutil.which(name)))
    python = Path(sys.base_prefix) / "bin" / "python3"
    scripts = {
        "python": f'exec "{python}" "$@"',
        "pip": f'exec "{python}" -m pip "$@"',
        "useradd": "exit 0",
        "chown": 'shift; for path; do [ -e "$path" ] || exit 1; done',
    }
    for name, line in scripts.items():
        script = root / "usr" / "local" / "bin" / name
        script.write_text(f"#!/bin/sh\n{line}\n")
        script.chmod(0o755)


def _mapped(text: str, root: Path) -> str:
    """`text` with every path from `/` on below `root`."""
    return re.sub(r"(?:(?<=[\s\"'=:])|^)/(?=[a-z])", f"{root}/", text)


def main() -> int:
    """Replay a target and say how long each step took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--installed", action="store_true", help="link to this environment's packages"
    )
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build's"
    )
    options = parser.parse_args()
    if options.installed and options.target == "render":
        parser.error("--installed: got render, expected a target whose packages the lock names")
    args = dict(pair.split("=", 1) for pair in options.build_arg)
    with tempfile.TemporaryDirectory() as folder:
        replay = Replay(Path(folder), options.installed, args)
        try:
            replay.build(options.target)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            for stage, step, seconds in replay.ran:
                if step.kind in ("COPY", "RUN"):
                    print(f"{seconds:7.1f} s  {stage:13} {step.kind} {step.text[:70]}")
    print(f"target {options.target}: every step ended with status 0")
    return 0


if __name__ == "__main__":
    sys.exit(main())
