"""What is known of a stage's run: from MLflow, and from the run folders of this home.

Both say the same; the tracker also knows the runs of other machines, and a home those that were
not recorded yet. An artifact is found by its digest, whoever made it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowloom.lifecycle import mlflow_tree, versioning
from flowloom.lifecycle.objects import manifest_of, parse_manifest
from flowloom.lifecycle.pointer import TAG, Pointer
from flowloom.lifecycle.record import Record, Subject, read_folder, read_tags
from flowloom.lifecycle.spool import tracking_uri
from flowloom.lifecycle.versions import CHAMPION_URI, NAME, exists, get_version, resolve
from flowloom.runs import folder_entries, home

if TYPE_CHECKING:
    from mlflow import MlflowClient

PINNED = "flowloom.pinned"
"""Tag of an MLflow run that is kept whatever becomes of it."""
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_PAGE = 1000


class Records:
    """All runs, found by digest, MLflow run id or folder."""

    def __init__(self, client: MlflowClient | None = None):
        """Use `client`, or one of the tracker in use."""
        self._given = client
        self._known: dict[str, tuple[Record, ...]] = {}

    @functools.cached_property
    def client(self) -> MlflowClient | None:
        """The tracker's client, or `None` where nothing was ever recorded."""
        if self._given is not None:
            return self._given
        return mlflow_tree.connect() if exists() else None

    def subject(self, text: str | None) -> Subject:
        """What `text` names.

        Args:
            text: `models:/flow-designer@ALIAS` or `/VERSION` (with or without `models:/`), an
                MLflow run id, or a run folder; `None` is the champion.

        Raises:
            ValueError: There is no such thing, or the tracker does not answer.
        """
        text = text or CHAMPION_URI
        name = text.removeprefix("models:/")
        if re.match(rf"{NAME}[@/]", name) or text.startswith("models:/"):
            return self._version(name)
        if (Path(text) / "config.json").is_file():
            record = read_folder(Path(text).absolute())
            merged = next((r for r in self.by_digest(record.digest) if r.key == record.key), record)
            return Subject(title=str(merged), digest=merged.digest, record=merged)
        if _RUN_ID.fullmatch(text):
            record = self.by_run_id(text)
            return Subject(title=f"{record.stage} ({text})", digest=record.digest, record=record)
        raise ValueError(
            f"run: got {text!r}, expected an MLflow run id, a run folder or models:/{NAME}@ALIAS"
        )

    def by_run_id(self, run_id: str) -> Record:
        """The run that an MLflow run records.

        Raises:
            ValueError: There is none, or it is of no stage.
        """
        if self.client is None:
            raise ValueError(f"run: got {run_id!r}, but nothing at {tracking_uri()}")
        with asked():
            run = self.client.get_run(run_id)
        if "flowloom.stage" not in run.data.tags:
            raise ValueError(f"MLflow run {run_id}: is of no stage, expected the run of one")
        return self._merged([read_tags(run_id, run.data.tags)])[0]

    def by_digest(self, digest: str | None) -> tuple[Record, ...]:
        """The runs that made an artifact, the one recorded first in front; empty if none did."""
        if digest is None:
            return ()
        if digest not in self._known:
            self._known[digest] = tuple(self._merged(self._recorded(digest), digest))
        return self._known[digest]

    def identity(self, record: Record) -> dict[str, Any]:
        """The run's `config.json`: stage, configuration, inputs, data and code.

        Raises:
            ValueError: It is neither in the home nor in MLflow.
        """
        if record.run_ids and self.client is not None:
            with asked(), tempfile.TemporaryDirectory() as folder:
                path = self.client.download_artifacts(record.run_ids[0], "config.json", folder)
                return json.loads(Path(path).read_text())
        if record.folder is None:
            raise ValueError(f"{record}: got no config.json, expected it in MLflow")
        return json.loads((record.folder / "config.json").read_text())

    def turn_param(self, record: Record, name: str) -> str | None:
        """A parameter of the turn that a run was recorded for first."""
        if self.client is None or not record.run_ids:
            return None
        with asked():
            parent = self.client.get_run(record.run_ids[0]).data.tags.get("mlflow.parentRunId")
            return self.client.get_run(parent).data.params.get(name) if parent else None

    def search(self, query: str) -> list[Any]:
        """The MLflow runs that a query finds, oldest first."""
        if self.client is None:
            return []
        with asked():
            found = self.client.get_experiment_by_name(mlflow_tree.EXPERIMENT)
            if found is None:
                return []
            runs, token = [], None
            while True:
                page = self.client.search_runs(
                    [found.experiment_id],
                    query,
                    max_results=_PAGE,
                    order_by=["attributes.start_time ASC"],
                    page_token=token,
                )
                runs += page
                token = page.token
                if not token:
                    return runs

    def _recorded(self, digest: str) -> list[Record]:
        kind = "tags.`flowloom.kind` = 'stage'"
        found = self.search(f"{kind} and tags.`flowloom.digest` = '{digest}'")
        # An engine's own run is joined as it is, and older runs have the pointer alone.
        found = found or self.search(f"tags.`flowloom.digest` = '{digest}'")
        found = found or self.search(f"tags.`{TAG}` LIKE '%{digest}%'")
        tags = [(run.info.run_id, run.data.tags) for run in found]
        return [read_tags(run_id, each) for run_id, each in tags if "flowloom.stage" in each]

    def _merged(self, recorded: list[Record], digest: str | None = None) -> list[Record]:
        """One record per run, of those of the tracker and those of this home."""
        merged: dict[tuple[str, str], Record] = {}
        for record in recorded:
            at = (record.stage, record.key)
            earlier = merged.get(at)
            ids = (*earlier.run_ids, *record.run_ids) if earlier else record.run_ids
            merged[at] = dataclasses.replace(earlier or record, run_ids=ids)
        for at, record in merged.items():
            folder = home() / "runs" / record.stage / record.key
            if (folder / "config.json").is_file():
                merged[at] = dataclasses.replace(record, folder=folder)
        for folder in self._local.get(digest or "", ()):
            at = (folder.parent.name, folder.name)
            if at not in merged:
                merged[at] = read_folder(folder)
        return list(merged.values())

    def _version(self, name: str) -> Subject:
        if self.client is None:
            raise ValueError(f"models:/{name}: no registry at {tracking_uri()}")
        with asked():
            found = get_version(self.client, resolve(self.client, f"models:/{name}"))
        alias = name.partition("@")[2]
        title = f"{NAME} version {found.version}" + (f" (@{alias})" if alias else "")
        makers = self.by_digest(found.digest)
        mine = [record for record in makers if found.run_id in record.run_ids]
        chosen = next(iter(mine or makers), None)
        return Subject(title=title, digest=found.digest, record=chosen, version=found.version)

    @functools.cached_property
    def _local(self) -> dict[str, list[Path]]:
        """Run folders of this home, by the digest of what they made."""
        found: dict[str, list[Path]] = {}
        for path in sorted(home().glob("runs/*/*/result.json")):
            digest = json.loads(path.read_text())["digest"]
            found.setdefault(digest, []).append(path.parent)
        return found


