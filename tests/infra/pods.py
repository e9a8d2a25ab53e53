"""Rules for pods, each a function of an overlay's documents that returns findings.

A finding is one line, `Kind/name path: got, expected`. A pod is whatever template a document holds.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tests.infra.rendered import Document, of_kind, title

TEMPLATES = {
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}
SERVERS = ("Deployment", "StatefulSet", "DaemonSet")
"""Kinds whose pods run until they are told to stop."""
HOST = ("hostNetwork", "hostPID", "hostIPC")
UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
UNITS |= {f"{letter}i": 1024**power for power, letter in enumerate("KMGT", start=1)}


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod template in a document."""

    where: str
    """The document and, where it holds several, which of its pods."""
    kind: str
    """Kind of the document."""
    namespace: str
    """Where its pods run; empty for a runtime, whose pods run where its jobs are."""
    labels: dict[str, str]
    """Of each of its pods."""
    spec: dict[str, Any]
    """As in a manifest of kind Pod."""
    replicas: int = 1
    """How many there are at once."""
    claimed: frozenset[str] = frozenset()
    """Volumes for which each of its pods has a claim of its own."""

    @property
    def containers(self) -> list[tuple[str, dict[str, Any]]]:
        """Each container's path and description, those that run first included."""
        return [
            (f"{self.where} {field}/{container['name']}", container)
            for field in ("initContainers", "containers")
            for container in self.spec.get(field, [])
        ]


def pods(documents: Iterable[Document]) -> Iterator[Pod]:
    """Every pod template of the documents, training runtimes' included."""
    for document in documents:
        kind, where = document["kind"], title(document)
        namespace = document["metadata"].get("namespace", "")
        if kind == "Pod":
            yield _pod(where, kind, namespace, document)
        elif kind in TEMPLATES:
            template = document
            for key in TEMPLATES[kind]:
                template = template[key]
            yield _pod(where, kind, namespace, template, document["spec"])
        elif kind == "ClusterTrainingRuntime":
            for job in document["spec"]["template"]["spec"]["replicatedJobs"]:
                template = job["template"]["spec"]["template"]
                yield _pod(f"{where} {job['name']}", kind, namespace, template)


def _pod(
    where: str,
    kind: str,
    namespace: str,
    template: dict[str, Any],
    controller: Mapping[str, Any] = MappingProxyType({}),
) -> Pod:
    claims = controller.get("volumeClaimTemplates", [])
    return Pod(
        where=where,
        kind=kind,
        namespace=namespace,
        labels=template.get("metadata", {}).get("labels", {}),
        spec=template["spec"],
        replicas=controller.get("replicas", 1),
        claimed=frozenset(claim["metadata"]["name"] for claim in claims),
    )


def restricted(documents: list[Document]) -> list[str]:
    """Pod security standard "restricted", and a root file system that cannot be written."""
    found = []
    for pod in pods(documents):
        whole = pod.spec.get("securityContext", {})
        found += [f"{pod.where} {key}: is set" for key in HOST if key in pod.spec]
        for volume in pod.spec.get("volumes", []):
            if "hostPath" in volume:
                found.append(f"{pod.where} volumes/{volume['name']}: is a path of the host")
        for where, container in pod.containers:
            own = container.get("securityContext", {})
            both = {**whole, **own}
            found += [f"{where} {line}" for line in _context(both)]
            for port in container.get("ports", []):
                if "hostPort" in port:
                    found.append(f"{where} ports/{port['containerPort']}: is a port of the host")
    return found


def _context(context: dict[str, Any]) -> Iterator[str]:
    expected = {
        "runAsNonRoot": True,
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "seccompProfile": {"type": "RuntimeDefault"},
        "capabilities": {"drop": ["ALL"]},
    }
    for key, value in expected.items():
        if context.get(key) != value:
            yield f"securityContext/{key}: got {context.get(key)}, expected {value}"
    if context.get("privileged"):
        yield "securityContext/privileged: is set"
    if context.get("procMount", "Default") != "Default":
        yield "securityContext/procMount: is set"
    # An image may name its user by a name, which the kubelet cannot tell from root.
    if not context.get("runAsUser"):
        yield f"securityContext/runAsUser: got {context.get('runAsUser')}, expected another than 0"


def enforced(documents: list[Document]) -> list[str]:
    """Each namespace has Kubernetes refuse pods that are not restricted."""
    label = "pod-security.kubernetes.io/enforce"
    return [
        f"{title(document)} {label}: got {got}, expected restricted"
        for document in of_kind(documents, "Namespace")
        if (got := document["metadata"].get("labels", {}).get(label)) != "restricted"
    ]


