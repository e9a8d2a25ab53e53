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

ROOT = Path(__file__).parents[2]
_VARIABLE = re.compile(r"\$\$|\$\(([A-Za-z0-9_]+)\)")


@dataclasses.dataclass(frozen=True)
class Command:
    """What to start."""

    words: list[str]
    environment: dict[str, str]


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
    documents = yaml.safe_load_all((ROOT / "infra" / manifest).read_text())
    found = next(d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name))
    spec = found["spec"]["jobTemplate"]["spec"] if kind == "CronJob" else found["spec"]
    pod = spec["template"]["spec"]
    both = [*pod.get("initContainers", ()), *pod["containers"]]
    return next(item for item in both if item["name"] == container)


def _expanded(word, given):
    """As Kubernetes does: `$(NAME)` of a variable that is set, `$$` is a dollar."""
    return _VARIABLE.sub(lambda m: "$" if m[0] == "$$" else given.get(m[1], m[0]), word)
