"""Overlays of `infra/` as `kubectl kustomize` renders them, each once per process.

A test that calls `documents` is skipped where kubectl is missing or too old. No package index has a
kubectl: Debian 12 has 1.20, PyPI's `kustomize` is another program. The page that `GET` names says
how to install one; nothing else of a cluster is needed.
"""

import copy
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
OVERLAYS = ("kind", "dev", "prod")
MIN_KUBECTL = (1, 31)
GET = "https://kubernetes.io/docs/tasks/tools/"
TIMEOUT_S = 60

Document = dict[str, Any]


def reason() -> str | None:
    """Why overlays cannot be rendered here; None if they can."""
    wanted = ".".join(map(str, MIN_KUBECTL))
    if not (kubectl := shutil.which("kubectl")):
        return f"kubectl: not on PATH; expected {wanted} or later, see {GET}"
    asked = [kubectl, "version", "--client", "--output=json"]
    ran = subprocess.run(asked, capture_output=True, text=True, timeout=TIMEOUT_S)
    try:
        version = json.loads(ran.stdout)["clientVersion"]["gitVersion"]
        numbers = re.match(r"v(\d+)\.(\d+)", version)
        got = (int(numbers[1]), int(numbers[2]))
    except (ValueError, KeyError, TypeError):
        return f"{kubectl}: got no version from it; expected {wanted} or later, see {GET}"
    if got < MIN_KUBECTL:
        return f"{kubectl}: got {version}, expected {wanted} or later, see {GET}"
    return None


@functools.cache
def text(overlay: str) -> str:
    """What `kubectl apply -k` sends for this overlay."""
    if why := reason():
        pytest.skip(why)
    folder = INFRA / "overlays" / overlay
    asked = ["kubectl", "kustomize", str(folder)]
    ran = subprocess.run(asked, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ran.returncode == 0, f"{folder.relative_to(ROOT)}: {ran.stderr.strip()}"
    # What is deprecated is said on stderr, and rendered.
    assert not ran.stderr, f"{folder.relative_to(ROOT)}: {ran.stderr.strip()}"
    return ran.stdout


@functools.cache
def _parsed(overlay: str) -> list[Document]:
    return list(yaml.load_all(text(overlay), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def documents(overlay: str) -> list[Document]:
    """The overlay's documents, the caller's to change."""
    return copy.deepcopy(_parsed(overlay))


def prerequisites() -> Document:
    """What `infra/prerequisites.yaml` declares."""
    return yaml.safe_load((INFRA / "prerequisites.yaml").read_text())


def of_kind(documents: Iterable[Document], *kinds: str) -> list[Document]:
    """Documents of these kinds."""
    return [document for document in documents if document["kind"] in kinds]


def title(document: Document) -> str:
    """`Kind/name`, as findings and tables of tests call a document."""
    return f"{document.get('kind')}/{document.get('metadata', {}).get('name')}"


def put(documents: list[Document], target: str, path: str, value: Any) -> None:
    """Replace what is at a dotted path of the document called `target`; None removes it.

    A path that begins with `-` appends to the list there; `~` stands for a slash in a key.
    """
    (document,) = (d for d in documents if title(d) == target)
    *parents, last = (key.replace("~", "/") for key in path.removeprefix("-").split("/"))
    place: Any = document
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
    last = int(last) if isinstance(place, list) else last
    if path.startswith("-"):
        place.setdefault(last, []).append(value)
    elif value is None:
        del place[last]
    else:
        place[last] = value
