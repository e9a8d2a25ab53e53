"""The journal of decisions: promotions, refusals and rollbacks in one order for all machines.

MLflow's aliases have no compare-and-swap, but its database numbers the versions of a registered
model one after another. So every decision is a version of the registered model
`flow-designer-decisions`, its tags all there is to say about it, and who is champion follows from
reading them in order: a promotion holds if the champion before it is the one it expected. Of any
number of machines that expect the same champion, so, exactly one is promoted, and all agree which.

The alias `champion` follows the journal. A process that dies between the two leaves an entry that
is not yet applied: whoever comes next applies it. An alias that differs though the last change was
applied was moved by a person: that is right, and becomes an entry too. What is not guaranteed: for
the moment between its two writes a promotion is in the journal and not yet in the alias, and two
machines that change the champion within that moment may have the earlier one's write taken for a
person's. Under one home a file lock excludes that as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flowloom.lifecycle.gate import champion_unchanged
from flowloom.lifecycle.versions import CHAMPION, MAX_TEXT, NAME, aliases, ensure_model

if TYPE_CHECKING:
    from mlflow import MlflowClient

JOURNAL = "flow-designer-decisions"
PROMOTE, REFUSE, ROLLBACK, MOVED = "promote", "refuse", "rollback", "moved"
MAX_TRIES = 8
"""Attempts to write while other machines write too."""
_ABOUT = f"Journal of {NAME}: each version is a decision. Written by flowloom, not to be edited."
_PREFIX = "flowloom."
_APPLIED = "flowloom.applied"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One decision, as it turned out."""

    number: int
    """Its place in the journal, from 1."""
    event: str
    """`promote`, `refuse`, `rollback`, or `moved` (the alias, by a person)."""
    version: str | None
    """The version that it is about; `None` where the alias was taken away."""
    expected: str | None
    """The champion that whoever decided knew of."""
    reason: str
    """Why, in one line."""
    checks: tuple[dict[str, Any], ...]
    """Every check of the gate with its number, bound and verdict."""
    at_ms: int
    """When, in milliseconds since the epoch, by the registry's clock."""
    applied: bool
    """Whether the alias was seen to follow."""
    previous: str | None = None
    """The champion before it."""
    holds: bool = False
    """Whether it changed the champion."""

    def to_dict(self) -> dict[str, Any]:
        """The entry as `flowloom promote --history --json` prints it."""
        names = ("event", "version", "previous", "reason", "at_ms")
        return {**{name: getattr(self, name) for name in names}, "checks": list(self.checks)}


@dataclasses.dataclass(frozen=True)
class Journal:
    """All decisions, oldest first."""

    entries: tuple[Entry, ...]
    """The decisions."""
    champions: tuple[str, ...]
    """Champions in the order they came, without those rolled back; the last is the champion."""

    @property
    def champion(self) -> str | None:
        """Who should have the alias."""
        return self.champions[-1] if self.champions else None

    @property
    def last_change(self) -> Entry | None:
        """The latest entry that changed the champion."""
        return next((entry for entry in reversed(self.entries) if entry.holds), None)

    def entry(self, number: int) -> Entry:
        """The entry of that number."""
        return next(entry for entry in self.entries if entry.number == number)


def fold(entries: Iterable[Entry]) -> Journal:
    """Read decisions in their order: each as it turned out, and the champions they leave."""
    champions: list[str] = []
    read: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: entry.number):
        now = champions[-1] if champions else None
        asked, version = entry.expected == now, entry.version
        holds = False
        if entry.event == PROMOTE and not asked:
            entry = _lost(entry, now)
        elif entry.event == PROMOTE and version:
            champions.append(version)
            holds = True
        elif entry.event == ROLLBACK and asked and version in champions[:-1]:
            champions = _cut(champions, version)
            holds = True
        elif entry.event == MOVED and version != now:
            known = _cut(champions, version) if version in champions[:-1] else []
            champions = known or ([*champions, version] if version else [])
            holds = True
        read.append(dataclasses.replace(entry, previous=now, holds=holds))
    return Journal(tuple(read), tuple(champions))


