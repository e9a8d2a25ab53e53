"""`catalogue show`, `catalogue snapshot` and `catalogue diff`."""

from __future__ import annotations

import gzip
import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowloom.cli import NO, OK
from flowloom.cli.output import print_json, print_table, warn
from flowloom.workflow import Catalogue


def show(parsed: Namespace) -> int:
    """Print a catalogue: classes, files, limits."""
    catalogue = Catalogue.load(parsed.catalogue)
    if parsed.json:
        print_json({"hash": catalogue.hash, **catalogue.to_json()})
        return OK
    print(f"{catalogue.name or parsed.catalogue}: {catalogue.hash}")
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
    """Save a catalogue; the bytes depend on its content only."""
    catalogue = Catalogue.load(parsed.catalogue)
    out = Path(parsed.out)
    if not out.name.endswith((".json", ".json.gz")):
        raise ValueError(
            f"--out: got {parsed.out!r}, expected a name ending with .json or .json.gz"
        )
    data = (json.dumps(catalogue.to_json(), indent=1) + "\n").encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(gzip.compress(data, mtime=0) if out.name.endswith(".gz") else data)
    warn(f"{out}: {len(catalogue.nodes)} node classes, {len(catalogue.files)} files")
    return OK


def diff(parsed: Namespace) -> int:
    """Compare two catalogues; status 0 where nothing differs, 1 where something does."""
    old, new = Catalogue.load(parsed.old), Catalogue.load(parsed.new)
    old_files = {f"{f.folder}/{f.name}": f for f in old.files}
    new_files = {f"{f.folder}/{f.name}": f for f in new.files}
    result: dict[str, Any] = {
        "old": old.hash,
        "new": new.hash,
        "nodes": _changes(old.nodes, new.nodes),
        "files": _changes(old_files, new_files),
        "limits": {"changed": old.limits != new.limits},
    }
    same = old.hash == new.hash
    if parsed.json:
        print_json(result)
        return OK if same else NO
    for part in ("nodes", "files"):
        for change, names in result[part].items():
            for name in names:
                print(f"{part[:-1]} {change}: {name}")
    if result["limits"]["changed"]:
        print(f"limits changed: {old.limits} -> {new.limits}")
    if same:
        print("no difference")
    return OK if same else NO


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[str]]:
    return {
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
        "changed": sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
    }
