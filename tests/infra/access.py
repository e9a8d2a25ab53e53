"""Who may reach whom: network policies and RBAC of an overlay, as tables and as findings."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tests.infra.pods import pods
from tests.infra.rendered import Document, of_kind, title

ROLES = ("Role", "ClusterRole")
BINDINGS = ("RoleBinding", "ClusterRoleBinding")


def flows(documents: list[Document]) -> set[tuple[str, str, str, str]]:
    """What network policies allow: side that allows it, from, to, ports.

    A selector reads as its labels; `*` is every pod of the namespace, `anywhere` every address.
    """
    return {
        flow
        for document in of_kind(documents, "NetworkPolicy")
        for flow in _flows_of(document["spec"])
    }


def reached(documents: list[Document]) -> set[tuple[str, str, str]]:
    """Who may reach whom at which ports, whichever side says so: `one_sided` tells of the other."""
    return {flow[1:] for flow in flows(documents)}


def _flows_of(spec: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    subject = _labels(spec["podSelector"])
    sides = spec["policyTypes"]
    for rule in spec.get("egress", []) if "Egress" in sides else []:
        for peer in _peers(rule.get("to")):
            yield "egress", subject, peer, _ports(rule)
    for rule in spec.get("ingress", []) if "Ingress" in sides else []:
        for peer in _peers(rule.get("from")):
            yield "ingress", peer, subject, _ports(rule)


def _peers(peers: Any) -> list[str]:
    """Each peer of a rule; a rule that names none is for every address."""
    return [_peer(peer) for peer in peers] if peers else ["anywhere"]


def _peer(peer: dict[str, Any]) -> str:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        return " but ".join([block["cidr"], *block.get("except", [])])
    there = _labels(peer.get("podSelector", {}))
    if "namespaceSelector" in peer:
        return f"[{_labels(peer['namespaceSelector'])}] {there}"
    return there


def _labels(selector: dict[str, Any]) -> str:
    terms = [f"{key}={value}" for key, value in sorted(selector.get("matchLabels", {}).items())]
    for term in selector.get("matchExpressions", []):
        values = "|".join(sorted(term.get("values", [])))
        terms.append(f"{term['key']} {term['operator']} {values}".strip())
    return ",".join(terms) or "*"


def _ports(rule: dict[str, Any]) -> str:
    def one(port: dict[str, Any]) -> str:
        until = f"-{port['endPort']}" if "endPort" in port else ""
        return f"{port.get('port', 'any')}{until}/{port.get('protocol', 'TCP')}"

    return " ".join(sorted(map(one, rule.get("ports", [])))) or "any"


def default_deny(documents: list[Document]) -> list[str]:
    """Each namespace with pods has a policy for all of them that allows nothing, either way."""
    denied = {
        document["metadata"].get("namespace")
        for document in of_kind(documents, "NetworkPolicy")
        if document["spec"]["podSelector"] == {}
        and set(document["spec"].get("policyTypes", [])) == {"Ingress", "Egress"}
        and not document["spec"].get("ingress")
        and not document["spec"].get("egress")
    }
    ours = {pod.namespace for pod in pods(documents) if pod.namespace}
    ours |= {d["metadata"]["name"] for d in of_kind(documents, "Namespace")}
    return [f"Namespace/{name}: expected a policy that denies" for name in sorted(ours - denied)]


def one_sided(documents: list[Document]) -> list[str]:
    """Between pods of the namespace, what one side allows the other allows as well."""
    found = []
    allowed = flows(documents)
    for side, source, target, ports in sorted(allowed):
        other = {"egress": "ingress", "ingress": "egress"}[side]
        inside = _of_namespace(source) and _of_namespace(target)
        if inside and (other, source, target, ports) not in allowed:
            found.append(f"{source} -> {target} {ports}: {side} alone allows it")
    return found


def _of_namespace(end: str) -> bool:
    """Whether a flow's end is pods of the policy's own namespace, not another's or an address."""
    return end != "anywhere" and not end.startswith("[") and not re.match(r"[\d:]", end)


def idle(documents: list[Document], others: Iterable[Mapping[str, str]]) -> list[str]:
    """Each selector of network policies chooses some pods of the namespace: none is misspelt.

    Args:
        documents: Of the overlay.
        others: Labels of pods that are made by others, such as those of pipeline runs.
    """
    known = [pod.labels for pod in pods(documents)] + list(others)
    found = []
    for document in of_kind(documents, "NetworkPolicy"):
        spec = document["spec"]
        peers = [p for rule in spec.get("ingress", []) for p in rule.get("from", [])]
        peers += [p for rule in spec.get("egress", []) for p in rule.get("to", [])]
        selectors = [p["podSelector"] for p in peers if p.keys() == {"podSelector"}]
        for selector in [spec["podSelector"], *selectors]:
            if not any(_chosen(selector, labels) for labels in known):
                found.append(f"{title(document)}: no pod has {_labels(selector)}")
    return found


def _chosen(selector: dict[str, Any], labels: Mapping[str, str]) -> bool:
    terms = selector.get("matchExpressions", [])
    assert all(term["operator"] == "In" for term in terms), "other operators are not evaluated"
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(term["key"]) in term["values"] for term in terms
    )


def rules(documents: list[Document]) -> set[tuple[str, str, str, str]]:
    """What roles allow: role, API group, resource (and names, if limited to some), verbs."""
    found = set()
    for document in of_kind(documents, *ROLES):
        for rule in document.get("rules", []):
            names = "|".join(sorted(rule.get("resourceNames", [])))
            for group in rule.get("apiGroups", [""]):
                for resource in rule.get("resources", rule.get("nonResourceURLs", [])):
                    what = f"{resource} {names}".strip()
                    found.add((title(document), group, what, " ".join(sorted(rule["verbs"]))))
    return found


def wildcards(documents: list[Document]) -> list[str]:
    """No role has a `*`, nor what lets it give itself more."""
    more = {"escalate", "bind", "impersonate"}
    return [
        f"{role} {group}/{what}: {verbs}"
        for role, group, what, verbs in sorted(rules(documents))
        if "*" in (group + what + verbs) or more & set(verbs.split())
    ]


def bindings(documents: list[Document]) -> set[tuple[str, str]]:
    """Which role is bound to whom: `RoleBinding` or `ClusterRoleBinding`, role, subject."""
    found = set()
    for document in of_kind(documents, *BINDINGS):
        role = f"{document['roleRef']['kind']}/{document['roleRef']['name']}"
        for subject in document.get("subjects", []):
            where = subject.get("namespace", "")
            who = f"{subject['kind']}/{where}/{subject['name']}".replace("//", "/")
            found.add((f"{document['kind']} {role}", who))
    return found


def loose_bindings(documents: list[Document]) -> list[str]:
    """Each binding is of a role and to service accounts that are there."""
    there = {title(d) for d in documents}
    accounts = {
        f"ServiceAccount/{d['metadata'].get('namespace')}/{d['metadata']['name']}"
        for d in of_kind(documents, "ServiceAccount")
    }
    found = []
    for bound, who in sorted(bindings(documents)):
        if bound.split()[1] not in there:
            found.append(f"{bound}: no such role")
        if who not in accounts:
            found.append(f"{bound}: to {who}, which is not there")
    return found
