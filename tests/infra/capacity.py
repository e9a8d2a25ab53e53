"""What an overlay offers to pods and compiled steps: pools of nodes, quotas, limits."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tests.infra.compiled import Step
from tests.infra.pods import SERVERS, Pod, pods, quantity
from tests.infra.rendered import Document, of_kind, title


def tolerated(taints: list[dict[str, str]], tolerations: list[dict[str, str]]) -> bool:
    """Whether every taint has a toleration, as the scheduler matches them."""
    return all(
        any(
            toleration.get("key") in (None, "", taint["key"])
            and toleration.get("effect") in (None, "", taint["effect"])
            and (
                toleration.get("operator") == "Exists"
                or toleration.get("value", "") == taint.get("value", "")
            )
            for toleration in tolerations
        )
        for taint in taints
    )


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Nodes of one kind."""

    name: str
    """What findings call it."""
    labels: Mapping[str, str]
    """Of its nodes."""
    taints: list[dict[str, str]]
    """Keep away pods that do not tolerate them."""


def node_pools(documents: list[Document]) -> list[Pool]:
    """Pools that the documents make."""
    return [
        Pool(
            name=title(document),
            labels=document["spec"]["template"].get("metadata", {}).get("labels", {}),
            taints=document["spec"]["template"]["spec"].get("taints", []),
        )
        for document in of_kind(documents, "NodePool")
    ]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where pods want to run."""

    where: str
    """Whose pods."""
    num_gpus: float
    """What each asks for."""
    selector: Mapping[str, str]
    """Labels of the nodes."""
    tolerations: list[dict[str, str]]
    """Of taints."""


def placements(documents: list[Document], steps: Iterable[Step], gpu: str) -> list[Placement]:
    """Where pods and steps want to run; `gpu` is the name of that resource."""
    found = []
    for pod in pods(documents):
        found.append(
            Placement(
                where=pod.where,
                num_gpus=asked(pod)[f"limits.{gpu}"],
                selector=pod.spec.get("nodeSelector", {}),
                tolerations=pod.spec.get("tolerations", []),
            )
        )
    for step in steps:
        found.append(
            Placement(
                where=step.name,
                num_gpus=step.resources.get(gpu, 0),
                selector=step.kubernetes.get("nodeSelector", {}).get("labels", {}),
                tolerations=step.kubernetes.get("tolerations", []),
            )
        )
    return found


def unplaced(wanted: Iterable[Placement], pools: list[Pool]) -> list[str]:
    """Pods with a GPU select a pool and are let in there; others select and tolerate nothing."""
    found = []
    for one in wanted:
        matching = [pool for pool in pools if one.selector.items() <= pool.labels.items()]
        if not one.num_gpus:
            if one.selector or one.tolerations:
                found.append(f"{one.where}: takes room of GPU nodes without a GPU")
        elif not one.selector:
            found.append(f"{one.where}: asks for a GPU, selects no pool")
        elif not matching:
            found.append(f"{one.where}: no pool has {dict(one.selector)}")
        found += [
            f"{one.where}: does not tolerate the taints of {pool.name}"
            for pool in matching
            if one.num_gpus and one.selector and not tolerated(pool.taints, one.tolerations)
        ]
    return found


def over_quota(documents: list[Document], beside: Mapping[str, float]) -> list[str]:
    """A quota has room for everything that serves in its namespace, and for more beside it.

    Args:
        documents: Of the overlay; without a quota there is nothing to exceed.
        beside: What else runs at the same time, as `requests.cpu` and the like.
    """
    found = []
    for quota in of_kind(documents, "ResourceQuota"):
        needed = Counter(beside)
        for pod in pods(documents):
            if pod.kind in SERVERS and pod.namespace == quota["metadata"]["namespace"]:
                needed.update(asked(pod, pod.replicas))
        for name, amount in quota["spec"]["hard"].items():
            if quantity(amount) < needed[name]:
                found.append(f"{title(quota)} {name}: got {amount}, expected {needed[name]:g}")
    return found


def asked(pod: Pod, num_pods: int = 1) -> Counter:
    """What pods ask for together, by the names of a quota."""
    together, first = Counter(), Counter()
    for where, container in pod.containers:
        wanted = Counter()
        for part, amounts in container["resources"].items():
            for name, amount in amounts.items():
                wanted[f"{part}.{name}"] = num_pods * quantity(amount)
        # Containers that run first have ended before the others start.
        if "initContainers/" in where:
            first |= wanted
        else:
            together += wanted
    return (together | first) + Counter(pods=num_pods)


def largest(steps: Iterable[Step]) -> Counter:
    """The most that one step asks for; what it may use, it also requests."""
    found = Counter(pods=1)
    for step in steps:
        for name, amount in step.resources.items():
            for part in ("requests", "limits"):
                found[f"{part}.{name}"] = max(found[f"{part}.{name}"], amount)
    return found


def over_limits(documents: list[Document], steps: Iterable[Step]) -> list[str]:
    """No container and no step asks for more than a limit range lets one have."""
    wanted = [(step.name, step.resources) for step in steps]
    for pod in pods(documents):
        for where, container in pod.containers:
            limits = container["resources"]["limits"]
            wanted.append((where, {name: quantity(amount) for name, amount in limits.items()}))
    return [
        f"{where} {name}: asks for {got[name]:g}, {title(limit)} allows {most}"
        for limit in of_kind(documents, "LimitRange")
        for item in limit["spec"]["limits"]
        if item["type"] == "Container"
        for name, most in item.get("max", {}).items()
        for where, got in wanted
        if got.get(name, 0) > quantity(most)
    ]
