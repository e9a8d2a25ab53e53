"""`doctor --cluster`: whether a cluster has what an overlay needs.

What that is stands in `prerequisites.yaml`. Nothing is changed, and of a secret only the names of
its keys are looked at.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from flowloom.cli import one_line
from flowloom.cli.doctor import Finding
from flowloom.launch.api import PODS, TRAIN_JOBS, ApiError, Kind

if TYPE_CHECKING:
    from flowloom.launch.api import Api

PREREQUISITES = "prerequisites.yaml"
PIPELINES = "kubeflow-pipelines"
ACCOUNTS = ("flowloom-steps", "flowloom-training", "flowloom-servers", "flowloom-submit")
RIGHTS = (
    (TRAIN_JOBS.group, TRAIN_JOBS.plural, ("create", "get", "delete")),
    (PODS.group, PODS.plural, ("get", "list", "watch")),
    (PODS.group, "pods/log", ("get",)),
)
"""What whoever runs training as a TrainJob must be allowed."""
SHARED = re.compile(
    r"nfs|efs|filestore|azurefile|file\.csi|cephfs|lustre|gluster|smb|juicefs", re.I
)
"""Provisioners whose volumes many nodes can usually write to: Kubernetes itself does not tell."""
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
NOT_FOUND, REFUSED = 404, (401, 403)

NODES = Kind(plural="nodes", version="v1", namespaced=False)
CLAIMS = Kind(plural="persistentvolumeclaims", version="v1")
SECRETS = Kind(plural="secrets", version="v1")
SERVICE_ACCOUNTS = Kind(plural="serviceaccounts", version="v1")
CONFIG_MAPS = Kind(plural="configmaps", version="v1")
DEPLOYMENTS = Kind(plural="deployments", version="v1", group="apps")
CLASSES = Kind(plural="storageclasses", version="v1", group="storage.k8s.io", namespaced=False)
RUNTIMES = Kind(
    plural="clustertrainingruntimes",
    version=TRAIN_JOBS.version,
    group=TRAIN_JOBS.group,
    namespaced=False,
)
REVIEWS = Kind(
    plural="selfsubjectaccessreviews",
    version="v1",
    group="authorization.k8s.io",
    namespaced=False,
)


def prerequisites() -> dict[str, Any]:
    """What the overlays are written for."""
    import yaml

    text = (resources.files("flowloom.cli") / PREREQUISITES).read_text(encoding="utf-8")
    return yaml.safe_load(text)


def look(overlay: str, context: str | None, namespace: str) -> list[Finding]:
    """Everything there is to say of a cluster that is to run an overlay.

    Args:
        overlay: Its name in `infra/overlays`.
        context: Of the kubeconfig file; None for the one in use, or for the cluster of this pod.
        namespace: Where flowloom is, or is to be.

    Raises:
        ValueError: There is no such overlay, or no cluster that answers.
    """
    from flowloom.launch.api import connect

    wanted = prerequisites()
    pools = wanted["gpu"]["pools"]
    if overlay not in pools:
        raise ValueError(f"--cluster: got {overlay!r}, expected one of {', '.join(pools)}")
    api = connect(context)
    api.namespace = namespace
    found = [_server(api.read("/version"), wanted["kubernetes"])]
    for facts in wanted["components"]:
        if overlay in facts["overlays"]:
            found += _component(api, facts)
    found += _asked("time zone", lambda: _time_zone(api, wanted))
    found += _asked("storage classes", lambda: _classes(api))
    for claim in wanted["storage"]:
        if overlay in claim["overlays"]:
            found += _asked(f"claim {claim['claim']}", lambda claim=claim: _claim(api, claim))
    found += _asked("GPU nodes", lambda: _nodes(api, wanted["gpu"], pools[overlay]))
    for secret in wanted["secrets"]:
        name = f"secret {secret['name']}"
        found += _asked(name, lambda secret=secret: _secret(api, secret), bool(secret["keys"]))
    for kind, names, advice in (
        (SERVICE_ACCOUNTS, ACCOUNTS, _apply(overlay)),
        (RUNTIMES, _runtimes(pools[overlay]), _apply(overlay)),
        (CONFIG_MAPS, ("kfp-launcher",), "Kubeflow Pipelines writes it in multi-user mode"),
    ):
        found += _asked(
            kind.plural,
            lambda kind=kind, names=names, advice=advice: _there(api, kind, names, advice),
        )
    return [*found, *_asked("rights", lambda: _rights(api))]


def _apply(overlay: str) -> str:
    return f"kubectl apply -k infra/overlays/{overlay}"


def _runtimes(pools: Iterable[str]) -> tuple[str, ...]:
    return ("flowloom-torch-cpu", "flowloom-torch-gpu") if pools else ("flowloom-torch-cpu",)


def _asked(
    name: str, ask: Callable[[], Finding | Iterable[Finding]], needed: bool = True
) -> list[Finding]:
    """What a question brought; not to be allowed to ask is an answer, too."""
    try:
        found = ask()
        return [found] if isinstance(found, Finding) else list(found)
    except ApiError as error:
        if error.status not in REFUSED:
            raise
        advice = "ask as somebody who may look, such as an administrator (--context)"
        return [Finding(name, False, f"not known: {one_line(error)}", advice, needed)]


def _server(answer: Mapping[str, Any], wanted: Mapping[str, Any]) -> Finding:
    """Minor version of the server, between those the overlays are written for."""
    said = str(answer.get("gitVersion", "no version"))
    low, high = _minor(wanted["min"]), _minor(wanted["max"])
    advice = f"the overlays are written for {wanted['min']} to {wanted['max']}"
    return Finding("kubernetes", low <= _minor(said) <= high, said, advice)


def _minor(version: str) -> tuple[int, ...]:
    """Major and minor number; empty where there are none."""
    found = re.match(r"v?(\d+)\.(\d+)", str(version))
    return tuple(map(int, found.groups())) if found else ()


def _component(api: Api, facts: Mapping[str, Any]) -> Iterator[Finding]:
    """Kinds and version of an upstream part."""
    advice = f"install {facts['name']} {facts['version']} (docs/deploy.md)"
    for kind in facts["kinds"]:
        name = f"{kind['kind']} {kind['group']}/{kind['version']}"
        for found in _asked(name, lambda kind=kind: _kind(api, **kind)):
            yield dataclasses.replace(found, name=name, fix=found.fix or advice)
    for found in _asked(facts["name"], lambda: _controller(api, facts)):
        yield dataclasses.replace(found, fix=found.fix or advice)


def _kind(api: Api, group: str, version: str, kind: str) -> Finding:
    """A kind in a version, by what the server says that it serves."""
    served = _read(api, f"/apis/{group}/{version}")
    if served is not None:
        there = any(resource["kind"] == kind for resource in served.get("resources", ()))
        return Finding(kind, there, "served" if there else "not among the group's kinds")
    others = (_read(api, f"/apis/{group}") or {}).get("versions", ())
    versions = ", ".join(item["version"] for item in others)
    return Finding(kind, False, f"served as {versions} alone" if versions else "no such group")


def _read(api: Api, path: str) -> dict[str, Any] | None:
    try:
        return api.read(path)
    except ApiError as error:
        if error.status == NOT_FOUND:
            return None
        raise


def _controller(api: Api, facts: Mapping[str, Any]) -> Finding:
    """Version of a part, as far as its deployment tells: the tag of its image, else its label."""
    name, place = facts["name"], f"{facts['namespace']}/{facts['deployment']}"
    found = api.get(DEPLOYMENTS, facts["deployment"], facts["namespace"])
    if found is None:
        return Finding(name, False, f"no deployment {place}")
    image = found["spec"]["template"]["spec"]["containers"][0]["image"]
    tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
    label = found["metadata"].get("labels", {}).get("app.kubernetes.io/version", "")
    said = next(filter(_minor, (tag, label)), "")
    if not said:
        return Finding(name, True, f"deployment {place} does not say which version")
    right = _minor(said) == _minor(facts["version"])
    return Finding(name, right, said, f"the overlays are written for {facts['version']}")


def _time_zone(api: Api, wanted: Mapping[str, Any]) -> Finding:
    """Time zone in which Kubeflow Pipelines reads cron."""
    namespace = next(c["namespace"] for c in wanted["components"] if c["name"] == PIPELINES)
    settings = api.get(CONFIG_MAPS, "pipeline-install-config", namespace)
    if settings is None:
        advice = "Kubeflow Pipelines as it is published has one"
        return Finding(
            "time zone", False, f"no config map {namespace}/pipeline-install-config", advice
        )
    zone = settings.get("data", {}).get("cronScheduleTimezone", "UTC")
    advice = f"schedules are written for {wanted['time_zone']}: set cronScheduleTimezone"
    return Finding("time zone", zone == wanted["time_zone"], zone, advice)


def _classes(api: Api) -> Finding:
    """Storage classes; claims name none, so that there must be a default."""
    said, default = [], False
    for item in api.list(CLASSES)["items"]:
        metadata, provisioner = item["metadata"], item["provisioner"]
        is_default = metadata.get("annotations", {}).get(DEFAULT_CLASS) == "true"
        default = default or is_default
        marks = ["default"] * is_default + ["by its name shared"] * bool(SHARED.search(provisioner))
        said.append(f"{metadata['name']} ({', '.join([provisioner, *marks])})")
    advice = f"mark one as the default: annotation {DEFAULT_CLASS}"
    return Finding("storage classes", default, "; ".join(said) or "none", advice)


def _claim(api: Api, wanted: Mapping[str, Any]) -> Finding:
    name, mode = f"claim {wanted['claim']}", wanted["access_mode"]
    found = api.get(CLAIMS, wanted["claim"])
    if found is None:
        return Finding(
            name, False, f"not in namespace {api.namespace}", "kubectl apply -k makes it"
        )
    phase = found.get("status", {}).get("phase", "Unknown")
    modes = found["spec"].get("accessModes", [])
    ready, detail = phase == "Bound", f"{phase}, {', '.join(modes)}"
    if phase == "Pending" and _binds_late(api, found["spec"].get("storageClassName", "")):
        ready, detail = True, f"{detail}, until its first pod"
    return Finding(name, ready and mode in modes, detail, f"its storage class must offer {mode}")


def _binds_late(api: Api, storage_class: str) -> bool:
    """Whether claims of a class wait for a pod, as they do where volumes belong to a node."""
    found = api.get(CLASSES, storage_class) if storage_class else None
    return (found or {}).get("volumeBindingMode") == "WaitForFirstConsumer"


def _nodes(api: Api, wanted: Mapping[str, Any], pools: Iterable[str]) -> Iterator[Finding]:
    """GPUs by pool. A pool may be without nodes as long as nobody asks for one."""
    nodes, resource = api.list(NODES)["items"], wanted["resource"]
    if not pools:
        yield Finding("GPU nodes", True, f"none asked for, {len(nodes)} nodes")
    for pool in pools:
        name, there = f"pool {pool}", [n for n in nodes if _label(n, wanted["label"]) == pool]
        if not there:
            detail = f"no node with {wanted['label']}={pool}"
            advice = "label a pool so, unless nodes are made when a pod asks for one"
            yield Finding(name, False, detail, advice, needed=False)
            continue
        gpus = [int(node["status"].get("allocatable", {}).get(resource, 0)) for node in there]
        detail = f"{len(there)} nodes, {sum(gpus)} {resource}"
        yield Finding(name, min(gpus) > 0, detail, f"the device plugin of {resource} is missing")
        bare = [n["metadata"]["name"] for n in there if not _tainted(n, wanted["taint"])]
        detail = f"not on {', '.join(bare)}" if bare else "on all nodes"
        advice = "without it other pods take the place of those that need a GPU"
        yield Finding(f"taint of {name}", not bare, detail, advice, needed=False)


def _label(node: Mapping[str, Any], label: str) -> str | None:
    return node["metadata"].get("labels", {}).get(label)


def _tainted(node: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    taints = node["spec"].get("taints", ())
    return any(all(taint.get(key) == value for key, value in wanted.items()) for taint in taints)


def _secret(api: Api, wanted: Mapping[str, Any]) -> Finding:
    """A secret by its name and keys."""
    name, keys = f"secret {wanted['name']}", wanted["keys"]
    found = api.get(SECRETS, wanted["name"])
    advice = "docs/deploy.md says how to make it"
    if found is None:
        return Finding(name, False, f"not in namespace {api.namespace}", advice, bool(keys))
    there = sorted(found.get("data") or {})
    missing = [key for key in keys if key not in there]
    detail = f"keys {', '.join(there) or 'none'}"
    return Finding(
        name, not missing, detail + (f"; missing: {', '.join(missing)}" if missing else ""), advice
    )


def _there(api: Api, kind: Kind, names: Iterable[str], advice: str) -> Iterator[Finding]:
    for name in names:
        found = api.get(kind, name) is not None
        yield Finding(f"{kind.plural} {name}", found, "there" if found else "not there", advice)


def _rights(api: Api) -> Iterator[Finding]:
    """What this identity may do in the namespace, as the server itself says."""
    for group, resource, verbs in RIGHTS:
        refused = [verb for verb in verbs if not _may(api, group, resource, verb)]
        detail = ", ".join(verb for verb in verbs if verb not in refused) or "nothing"
        detail += f"; may not {', '.join(refused)}" if refused else ""
        advice = "service account flowloom-steps may; this identity needs it to start TrainJobs"
        yield Finding(f"rights to {resource}", not refused, detail, advice, needed=False)


def _may(api: Api, group: str, resource: str, verb: str) -> bool:
    plural, _, sub = resource.partition("/")
    asked = {"namespace": api.namespace, "group": group, "resource": plural, "verb": verb}
    body = {
        "apiVersion": f"{REVIEWS.group}/{REVIEWS.version}",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {**asked, **({"subresource": sub} if sub else {})}},
    }
    return bool(api.create(REVIEWS, body).get("status", {}).get("allowed"))