def entries_of(digest: str, record: Record | None = None) -> dict[str, str] | None:
    """Digest by relative path of a published folder, from wherever its manifest is.

    Args:
        digest: The folder's.
        record: The run that made it, if known: its folder, or the remote it was published to.

    Returns:
        `None` where no manifest of it can be had.
    """
    from flowloom.lifecycle import remotes

    if record and record.folder and (record.folder / "out").is_dir():
        entries = folder_entries(record.folder / "out")
        if manifest_of(entries)[0] == digest:
            return {entry["relpath"]: entry["md5"] for entry in entries}
    named = [record.pointer.remote] if record and record.pointer else []
    for name in dict.fromkeys([*named, remotes.STORE, remotes.SEED]):
        try:
            data = remotes.find(name).read(digest)
        except ValueError:
            continue  # the remotes that answer decide
        if data is not None:
            return parse_manifest(data, digest)
    return None


def bring(digest: str, makers: tuple[Record, ...], into: Path) -> Path:
    """Fetch an artifact by its digest from the remote it was published to.

    Raises:
        ValueError: No remote has it.
    """
    published = [record.pointer for record in makers if record.pointer]
    if published:
        return versioning.fetch(published[0], into)
    entries = entries_of(digest)
    if entries is None:
        raise ValueError(f"artifact {digest}: got no pointer to it, expected it published")
    return versioning.fetch(Pointer(digest, 0, len(entries)), into)


def first_difference(
    expected: Mapping[str, str] | None, folder: Path
) -> versioning.Difference | None:
    """The first file, by path, that is not as the manifest has it."""
    got = {entry["relpath"]: entry["md5"] for entry in folder_entries(folder)}
    if expected is None:
        return None
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            return versioning.Difference(name, expected.get(name), got.get(name))
    return None


@contextmanager
def asked() -> Iterator[None]:
    """Turn what MLflow throws into one line for a person."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"tracker {tracking_uri()}: {first}") from error
