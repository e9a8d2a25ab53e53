"""Containers of the manifests as processes of this machine, by their own command lines.

What differs is where they are: the folder that stands for a mounted volume, the port, the address
and the values of secrets.
"""

import dataclasses
import os
import re
import sys
from pathlib import Path

import yaml

from tests.infra.pods import pods
from tests.infra.rendered import INFRA

_VARIABLE = re.compile(r"\$\$|\$\(([A-Za-z0-9_]+)\)")


@dataclasses.dataclass(frozen=True)
class Command:
    """What to start."""

    words: list[str]
    """Program and arguments."""
    environment: dict[str, str]
    """Its variables, and no others."""


def command(manifest, kind, name, container, secrets, mounts, replaced=()):
    """The command of a container of a Deployment or CronJob.

    Args:
        manifest: The file, below infra/.
        kind: Of the resource.
        name: Of the resource.
        container: Its name, of an init container too.
        secrets: Values by the name of the secret and key.
        mounts: The folder that stands for each mountPath.
        replaced: Pairs of an argument and what stands for it here.
    """
    spec = _container(manifest, kind, name, container)
    given = {}
    for source in spec.get("envFrom", ()):
        given |= secrets[source["secretRef"]["name"]]
    for item in spec.get("env", ()):
        key = item.get("valueFrom", {}).get("secretKeyRef")
        given[item["name"]] = secrets[key["name"]][key["key"]] if key else item["value"]
    words = [_expanded(word, given) for word in [*spec["command"], *spec.get("args", ())]]
    for old, new in replaced:
        assert old in words, f"{manifest}: {container} has no {old}"
        words[words.index(old)] = new
    for path in (mount["mountPath"] for mount in spec["volumeMounts"]):
        words = [re.sub(rf"(^|=){path}(?=/|$)", rf"\g<1>{mounts[path]}", word) for word in words]
    # What the image sets.
    here = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    here |= {"OMP_WAIT_POLICY": "passive", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return Command(words, {**here, "TMPDIR": str(mounts["/tmp"]), **given})


def _container(manifest, kind, name, container):
    found = pods(yaml.safe_load_all((INFRA / manifest).read_text()))
    pod = next(pod for pod in found if pod.where == f"{kind}/{name}")
    return next(item for _, item in pod.containers if item["name"] == container)


def _expanded(word, given):
    """As Kubernetes does: `$(NAME)` of a variable that is set, `$$` is a dollar."""
    return _VARIABLE.sub(lambda m: "$" if m[0] == "$$" else given.get(m[1], m[0]), word)
