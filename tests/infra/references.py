"""What documents and compiled steps name: whether it is there, and is declared."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tests.infra.compiled import Step
from tests.infra.pods import SERVERS, Pod, pods
from tests.infra.rendered import Document, of_kind, title


@dataclass(frozen=True, kw_only=True)
class SecretUse:
    """A secret that something names."""

    where: str
    """Who names it."""
    name: str
    """Of the secret."""
    key: str | None
    """Which key; None for all that are there."""
    optional: bool
    """Whether the pod starts without it."""


def names(documents: list[Document], *kinds: str) -> set[str]:
    """Names of what there is of these kinds."""
    return {document["metadata"]["name"] for document in of_kind(documents, *kinds)}


def secrets(documents: list[Document], steps: Iterable[Step] = ()) -> list[SecretUse]:
    """Every secret that a pod, a service account or a compiled step names."""
    found = [use for pod in pods(documents) for use in _secrets_of(pod)]
    for account in of_kind(documents, "ServiceAccount"):
        for field in ("secrets", "imagePullSecrets"):
            for entry in account.get(field, []):
                found.append(_use(title(account), entry["name"]))
    for step in steps:
        for entry in step.kubernetes.get("secretAsEnv", []):
            for pair in entry["keyToEnv"]:
                key, optional = pair["secretKey"], entry.get("optional", False)
                found.append(_use(step.name, entry["secretName"], key, optional))
        for entry in step.kubernetes.get("secretAsVolume", []):
            found.append(_use(step.name, entry["secretName"], None, entry.get("optional", False)))
        for entry in step.kubernetes.get("imagePullSecret", []):
            found.append(_use(step.name, entry["secretName"]))
    return found


def _secrets_of(pod: Pod) -> Iterator[SecretUse]:
    for entry in pod.spec.get("imagePullSecrets", []):
        yield _use(pod.where, entry["name"])
    for volume in pod.spec.get("volumes", []):
        sources = [volume.get("secret"), *(
            source.get("secret") for source in volume.get("projected", {}).get("sources", [])
        )]  # fmt: skip
        for source in filter(None, sources):
            name = source.get("secretName", source.get("name"))
            optional = source.get("optional", False)
            for key in [item["key"] for item in source.get("items", [])] or [None]:
                yield _use(f"{pod.where} volumes/{volume['name']}", name, key, optional)
    for where, container in pod.containers:
        for entry in container.get("envFrom", []):
            if ref := entry.get("secretRef"):
                yield _use(where, ref["name"], None, ref.get("optional", False))
        for entry in container.get("env", []):
            if ref := entry.get("valueFrom", {}).get("secretKeyRef"):
                yield _use(where, ref["name"], ref["key"], ref.get("optional", False))


def _use(where: str, name: str, key: str | None = None, optional: bool = False) -> SecretUse:
    return SecretUse(where=where, name=name, key=key, optional=optional)


def undeclared_secrets(
    uses: Iterable[SecretUse], declared: Mapping[str, Mapping[str, bool]]
) -> list[str]:
    """Each secret and key is declared; one that may be missing is not waited for.

    Args:
        uses: As `secrets` finds them.
        declared: Keys of each secret, and whether the key may be missing.
    """
    found = []
    for use in uses:
        keys = declared.get(use.name, {})
        if use.name not in declared or (use.key and use.key not in keys):
            found.append(f"{use.where} secret {use.name}/{use.key or '*'}: is not declared")
        elif use.key and keys[use.key] and not use.optional:
            found.append(f"{use.where} secret {use.name}/{use.key}: may be missing, is waited for")
    return found


def unkept_secrets(
    documents: list[Document], declared: Mapping[str, Mapping[str, bool]]
) -> list[str]:
    """Secrets that an overlay generates have the keys that are declared, and no others."""
    found = []
    for document in of_kind(documents, "Secret"):
        keys = declared.get(document["metadata"]["name"], {})
        got = document.get("data", {}).keys() | document.get("stringData", {}).keys()
        found += [f"{title(document)} {key}: is not declared" for key in sorted(got - keys.keys())]
        needed = {key for key, optional in keys.items() if not optional}
        found += [f"{title(document)} {key}: is missing" for key in sorted(needed - got)]
    return found


def missing(documents: list[Document]) -> list[str]:
    """What pods name besides secrets is there: claims, config maps, priority classes."""
    there = {
        kind: names(documents, kind)
        for kind in ("PersistentVolumeClaim", "ConfigMap", "PriorityClass")
    }
    found = []
    for pod in pods(documents):
        wanted = [("PriorityClass", pod.spec.get("priorityClassName"))]
        for volume in pod.spec.get("volumes", []):
            claim, config = volume.get("persistentVolumeClaim"), volume.get("configMap")
            wanted.append(("PersistentVolumeClaim", claim and claim["claimName"]))
            wanted.append(("ConfigMap", config and config["name"]))
        for _, container in pod.containers:
            for entry in container.get("envFrom", []):
                wanted.append(("ConfigMap", entry.get("configMapRef", {}).get("name")))
            for entry in container.get("env", []):
                ref = entry.get("valueFrom", {}).get("configMapKeyRef", {})
                wanted.append(("ConfigMap", ref.get("name")))
        found += [f"{pod.where} {kind}/{name}: no such document" for kind, name in wanted
                  if name and name not in there[kind]]  # fmt: skip
    return found


def unserved(documents: list[Document]) -> list[str]:
    """Each service reaches the pods of one document, which listen at the port it sends to."""
    found = []
    for service in of_kind(documents, "Service"):
        where, selector = title(service), service["spec"].get("selector", {})
        space = service["metadata"].get("namespace")
        behind = [
            pod
            for pod in pods(documents)
            if pod.namespace == space and selector.items() <= pod.labels.items()
        ]
        if len(behind) != 1 or behind[0].kind not in SERVERS:
            got = ", ".join(pod.where for pod in behind) or "no pods"
            found.append(f"{where} selector: got {got}, expected those of one server")
            continue
        ports = [port for _, c in behind[0].containers for port in c.get("ports", [])]
        listened = {p.get("name") for p in ports} | {p["containerPort"] for p in ports}
        for port in service["spec"]["ports"]:
            if port.get("targetPort", port["port"]) not in listened:
                found.append(f"{where} ports/{port['port']}: {behind[0].where} has none")
    return found


def outside(
    steps: Iterable[Step], documents: list[Document], namespace: str, account: str
) -> list[str]:
    """What steps name besides secrets is in the namespace that they run in."""
    there = {(d["kind"], d["metadata"]["name"]) for d in documents
             if d["metadata"].get("namespace") == namespace}  # fmt: skip
    wanted = {("ServiceAccount", account, "every step")}
    for step in steps:
        for mount in step.kubernetes.get("pvcMount", []):
            wanted.add(("PersistentVolumeClaim", mount["constant"], step.name))
        for field in ("configMapAsEnv", "configMapAsVolume"):
            for entry in step.kubernetes.get(field, []):
                wanted.add(("ConfigMap", entry["configMapName"], step.name))
    return [f"{where}: no {kind}/{name} in {namespace}"
            for kind, name, where in sorted(wanted) if (kind, name) not in there]  # fmt: skip


def stuck_budgets(documents: list[Document]) -> list[str]:
    """A disruption budget matches pods and lets at least one of them go."""
    found = []
    for budget in of_kind(documents, "PodDisruptionBudget"):
        spec, where = budget["spec"], title(budget)
        chosen = spec["selector"].get("matchLabels", {}).items()
        replicas = sum(
            pod.replicas
            for pod in pods(documents)
            if pod.kind in SERVERS and chosen <= pod.labels.items()
        )
        least = spec.get("minAvailable", replicas - 1 if spec.get("maxUnavailable") else replicas)
        if not replicas:
            found.append(f"{where} selector: no pod has {dict(chosen)}")
        elif isinstance(least, int) and least >= replicas:
            found.append(f"{where}: {replicas} pods, none of which may go")
    return found
