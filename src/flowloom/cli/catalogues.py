"""`catalogue show`, `catalogue snapshot` and `catalogue diff`; where catalogues are found."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from flowloom.cli import NO, OK
from flowloom.cli.output import (
    Lines,
    counted,
    print_json,
    print_table,
    warn,
    written_whole,
)
from flowloom.runs import data_dir
from flowloom.workflow import Catalogue, CatalogueError, ModelFile
from flowloom.workflow.catalogue_diff import Difference, difference

_SUFFIXES = (".json", ".json.gz")
_NAME = re.compile(r"[\w.-]+")
_HEADER = re.compile(r"([A-Za-z0-9!#$%&'*+.^_`|~-]+)=([^\r\n]*)")


def open_catalogue(source: str, headers: Sequence[str] = ()) -> Catalogue:
    """A catalogue by the name of a shipped one, a file, or the address of a server.

    Args:
        source: "embedded", a name in `data/catalogues`, a .json or .json.gz file, http://HOST:PORT.
        headers: "NAME=VALUE" sent along to a server.

    Raises:
        ValueError: It cannot be read, or a header has another form.
    """
    sent = read_headers(headers)
    if sent and not source.startswith(("http://", "https://")):
        warn(f"--header is not used: {source} is no server")
    if source == "embedded" or source.endswith(_SUFFIXES) or not _NAME.fullmatch(source):
        return Catalogue.load(source, sent)
    folder = data_dir() / "catalogues"
    path = folder / f"{source}.json.gz"
    if not path.is_file():
        shipped = sorted(file.name.removesuffix(".json.gz") for file in folder.glob("*.json.gz"))
        lack = "" if shipped else f" (none is in {folder}; FLOWLOOM_DATA names another data folder)"
        raise CatalogueError(
            f"catalogue: got {source!r}, expected {', '.join(['embedded', *shipped])}, "
            f"http://HOST:PORT, or a .json or .json.gz file{lack}"
        )
    return Catalogue.load(path)


def read_headers(headers: Sequence[str]) -> dict[str, str]:
    """Headers by name.

    Raises:
        ValueError: One is not NAME=VALUE. The message does not repeat it: it may be a secret.
    """
    found = [_HEADER.fullmatch(header) for header in headers]
    if None in found:
        raise ValueError(f"--header number {found.index(None) + 1}: expected NAME=VALUE")
    return {match[1]: match[2] for match in found if match is not None}


def show(parsed: Namespace) -> int:
    """Print a catalogue: classes, files, limits."""
    catalogue = open_catalogue(parsed.catalogue, parsed.header)
    if parsed.json:
        print_json({"hash": catalogue.hash, **catalogue.to_json()})
        return OK
    Lines().print((catalogue.name or parsed.catalogue, "bold"), f": {catalogue.hash}")
    limits = catalogue.limits
    print(f"limits: {limits.pixels} pixels, batch {limits.batch}, {limits.work:g} pixel steps")
    rows = [
        [
            class_type,
            ", ".join(i.name if i.required else f"[{i.name}]" for i in spec.inputs),
            ", ".join(spec.outputs),
            "" if catalogue.available(class_type) else "no file installed",
        ]
        for class_type, spec in catalogue.nodes.items()
    ]
    print_table(f"{len(rows)} node classes", ["class", "inputs", "outputs", ""], rows)
    files = [[f.folder, f.name, f.sha256[:12], f.family, f.role, f.card] for f in catalogue.files]
    columns = ["folder", "name", "sha256", "family", "role", "card"]
    print_table(f"{len(files)} model files", columns, files)
    return OK


def snapshot(parsed: Namespace) -> int:
    """Save a catalogue under the name of its file; the bytes depend on that and on its content."""
    if not parsed.out.endswith(_SUFFIXES):
        raise ValueError(
            f"--out: got {parsed.out!r}, expected a name ending with .json or .json.gz"
        )
    if parsed.install and parsed.files is None:
        raise ValueError("--install: got no --files FILE.json, expected the files to install")
    catalogue = open_catalogue(parsed.catalogue, parsed.header)
    if parsed.files is not None:
        facts = read_files(parsed.files)
        catalogue = catalogue.described(facts)
        if parsed.install:
            have = {(file.folder, file.name) for file in catalogue.files}
            catalogue = catalogue.with_files(f for f in facts if (f.folder, f.name) not in have)
    if parsed.profile is not None:
        from flowloom.cli.sample import classes_of  # It opens catalogues through this module.

        classes = classes_of(catalogue, None, parsed.profile) or catalogue.nodes
        nodes = {name: spec for name, spec in catalogue.nodes.items() if name in set(classes)}
        catalogue = dataclasses.replace(catalogue, nodes=nodes)
    name = Path(parsed.out).name.removesuffix(".gz").removesuffix(".json")
    catalogue = dataclasses.replace(catalogue, name=name)
    data = (json.dumps(catalogue.to_json(), indent=1) + "\n").encode()
    with written_whole(Path(parsed.out)) as file:
        file.write(gzip.compress(data, mtime=0) if parsed.out.endswith(".gz") else data)
    known = sum(bool(file.family) for file in catalogue.files)
    warn(
        f"{parsed.out}: {counted(len(catalogue.nodes), 'class')}, "
        f"{counted(len(catalogue.files), 'file')}, {known} of known family"
    )
    return OK


def read_files(path: str) -> list[ModelFile]:
    """Facts about model files: a JSON list of {folder, name, sha256, family, role, licence, card}.

    Raises:
        ValueError: The file is another thing; the message names the entry.
    """
    try:
        entries = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--files {path}: cannot read: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"--files {path}: got {type(entries).__name__}, expected a list of files")
    names = tuple(ModelFile.__dataclass_fields__)
    files = []
    for number, entry in enumerate(entries):
        if not (
            isinstance(entry, dict)
            and set(entry) <= set(names)
            and all(isinstance(value, str) for value in entry.values())
            and entry.get("folder")
            and entry.get("name")
        ):
            raise ValueError(
                f"--files {path}: entry {number}: got {str(entry)[:60]}, expected folder, name "
                f"and any of {', '.join(names[2:])}, all texts"
            )
        files.append(ModelFile(**{"sha256": "", "family": "", **entry}))
    return files


def diff(parsed: Namespace) -> int:
    """Compare two catalogues; status 0 where nothing differs, 1 where something does."""
    old = open_catalogue(parsed.old, parsed.header)
    new = open_catalogue(parsed.new, parsed.header)
    found = difference(old, new)
    if parsed.json:
        print_json(found.to_json())
    else:
        _print_difference(found)
    return OK if found.same else NO


def _print_difference(found: Difference) -> None:
    lines = Lines()
    for part, noun in ((found.nodes, "class"), (found.files, "file")):
        for name in part.added:
            lines.print((f"{noun} added: ", "green"), name)
        for name in part.removed:
            lines.print((f"{noun} removed: ", "red"), name)
        for name, changes in part.changed.items():
            lines.print((f"{noun} changed: ", "yellow"), (name, "bold"))
            for change in changes:
                lines.print(f"  {change}")
    for change in found.limits:
        lines.print(("limit changed: ", "yellow"), str(change))
    if found.same:
        print("no difference")
        return
    said = [
        f"{counted(len(names), noun)} {verb}"
        for part, noun in ((found.nodes, "class"), (found.files, "file"))
        for verb, names in (
            ("added", part.added),
            ("removed", part.removed),
            ("changed", part.changed),
        )
        if names
    ]
    said += [f"{counted(len(found.limits), 'limit')} changed"] if found.limits else []
    print(", ".join(said))
