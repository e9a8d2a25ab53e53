"""Dumps of MLflow's database, kept where its artifacts are: below `FLOWLOOM_STORE`, in S3.

`python -m flowloom.lifecycle.backups keep FILE` keeps a dump under a name of its own; `fetch FILE`
gets the latest, or the one that `FLOWLOOM_BACKUP` names. The bucket decides when one is deleted.
"""

from __future__ import annotations

import datetime
import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_FOLDER = "backup"
_NAME = "mlflow-%Y%m%dT%H%M%SZ.dump"
"""Of the time it was made, in UTC."""
_DUMP = re.compile(r"mlflow-\d{8}T\d{6}Z\.dump")


def keep(path: Path, now: datetime.datetime) -> str:
    """Keep the dump at `path`.

    Returns:
        Its name.

    Raises:
        ValueError: If it is empty, or the store is not in S3.
    """
    if not path.stat().st_size:
        raise ValueError(f"{path}: got an empty file, expected a dump")
    client, bucket, prefix = _store()
    name = now.astimezone(datetime.UTC).strftime(_NAME)
    client.upload_file(str(path), bucket, prefix + name)
    return name


def fetch(path: Path, name: str | None = None) -> str:
    """Get a dump, by default the latest.

    Returns:
        Its name.

    Raises:
        ValueError: If there is no such dump, or the store is not in S3.
    """
    client, bucket, prefix = _store()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
    found = (key.removeprefix(prefix) for key in keys)
    # In the order of their times; what else may lie there is no dump of ours.
    names = sorted(one for one in found if _DUMP.fullmatch(one))
    if not names or name not in (None, *names):
        held = ", ".join(names[-3:]) or "none"
        raise ValueError(f"s3://{bucket}/{prefix}: got {name or 'latest'}, expected one of: {held}")
    chosen = name or names[-1]
    client.download_file(bucket, prefix + chosen, str(path))
    return chosen


def _store() -> tuple[Any, str, str]:
    """A client, the bucket, and what the names of dumps begin with."""
    import boto3

    where = os.environ.get("FLOWLOOM_STORE", "")
    url = urlsplit(where)
    if url.scheme != "s3" or not url.netloc:
        raise ValueError(f"FLOWLOOM_STORE: got {where!r}, expected s3://BUCKET/PREFIX")
    return boto3.client("s3"), url.netloc, f"{url.path.strip('/')}/{_FOLDER}/".lstrip("/")


def main(arguments: list[str]) -> None:
    """Carry out the command line; what goes wrong ends it with one line."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        match arguments:
            case ["keep", file]:
                print(keep(Path(file), datetime.datetime.now(datetime.UTC)))
            case ["fetch", file]:
                print(fetch(Path(file), os.environ.get("FLOWLOOM_BACKUP") or None))
            case _:
                sys.exit("usage: python -m flowloom.lifecycle.backups keep|fetch FILE")
    except (ValueError, OSError, Boto3Error, BotoCoreError, ClientError) as error:
        sys.exit(f"backups: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main(sys.argv[1:])
