"""Manifests of every overlay, rendered, against what clusters accept.

Facts pinned:
- each is valid, strictly, for Kubernetes 1.31 to 1.37, and for the trainer's models, whose round
  trip is equal; pods within training runtimes are as strictly checked; nothing is null;
- `infra/prerequisites.yaml` declares these versions and the custom kinds that occur;
- of every kind that occurs, a manifest with a typical mistake is refused;
- an unknown kind is refused, and so is one field more in any manifest;
- nothing is there twice, and everything of ours is labelled as part of flowloom.
"""

from importlib import metadata

import pytest

from tests.infra import rendered, validation
from tests.infra.rendered import OVERLAYS, put, title

VERSIONS = [f"1.{minor}" for minor in range(31, 38)]
PART_OF = "app.kubernetes.io/part-of"
KUBERNETES = {
    "v1",
    "apps/v1",
    "batch/v1",
    "networking.k8s.io/v1",
    "rbac.authorization.k8s.io/v1",
    "scheduling.k8s.io/v1",
}
"""API groups of Kubernetes that manifests are of, none of them a beta."""
BROKEN = {
    "ClusterTrainingRuntime": ("spec/mlPolicy/numNodes", "two"),
    "CronJob": ("spec/schedule", None),
    "Deployment": ("spec/replicas", "two"),
    "LimitRange": ("spec/limits/0/maximum", {"cpu": "1"}),
    "Namespace": ("metadata/labels/istio-injection", True),
    "NetworkPolicy": ("spec/podselector", {}),
    "NodePool": ("spec/template/spec/taints/0/effect", "NoScheduling"),
    "PersistentVolumeClaim": ("spec/accessModes", "ReadWriteMany"),
    "PriorityClass": ("value", "1000"),
    "ResourceQuota": ("spec/hard", ["pods"]),
    "Role": ("rules/0/verbs", "get"),
    "RoleBinding": ("subjects", {"kind": "ServiceAccount", "name": "flowloom-steps"}),
    "Secret": ("stringData/PORT", 5432),
    "Service": ("spec/ports/0/targetport", 5000),
    "ServiceAccount": ("automountServiceAccountToken", "false"),
    "StatefulSet": ("spec/volumeClaimTemplates/0/spec/resources", {"storage": "5Gi"}),
}
"""Of each kind: a path, and what somebody wrote there; None if it was forgotten."""


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request):
    return request.param


@pytest.fixture(scope="module")
def everything():
    """Documents of all overlays, one for each kind and name."""
    return {title(d): d for overlay in OVERLAYS for d in rendered.documents(overlay)}


@pytest.mark.parametrize("version", VERSIONS)
def test_valid(overlay, version):
    found = {
        f"{title(document)} {finding}"
        for document in rendered.documents(overlay)
        for finding in validation.findings(document, version)
    }
    assert found == set()


def test_versions_declared():
    assert rendered.prerequisites()["kubernetes"]["tested"] == VERSIONS


def test_custom_kinds_are_declared(overlay):
    """What is not of Kubernetes itself comes with a component that this overlay needs."""
    declared = {
        (f"{kind['group']}/{kind['version']}", kind["kind"])
        for component in rendered.prerequisites()["components"]
        if overlay in component["overlays"]
        for kind in component["kinds"]
    }
    own = validation.MODELS.keys() | validation.schemas().keys()
    used = {(d["apiVersion"], d["kind"]) for d in rendered.documents(overlay)}
    assert used & own <= declared
    assert {api for api, _ in used - own} <= KUBERNETES


def test_versions_are_those_of_models_and_schemas():
    versions = {c["name"]: c["version"] for c in rendered.prerequisites()["components"]}
    assert versions["kubeflow-trainer"] == metadata.version("kubeflow-trainer-api")
    assert versions["kubeflow-pipelines"] == metadata.version("kfp")
    minor = versions["karpenter"].rpartition(".")[0]
    for schema in validation.schemas().values():
        assert f"Karpenter {minor} " in schema["description"]


def test_every_kind_has_a_broken_manifest(everything):
    assert {document["kind"] for document in everything.values()} == set(BROKEN)


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_manifest_is_caught(everything, kind):
    name = next(name for name, document in everything.items() if document["kind"] == kind)
    path, value = BROKEN[kind]
    documents = [d for overlay in OVERLAYS for d in rendered.documents(overlay)]
    broken = next(document for document in documents if title(document) == name)
    assert validation.findings(broken, VERSIONS[0]) == []
    put([broken], name, path, value)
    for version in (VERSIONS[0], VERSIONS[-1]):
        (finding,) = validation.findings(broken, version)
        assert path.split("/")[-1] in finding, finding


def test_unknown_field_is_caught(overlay):
    for document in rendered.documents(overlay):
        document["unknown"] = {}
        assert validation.findings(document, VERSIONS[-1]), title(document)


def test_unknown_kind_is_caught():
    unknown = {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "a"}}
    (finding,) = validation.findings(unknown, VERSIONS[-1])
    assert "example.com/v1 Thing is unknown" in finding


def test_pod_of_a_runtime_is_checked_for_each_version(everything):
    """The trainer's models know fields of pods that Kubernetes has had since 1.34 only."""
    runtime = everything["ClusterTrainingRuntime/flowloom-torch-cpu"]
    node = "spec/template/spec/replicatedJobs/0/template/spec/template/spec/containers/0"
    again = {"action": "Restart", "exitCodes": {"operator": "In", "values": [1]}}
    put([runtime], title(runtime), f"{node}/restartPolicyRules", [again])
    (finding,) = validation.findings(runtime, "1.33")
    assert "'restartPolicyRules' was unexpected" in finding
    assert validation.findings(runtime, "1.34") == []


def test_null_is_caught():
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a", "labels": None}}
    assert validation.findings(space, VERSIONS[-1]) == ["metadata/labels: is null"]


def test_names_are_unique(overlay):
    names = [title(document) for document in rendered.documents(overlay)]
    assert sorted(names) == sorted(set(names))


def test_everything_is_part_of_flowloom(overlay):
    for document in rendered.documents(overlay):
        if document["kind"] != "Namespace":
            assert document["metadata"]["labels"][PART_OF] == "flowloom", title(document)


def test_old_kubectl_is_a_reason(monkeypatch, tmp_path):
    program = tmp_path / "kubectl"
    program.write_text('#!/bin/sh\necho \'{"clientVersion": {"gitVersion": "v1.20.2"}}\'\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert (
        rendered.reason() == f"{program}: got v1.20.2, expected 1.31 or later, see {rendered.GET}"
    )
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert rendered.reason().startswith("kubectl: not on PATH; expected 1.31 or later")
