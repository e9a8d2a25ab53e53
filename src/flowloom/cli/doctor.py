"""`doctor`: what is installed, reachable, and missing, with what to do about it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from flowloom import __version__
from flowloom.cli import NO, OK, one_line
from flowloom.cli.output import print_json, print_table
from flowloom.runs import data_dir, data_md5, folder_digest, home

PACKAGES = ("torch", "mlflow", "dvc", "kfp", "kfp-kubernetes", "numpy", "pyarrow", "safetensors")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    """What."""
    ok: bool
    """Whether it is as it should be."""
    detail: str
    """What was found."""
    fix: str = ""
    """What to do where it is not."""


def doctor(parsed: Namespace) -> int:
    """Look at everything; status 1 where something is missing."""
    found = [*_software(), *_data(), *_home(), *_registry()]
    findings = [dataclasses.replace(f, fix="") if f.ok else f for f in found]
    if parsed.json:
        print_json({"findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        rows = [["ok" if f.ok else "MISSING", f.name, f.detail, f.fix] for f in findings]
        print_table("flowloom doctor", ["", "what", "found", "what to do"], rows)
    return OK if all(finding.ok for finding in findings) else NO


def _software() -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding("python", sys.version_info >= (3, 11), version, "use Python 3.11 or later")
    yield Finding("flowloom", True, __version__)
    for name in PACKAGES:
        try:
            yield Finding(name, True, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, False, "not installed", "make setup")
    yield Finding("processors", True, str(os.cpu_count()))
    git = shutil.which("git")
    yield Finding("git", git is not None, git or "not found", "install git: runs name their commit")


def _data() -> Iterator[Finding]:
    from flowloom.workflow import Catalogue

    folder = data_dir()
    fetch = "make setup, or `dvc pull --remote seed data.dvc`; FLOWLOOM_DATA names another folder"
    if not folder.is_dir():
        yield Finding("data", False, f"no folder {folder}", fetch)
        return
    catalogue = Catalogue.load("embedded")
    missing, wrong = [], []
    for file in catalogue.files:
        path = folder / "models" / file.folder / file.name
        if not path.is_file():
            missing.append(file.name)
        elif _sha256(path) != file.sha256:
            wrong.append(file.name)
    found = len(catalogue.files) - len(missing) - len(wrong)
    detail = f"{found} of {len(catalogue.files)} model files of the embedded catalogue in {folder}"
    if missing:
        detail += f"; missing: {', '.join(missing)}"
    if wrong:
        detail += f"; other bytes than the catalogue names: {', '.join(wrong)}"
    yield Finding("data", not missing and not wrong, detail, fetch)
    recorded = data_md5()
    if recorded is None:
        where = folder.parent / "data.dvc"
        yield Finding("data.dvc", False, f"no {where}", "run in the checkout of the repository")
    else:
        same = folder_digest(folder) == recorded
        detail = recorded if same else f"records {recorded}, the folder is another"
        yield Finding("data.dvc", same, detail, "`dvc status data.dvc` says what changed")


def _home() -> Iterator[Finding]:
    folder = home()
    parent = folder if folder.is_dir() else folder.parent
    writable = os.access(parent, os.W_OK)
    detail = str(folder)
    if folder.is_dir():
        finished = sum(1 for _ in folder.glob("runs/*/*/result.json"))
        detail += f", {finished} finished runs"
    else:
        detail += ", not made yet"
    free = shutil.disk_usage(parent if parent.exists() else Path.cwd()).free / 1e9
    detail += f", {free:.0f} GB free"
    yield Finding("home", writable, detail, "set FLOWLOOM_HOME to a folder you may write to")


def _registry() -> Iterator[Finding]:
    from flowloom.lifecycle import registry, tracking

    uri = tracking.tracking_uri()
    try:
        champion = registry.champion()
    except Exception as error:  # whatever the tracker throws is what there is to say
        advice = "start the server, or unset MLFLOW_TRACKING_URI"
        yield Finding("registry", False, f"{uri}: {one_line(error)}", advice)
        return
    yield Finding("registry", True, uri)
    if champion is None:
        yield Finding("champion", False, "none yet", "make demo")
    else:
        detail = f"{registry.NAME} version {champion.version}"
        yield Finding(
            "champion", True, detail + (f", turn {champion.turn}" if champion.turn else "")
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