def read(client: MlflowClient) -> Journal:
    """The journal as it is now; empty where nothing was decided yet."""
    found, token = [], None
    while True:
        page = client.search_model_versions(
            f"name = '{JOURNAL}'", max_results=1000, page_token=token
        )
        found += page
        token = page.token
        if not token:
            return fold(_entry(int(row.version), row.tags, row.creation_timestamp) for row in found)


def append(
    client: MlflowClient,
    event: str,
    version: str | None,
    expected: str | None,
    reason: str,
    checks: Sequence[dict[str, Any]] = (),
) -> int:
    """Write a decision; how it turned out is for the journal to say, read again.

    Returns:
        Its number.

    Raises:
        MlflowException: If the registry does not take it.
    """
    from mlflow.exceptions import MlflowException

    ensure_model(client, JOURNAL, _ABOUT)
    tags = {
        "event": event,
        "version": version or "",
        "expected": expected or "",
        "reason": reason[:MAX_TEXT],
        "checks": json.dumps(list(checks)),
    }
    tags = {_PREFIX + name: value for name, value in tags.items()}
    if event == MOVED:
        tags[_APPLIED] = "true"
    # A version must point to files: to those of the version it is about.
    about = client.get_model_version(NAME, version or str(expected))
    for attempt in range(1, MAX_TRIES + 1):
        try:
            made = client.create_model_version(JOURNAL, str(about.source), about.run_id, tags=tags)
            return int(made.version)
        except MlflowException:
            # Another machine took the number, or its transaction holds the table.
            if attempt == MAX_TRIES:
                raise
            time.sleep(random.uniform(0.05, 0.2) * attempt)
    raise AssertionError


def settle(client: MlflowClient) -> Journal:
    """Bring journal and alias together, as above.

    Returns:
        The journal that the alias agrees with.

    Raises:
        ValueError: If the alias goes on changing.
    """
    wrote = False
    for _ in range(MAX_TRIES):
        journal, alias = read(client), aliases(client).get(CHAMPION)
        last = journal.last_change
        if alias == journal.champion:
            if last is not None and not last.applied:
                with _together():
                    client.set_model_version_tag(JOURNAL, str(last.number), _APPLIED, "true")
            return journal
        if wrote or (last is not None and not last.applied):
            with _together():
                if journal.champion is None:
                    client.delete_registered_model_alias(NAME, CHAMPION)
                else:
                    client.set_registered_model_alias(NAME, CHAMPION, journal.champion)
            wrote = True
        else:
            append(client, MOVED, alias, journal.champion, "the alias was moved by hand")
    raise ValueError(f"registry: {NAME}@{CHAMPION} changed {MAX_TRIES} times, expected it to rest")


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """A write that every machine makes alike: the database refuses it to those that come second.

    Whether it was made is for the next reading to say; so a tracker that is gone is noticed there.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException:
        time.sleep(random.uniform(0.05, 0.2))


def _entry(number: int, tags: dict[str, str], at_ms: int) -> Entry:
    said = {name.removeprefix(_PREFIX): value for name, value in tags.items()}
    return Entry(
        number=number,
        event=said["event"],
        version=said["version"] or None,
        expected=said["expected"] or None,
        reason=said["reason"],
        checks=tuple(json.loads(said["checks"])),
        at_ms=at_ms,
        applied=_APPLIED in tags,
    )


def _lost(entry: Entry, now: str | None) -> Entry:
    """A promotion that came second: a refusal, with the check that failed."""
    if entry.version == now:  # written twice, after an answer that was lost
        return dataclasses.replace(entry, event=REFUSE, reason="it is the champion already")
    changed = champion_unchanged(now, entry.expected)
    others = [check for check in entry.checks if check["name"] != changed.name]
    checks = (*others, dataclasses.asdict(changed))
    return dataclasses.replace(entry, event=REFUSE, reason=str(changed), checks=checks)


def _cut(champions: list[str], version: str | None) -> list[str]:
    """The champions up to the latest earlier time that `version` was one."""
    last = max(i for i, known in enumerate(champions[:-1]) if known == version)
    return champions[: last + 1]