def resources(documents: list[Document]) -> list[str]:
    """Each container asks for CPU and memory and is limited in both."""
    found = []
    for pod in pods(documents):
        for where, container in pod.containers:
            asked = container.get("resources", {})
            for name in ("cpu", "memory"):
                got = [asked.get(part, {}).get(name) for part in ("requests", "limits")]
                if None in got:
                    found.append(f"{where} resources/{name}: expected a request and a limit")
                elif quantity(got[0]) > quantity(got[1]):
                    found.append(f"{where} resources/{name}: asks for {got[0]}, may use {got[1]}")
    return found


def quantity(text: Any) -> float:
    """What a quantity of Kubernetes amounts to: `500m`, `2Gi`, 3.

    Raises:
        ValueError: If it is none.
    """
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", str(text))
    if not matched or matched[2] not in UNITS:
        raise ValueError(f"quantity: got {text!r}, expected a number and one of {sorted(UNITS)}")
    return float(matched[1]) * UNITS[matched[2]]


def probes(documents: list[Document]) -> list[str]:
    """A container that serves says when it is ready, and is restarted when it hangs."""
    found = []
    for pod in pods(documents):
        for container in pod.spec["containers"] if pod.kind in SERVERS else []:
            where = f"{pod.where} containers/{container['name']}"
            ports = {port.get("name") for port in container.get("ports", [])}
            for name in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container.get(name)
                if probe is None and name != "startupProbe":
                    found.append(f"{where} {name}: is missing")
                port = (probe or {}).get("httpGet", {}).get("port", 0)
                if isinstance(port, str) and port not in ports:
                    found.append(f"{where} {name}: no port {port}")
    return found


def images(documents: list[Document]) -> list[str]:
    """Each image has a digest, or a tag other than `latest`."""
    found = []
    for pod in pods(documents):
        for where, container in pod.containers:
            name, _, digest = container["image"].partition("@")
            _, _, tag = name.rpartition("/")[2].partition(":")
            if digest and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
                found.append(f"{where} image: got digest {digest}, expected sha256 of 64 digits")
            elif not digest and tag in ("", "latest"):
                found.append(f"{where} image: got {name}, expected a tag other than latest")
    return found


def undigested(documents: list[Document], names: set[str]) -> list[str]:
    """Images of these names have digests, so that nobody changes what runs by moving a tag."""
    return [
        f"{where} image: got {container['image']}, expected a digest"
        for pod in pods(documents)
        for where, container in pod.containers
        if base_name(container["image"]) in names and "@sha256:" not in container["image"]
    ]


def base_name(image: str) -> str:
    """An image's name without tag and digest."""
    name = image.partition("@")[0]
    head, slash, last = name.rpartition("/")
    return head + slash + last.partition(":")[0]


def scratch(documents: list[Document]) -> list[str]:
    """/tmp of each container is a volume of the pod's own, limited in size."""
    found = []
    for pod in pods(documents):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for name, volume in volumes.items():
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                found.append(f"{pod.where} volumes/{name}: expected a sizeLimit")
        for where, container in pod.containers:
            mounts = {m["mountPath"]: m["name"] for m in container.get("volumeMounts", [])}
            if "emptyDir" not in volumes.get(mounts.get("/tmp"), {}):
                found.append(f"{where} volumeMounts: expected an emptyDir at /tmp")
            found += [f"{where} volumeMounts/{n}: no such volume" for n in mounts.values()
                      if n not in volumes.keys() | pod.claimed]  # fmt: skip
    return found


def tokens(documents: list[Document], mounted: set[str]) -> list[str]:
    """Each pod has a service account that is there; a token only where the account is listed."""
    accounts = {
        (d["metadata"].get("namespace"), d["metadata"]["name"]): d
        for d in of_kind(documents, "ServiceAccount")
    }
    found = []
    for (_, name), account in accounts.items():
        wanted = name in mounted
        if (got := account.get("automountServiceAccountToken", True)) is not wanted:
            found.append(f"ServiceAccount/{name} token: got {got}, expected {wanted}")
    for pod in pods(documents):
        name = pod.spec.get("serviceAccountName", "default")
        there = {(pod.namespace, name)} if pod.namespace else {k for k in accounts if k[1] == name}
        if not there & set(accounts):
            found.append(f"{pod.where} serviceAccountName: got {name}, which is not there")
        given = pod.spec.get("automountServiceAccountToken", name in mounted)
        if given is not (name in mounted):
            found.append(f"{pod.where} token: got {given}, expected {name in mounted}")
    return found
