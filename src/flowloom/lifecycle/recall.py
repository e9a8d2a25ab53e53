"""What the version registered last left, for a turn to go on from.

Data is not judged: renders say the same whether the gate let their version through or not. So a
turn goes on from the candidate, and from the champion if the candidate's triplets are of another
world: other prompts, another rubric or other data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowloom.dataset.card import row_config
from flowloom.dataset.config import BuildTripletsConfig
from flowloom.lifecycle import records as stored
from flowloom.lifecycle.record import Record
from flowloom.lifecycle.records import Records
from flowloom.lifecycle.versions import CANDIDATE, CHAMPION, NAME, aliases
from flowloom.runs import data_md5, folder_digest, home

PARTS = ("catalogue", "triplets", "adapter")
"""What is recalled; the adapter for the designs that it proposes and nobody rendered yet."""
AUTO = "auto"
_SAME = ("prompts", "rubric")
"""Fields of `build_triplets` that rows must share to be of one dataset."""


def find(config: BuildTripletsConfig, version: str = AUTO) -> dict[str, str]:
    """The version that a turn goes on from.

    Args:
        config: How the turn builds triplets.
        version: A version's number; empty for none; `auto` for the candidate there is now, or the
            champion if that one does not fit.

    Returns:
        Its number as `version`, and the digest of each of `PARTS`; empty if there is none.

    Raises:
        ValueError: The named version does not exist or does not fit, or the tracker fails.
    """
    records = Records()
    if not version or (records.client is None and version == AUTO):
        return {}
    if version != AUTO:
        made = records.subject(f"{NAME}/{version}").record
        problem = _problem(records, made, config)
        if problem:
            raise ValueError(f"previous: got version {version}: {problem}")
        return _digests(version, made)
    assert records.client is not None
    with stored.asked():
        named = aliases(records.client)
    for number in dict.fromkeys(named[alias] for alias in (CANDIDATE, CHAMPION) if alias in named):
        made = records.subject(f"{NAME}/{number}").record
        problem = _problem(records, made, config)
        if not problem:
            return _digests(number, made)
        print(f"nothing is recalled from version {number}: {problem}", file=sys.stderr)
    return {}


def bring(digest: str) -> Path:
    """The folder of an artifact: of the run that made it here, else fetched from its remote.

    Raises:
        ValueError: It is nowhere to be had, or was changed since it was fetched.
    """
    for result in sorted(home().glob("runs/*/*/result.json")):
        out = result.parent / "out"
        if out.is_dir() and json.loads(result.read_text())["digest"] == digest:
            return out
    folder = home() / "recalled" / digest.removesuffix(".dir")
    if not folder.is_dir():
        stored.bring(digest, Records().by_digest(digest), folder)
    found = folder_digest(folder)
    if found != digest:
        raise ValueError(f"{folder}: got files of digest {found}, expected {digest}; remove it")
    return folder


def _digests(version: str, made: Record | None) -> dict[str, str]:
    assert made is not None
    return {"version": version, **{name: made.artifacts[name][0] for name in PARTS}}


def _problem(records: Records, made: Record | None, config: BuildTripletsConfig) -> str | None:
    """Why a turn cannot go on from what a version was made of, in words; None if it can."""
    if made is None:
        return "no recorded run made it"
    makers = {name: records.by_digest(made.artifacts[name][0])[:1] for name in PARTS}
    missing = [name for name, found in makers.items() if not found]
    if missing:
        return f"no recorded run made its {', '.join(missing)}"
    (triplets,), (adapter,) = makers["triplets"], makers["adapter"]
    if triplets.data != data_md5():
        return f"data: got {triplets.data}, expected {data_md5()}"
    before, now = _rows(records.identity(triplets)["config"]), row_config(config)
    other = [name for name in _SAME if before.get(name) != now[name]]
    if other:
        return f"its triplets have another {', '.join(other)}"
    if records.identity(adapter)["config"].get("num_proposals") is None:
        return "its policy proposed no designs"
    return None


def _rows(config: Mapping[str, Any]) -> dict[str, Any]:
    """`row_config` of a configuration as a run recorded it."""
    prompts = {key: value for key, value in config["prompts"].items() if key != "prompts_file"}
    return {**config, "prompts": prompts}
