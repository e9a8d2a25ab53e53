"""`artifact`: publish a folder to a DVC remote, fetch one by its pointer, and verify one."""

from __future__ import annotations

import dataclasses
import json
import os
from argparse import Namespace
from pathlib import Path

from flowloom.cli import NO, OK
from flowloom.cli.output import Lines, counted, print_json, written_whole


def publish(parsed: Namespace) -> int:
    """Publish a folder; prints its pointer."""
    from flowloom.lifecycle import versioning
    from flowloom.lifecycle.pointer import dvc_file

    out = None if parsed.out is None else Path(parsed.out)
    if out is not None and out.suffix not in (".dvc", ".json"):
        raise ValueError(f"--out: got {parsed.out!r}, expected FILE.dvc or FILE.json")
    pointer = versioning.publish(Path(parsed.folder), parsed.remote)
    text = json.dumps(dataclasses.asdict(pointer))
    if out is not None:
        written = dvc_file(pointer, out.stem) if out.suffix == ".dvc" else text + "\n"
        with written_whole(out) as file:
            file.write(written.encode())
    print(text)
    return OK


def fetch(parsed: Namespace) -> int:
    """Fetch a published folder."""
    from flowloom.lifecycle import versioning
    from flowloom.lifecycle.pointer import read_pointer

    pointer = read_pointer(parsed.pointer, parsed.remote)
    into = versioning.fetch(pointer, Path(parsed.into), _near(parsed.pointer))
    if parsed.json:
        print_json({"path": str(into), **dataclasses.asdict(pointer)})
    else:
        Lines().print(f"{into}: {counted(pointer.nfiles, 'file')}, {pointer.size} bytes")
    return OK


def verify(parsed: Namespace) -> int:
    """Compare a folder, or what the remote holds, with a pointer; status 1 where they differ."""
    from flowloom.lifecycle import versioning
    from flowloom.lifecycle.pointer import read_pointer

    pointer, near = read_pointer(parsed.pointer, parsed.remote), _near(parsed.pointer)
    if parsed.folder is None:
        where = f"remote {pointer.remote}"
        found = versioning.verify_remote(pointer, near)
    else:
        where = os.path.normpath(parsed.folder)
        found = versioning.verify(Path(parsed.folder), pointer, near)
    if parsed.json:
        print_json({"differences": [dataclasses.asdict(item) for item in found]})
    else:
        lines = Lines()
        for item in found:
            lines.print((where, "bold"), f": {item}")
        if not found:
            lines.print((where, "bold"), f": {counted(pointer.nfiles, 'file')} as in {pointer.md5}")
    return NO if found else OK


def _near(pointer: str) -> Path | None:
    """The file that a pointer is read from: `.dvc/config` of its checkout names remotes."""
    return None if pointer.lstrip().startswith("{") else Path(pointer).absolute().parent
