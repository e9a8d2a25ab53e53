"""`doctor`: what is installed, reachable, and missing, with what to do about it."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowloom import __version__
from flowloom.cli import NO, OK, one_line
from flowloom.cli.output import print_json, print_table
from flowloom.runs import data_dir, file_sha256, home

if TYPE_CHECKING:
    from flowloom.workflow import Catalogue

PACKAGES = ("torch", "mlflow", "dvc", "kfp", "kfp-kubernetes", "numpy", "pyarrow", "safetensors")
TEMPLATES = "comfyui-workflow-templates-json"
"""Workflows of the editor's own gallery, which tests convert."""
MOST_NAMED = 5
"""Files of `data/` that are not as recorded, of which each is named."""
PATIENCE_S = 10.0
"""Seconds until a server that does not say how it is is given up."""
_VERSIONS = ("comfyui", "required_frontend", "installed_templates", "pytorch", "python")


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
    needed: bool = True
    """Whether something does not work without it."""


def doctor(parsed: Namespace) -> int:
    """Look at everything; status 1 where something needed is missing."""
    if parsed.cluster is not None:
        from flowloom.cli import cluster_doctor

        found = cluster_doctor.look(parsed.cluster, parsed.context, parsed.namespace)
    elif parsed.context is not None:
        raise ValueError("--context: got no --cluster, expected one: only clusters have contexts")
    else:
        found = [*_software(), *_data(), *_home(), *_registry()]
    if parsed.catalogue is not None:
        found += _catalogue(parsed.catalogue, parsed.header)
    findings = [dataclasses.replace(f, fix="") if f.ok else f for f in found]
    if parsed.json:
        print_json({"findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        rows = [[_mark(f), f.name, f.detail, f.fix] for f in findings]
        columns = ["", "what", "found", "what to do"]
        print_table("flowloom doctor", columns, rows, {"ok": "green", "MISSING": "bold red"})
    return OK if all(finding.ok or not finding.needed for finding in findings) else NO


def _mark(finding: Finding) -> str:
    if finding.ok:
        return "ok"
    return "MISSING" if finding.needed else "none"


def _software() -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding("python", sys.version_info >= (3, 11), version, "use Python 3.11 or later")
    yield Finding("flowloom", True, __version__)
    for name in PACKAGES:
        try:
            yield Finding(name, True, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, False, "not installed", "make setup")
    try:
        yield Finding("templates", True, f"{TEMPLATES} {metadata.version(TEMPLATES)}")
    except metadata.PackageNotFoundError:
        yield Finding("templates", True, f"{TEMPLATES} not installed; only tests use it")
    yield Finding("processors", True, str(os.cpu_count()))
    git = shutil.which("git")
    advice = "install git, or set FLOWLOOM_COMMIT: runs name their commit"
    yield Finding("git", git is not None, git or "not found", advice, needed=False)


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
        elif file_sha256(path) != file.sha256:
            wrong.append(file.name)
    found = len(catalogue.files) - len(missing) - len(wrong)
    detail = f"{found} of {len(catalogue.files)} model files of the embedded catalogue in {folder}"
    if missing:
        detail += f"; missing: {', '.join(missing)}"
    if wrong:
        detail += f"; other bytes than the catalogue names: {', '.join(wrong)}"
    yield Finding("data", not missing and not wrong, detail, fetch)
    yield Finding("catalogue embedded", True, _said(catalogue))
    shipped = sorted((folder / "catalogues").glob("*.json.gz"))
    names = ", ".join(path.name.removesuffix(".json.gz") for path in shipped) or "none"
    yield Finding("catalogues", bool(shipped), f"{names} in {folder / 'catalogues'}", fetch)
    yield _recorded(folder, fetch)


def _recorded(folder: Path, fetch: str) -> Finding:
    """Whether the data folder is the one that `data.dvc` beside it records, file by file."""
    from flowloom.lifecycle import remotes, versioning
    from flowloom.lifecycle.pointer import read_pointer

    path = folder.parent / "data.dvc"
    if not path.is_file():
        return Finding("data.dvc", False, f"no {path}", "run in the checkout of the repository")
    try:
        pointer = read_pointer(path, remotes.SEED)
    except ValueError as error:
        return Finding("data.dvc", False, one_line(error), fetch)
    try:
        differences = versioning.verify(folder, pointer, near=path)
    except ValueError as error:  # nobody tells which
        detail = f"records {pointer.md5}, the folder is another; {one_line(error)}"
        return Finding("data.dvc", False, detail, fetch)
    shown = "; ".join(str(item) for item in differences[:MOST_NAMED])
    if len(differences) > MOST_NAMED:
        shown += f"; and {len(differences) - MOST_NAMED} more"
    advice = f"`make data` says how to bring back or record {folder.name}/"
    return Finding("data.dvc", not differences, shown or pointer.md5, advice)


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
        yield Finding("champion", False, "none yet", "make demo", needed=False)
    else:
        detail = f"{registry.NAME} version {champion.version}"
        yield Finding(
            "champion", True, detail + (f", turn {champion.turn}" if champion.turn else "")
        )


def _catalogue(source: str, headers: Sequence[str]) -> Iterator[Finding]:
    """What a server or file offers: versions, classes, files, and whether a picture can be made."""
    from flowloom.cli.catalogues import open_catalogue, read_headers
    from flowloom.workflow import object_info, profile

    if source.startswith(("http://", "https://")):
        address = object_info.server_address(source)
        try:
            stats = object_info.get_json(
                f"{address}/system_stats", read_headers(headers), PATIENCE_S
            )
            yield Finding("server", True, f"{address}: {_versions(stats)}")
        except ValueError as error:
            yield Finding(
                "server",
                False,
                one_line(error),
                "start it, or mend the address; --header passes what a proxy asks for",
            )
    try:
        catalogue = open_catalogue(source, headers)
    except ValueError as error:
        advice = "name a server that answers /object_info, or save one: flowloom catalogue snapshot"
        yield Finding("catalogue", False, one_line(error), advice)
        return
    yield Finding("catalogue", True, f"{source}: {_said(catalogue)}")
    unknown = [file.name for file in catalogue.files if not (file.family or file.role)]
    detail = f"{len(catalogue.files) - len(unknown)} of {len(catalogue.files)} known"
    yield Finding(
        "model files",
        bool(catalogue.files),
        detail + (f"; not known: {', '.join(unknown[:5])}" if unknown else ""),
        "install models on the server; flowloom catalogue snapshot --files says what they are",
    )
    try:
        usable = profile.text_to_image(catalogue)
    except ValueError as error:
        yield Finding("text to image", False, one_line(error), "install a checkpoint")
        return
    wanted = [name for name in profile.MUST if name in catalogue.nodes]
    idle = [name for name in wanted if name not in usable]
    detail = f"{len(usable)} of {len(profile.TEXT_TO_IMAGE)} classes can be run"
    if idle:
        detail += f"; without a file: {', '.join(idle)}"
    loaders = [n for n in ("CheckpointLoaderSimple", "UNETLoader") if n in usable]
    advice = "install a checkpoint or a diffusion model: without one no picture can be made"
    yield Finding("text to image", bool(loaders), detail, advice)


def _said(catalogue: Catalogue) -> str:
    return f"{len(catalogue.nodes)} classes, {len(catalogue.files)} files, {catalogue.hash[:12]}"


def _versions(stats: Any) -> str:
    """Versions that a server tells of itself in `GET /system_stats`, and its devices."""
    system = stats.get("system") if isinstance(stats, dict) else None
    if not isinstance(system, dict):
        return "answers, without its version"
    found = {name: system.get(f"{name}_version") for name in _VERSIONS}
    said = [f"{k.replace('_', ' ')} {str(v).split()[0]}" for k, v in found.items() if v]
    devices = stats.get("devices")
    for device in devices if isinstance(devices, list) else ():
        said.append(str(device.get("name", "")) if isinstance(device, dict) else "")
    return ", ".join(filter(None, said)) or "answers, without its version"
