"""What is not as it was when a run was made: code, data, catalogue, packages, its configuration.

Whoever reproduces a run is told this first: it is why the result may differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flowloom.lifecycle import remotes
from flowloom.lifecycle.objects import manifest_of, parse_manifest
from flowloom.lifecycle.packages import installed
from flowloom.lifecycle.record import Record
from flowloom.lifecycle.records import Records, asked
from flowloom.lifecycle.run_facts import MAX_TEXT, flatten
from flowloom.lifecycle.versioning import Difference
from flowloom.runs import code_digest, data_dir, data_md5, folder_entries

MAX_FILES = 5
"""Files of `data/` named one by one."""


def changes(records: Records, made: Sequence[Record]) -> list[str]:
    """What differs here from what runs were made with, one line each.

    Args:
        records: Where what they were recorded with is looked up.
        made: The runs.
    """
    lines = [*_code(made), *_data(made), *_catalogue(records, made), *_packages(made)]
    return list(dict.fromkeys(lines))


def config_changes(
    records: Records, record: Record, identity: Mapping[str, Any], used: Mapping[str, Any]
) -> list[str]:
    """What differs in a run's configuration, one line each.

    Args:
        records: Where the parameters it was recorded with are looked up.
        record: The run.
        identity: Its `config.json`.
        used: The configuration that it is run with now.
    """
    where = f"{record.stage}: config"
    lines = []
    if _key(identity) != record.key:
        lines.append(
            f"{where}.json: is not the one the run was made with: got key {_key(identity)}, "
            f"expected {record.key}"
        )
    recorded = flatten(identity["config"])
    for name, got, expected in different(recorded, _params(records, record)):
        lines.append(f"{where}: {name}: config.json has {got}, recorded was {expected}")
    for name, got, expected in different(flatten(used), recorded):
        lines.append(f"{where}: {name}: got {got}, the run had {expected}")
    return lines


def different(
    got: Mapping[str, str], expected: Mapping[str, str] | None
) -> list[tuple[str, str, str]]:
    """Fields that differ: name, value got, value expected; a missing one is `(none)`."""
    if expected is None:
        return []
    return [
        (name, got.get(name, "(none)"), expected.get(name, "(none)"))
        for name in sorted({*got, *expected})
        if not _same(got.get(name), expected.get(name))
    ]


def _same(got: str | None, expected: str | None) -> bool:
    """Whether two values are equal; 3 and 3.0 are."""
    if got is None or expected is None:
        return got is expected
    try:
        return got == expected or json.loads(got) == json.loads(expected)
    except ValueError:
        return False


def _code(made: Sequence[Record]) -> Iterator[str]:
    here = code_digest()
    for record in made:
        if record.code and record.code != here:
            advice = f"git checkout {record.commit}" if record.commit else "no commit is recorded"
            yield f"code: got {_short(here)}, expected {_short(record.code)}; {advice}"


def _data(made: Sequence[Record]) -> Iterator[str]:
    expected = {record.data for record in made if record.data}
    if not expected:
        return
    if not data_dir().is_dir():
        yield f"data: got nothing at {data_dir()}, expected {', '.join(sorted(expected))}"
        return
    entries = folder_entries(data_dir())
    got = manifest_of(entries)[0]
    for digest in sorted(expected - {got}):
        commits = sorted({r.commit for r in made if r.data == digest and r.commit})
        advice = (
            "`rm -r data && make data` brings it back"
            if digest == data_md5()
            else f"git checkout {commits[0]} -- data.dvc && make data"
            if commits
            else "no commit is recorded"
        )
        yield f"data: got {got}, expected {digest}; {advice}"
        files = _files({entry["relpath"]: entry["md5"] for entry in entries}, digest)
        yield from (f"data: {item}" for item in files[:MAX_FILES])
        if len(files) > MAX_FILES:
            yield f"data: {len(files) - MAX_FILES} more files differ"


def _files(got: Mapping[str, str], digest: str) -> list[Difference]:
    """Files of `data/` that differ, where a remote tells what they were."""
    name = remotes.default_name(data_dir().parent)
    for remote in dict.fromkeys(filter(None, (name, remotes.SEED, remotes.STORE))):
        try:
            manifest = remotes.find(remote).read(digest)
        except ValueError:
            continue  # another may tell
        if manifest is not None:
            expected = parse_manifest(manifest, digest)
            found = (Difference(n, expected.get(n), got.get(n)) for n in sorted({*expected, *got}))
            return [item for item in found if item.expected != item.got]
    return []


def _catalogue(records: Records, made: Sequence[Record]) -> Iterator[str]:
    from flowloom.workflow.catalogue import Catalogue

    here = None
    # Runs of a turn share its catalogue: one run of each stage is enough to ask about.
    for record in {record.stage: record for record in made}.values():
        expected = records.turn_param(record, "catalogue")
        if expected is None:
            continue
        here = here or Catalogue.load("embedded").hash
        if here != expected:
            yield f"catalogue: got hash {_short(here)}, expected {_short(expected)}"


def _packages(made: Sequence[Record]) -> Iterator[str]:
    for record in made:
        for name, expected in sorted(record.packages.items()):
            got = installed(name)
            if got != expected:
                yield f"package {name}: got {got}, expected {expected}"


def _key(identity: Mapping[str, Any]) -> str:
    """Name of the run folder that `runs.open_run` gives such a `config.json`."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _params(records: Records, record: Record) -> dict[str, str] | None:
    """The configuration as it was logged field by field; `None` where it was not."""
    if records.client is None or not record.run_ids:
        return None
    with asked():
        params = records.client.get_run(record.run_ids[0]).data.params
    # An empty mapping has no field to log; a long value is cut.
    if not params or any(len(value) >= MAX_TEXT for value in params.values()):
        return None
    return dict(params)


def _short(digest: str) -> str:
    return digest[:12]
