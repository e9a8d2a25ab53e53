"""Policies that the rendered manifests of every overlay keep.

Facts pinned:
- pods run as another user than root on a read-only root file system, with no capability, no gain of
  privileges and the default seccomp profile; nothing of the host; namespaces enforce `restricted`;
- each container asks for CPU and memory and is limited in both, servers have probes, /tmp is a
  volume of limited size; no image is untagged or `latest`, in prod each has a digest;
- every namespace denies all traffic but the flows of `FLOWS`, which both ends allow;
- roles allow what `RULES` lists, to whom `BINDINGS` says; steps of pipelines alone have a token;
- what pods and services name is there; a disruption budget lets pods go;
- every policy is seen to fail on manifests with one thing changed.
"""

import copy
import functools

import pytest

from components.images import CPU_IMAGE, GPU_IMAGE, RENDER_IMAGE
from tests.infra import access, pods, references, rendered
from tests.infra.rendered import OVERLAYS, put

TOKENS = {"flowloom-steps"}
"""Service accounts whose pods ask something of the Kubernetes API."""
POLICIES = {
    "restricted": pods.restricted,
    "enforced": pods.enforced,
    "resources": pods.resources,
    "probes": pods.probes,
    "scratch": pods.scratch,
    "images": pods.images,
    "tokens": functools.partial(pods.tokens, mounted=TOKENS),
    "default_deny": access.default_deny,
    "one_sided": access.one_sided,
    "wildcards": access.wildcards,
    "loose_bindings": access.loose_bindings,
    "missing": references.missing,
    "unserved": references.unserved,
    "stuck_budgets": references.stuck_budgets,
}
SERVER = "Deployment/flowloom-mlflow"
BACKUP = "CronJob/flowloom-mlflow-backup"
RUNTIME = "ClusterTrainingRuntime/flowloom-torch-gpu"
POD = "spec/template/spec"
CONTAINER = f"{POD}/containers/0"
CONTEXT = f"{CONTAINER}/securityContext"
JOB = "spec/jobTemplate/spec/template/spec"
NODE = "spec/template/spec/replicatedJobs/0/template/spec/template/spec"
HOST_PATH = {"name": "host", "hostPath": {"path": "/"}}
MUTATIONS = [
    ("restricted", SERVER, f"{POD}/securityContext/runAsNonRoot", None, "runAsNonRoot"),
    ("restricted", SERVER, f"{POD}/securityContext/runAsUser", 0, "runAsUser"),
    ("restricted", SERVER, f"{CONTEXT}/runAsUser", 0, "runAsUser"),
    ("restricted", SERVER, f"{POD}/securityContext/seccompProfile", None, "seccompProfile"),
    ("restricted", SERVER, f"{CONTEXT}/readOnlyRootFilesystem", False, "readOnlyRootFilesystem"),
    ("restricted", SERVER, f"{CONTEXT}/allowPrivilegeEscalation", None, "allowPrivilege"),
    ("restricted", SERVER, f"{CONTEXT}/capabilities/add", ["SYS_ADMIN"], "capabilities"),
    ("restricted", SERVER, f"{CONTEXT}/privileged", True, "privileged"),
    ("restricted", SERVER, f"{POD}/hostNetwork", True, "hostNetwork"),
    ("restricted", SERVER, f"{POD}/hostPID", True, "hostPID"),
    ("restricted", SERVER, f"-{POD}/volumes", HOST_PATH, "volumes/host"),
    ("restricted", SERVER, f"{CONTAINER}/ports/0/hostPort", 5000, "ports/5000"),
    ("restricted", BACKUP, f"{JOB}/initContainers/0/securityContext", None, "initContainers/dump"),
    ("restricted", RUNTIME, f"{NODE}/containers/0/securityContext", None, "containers/node"),
    ("enforced", "Namespace/flowloom", "metadata/labels/pod-security.kubernetes.io~enforce",
     "baseline", "baseline"),
    ("resources", SERVER, f"{CONTAINER}/resources/limits/memory", None, "resources/memory"),
    ("resources", SERVER, f"{CONTAINER}/resources/requests/cpu", "64", "asks for 64"),
    ("resources", RUNTIME, f"{NODE}/containers/0/resources", None, "resources/cpu"),
    ("probes", SERVER, f"{CONTAINER}/livenessProbe", None, "livenessProbe"),
    ("probes", SERVER, f"{CONTAINER}/readinessProbe", None, "readinessProbe"),
    ("probes", SERVER, f"{CONTAINER}/startupProbe/httpGet/port", "web", "no port web"),
    ("scratch", SERVER, f"{CONTAINER}/volumeMounts", [], "emptyDir at /tmp"),
    ("scratch", SERVER, f"{POD}/volumes", [], "no such volume"),
    ("scratch", RUNTIME, f"-{NODE}/volumes", {"name": "a", "emptyDir": {}}, "sizeLimit"),
    ("images", SERVER, f"{CONTAINER}/image", "example.com:5000/flowloom/cpu", "image"),
    ("images", BACKUP, f"{JOB}/initContainers/0/image", "postgres:latest", "latest"),
    ("tokens", SERVER, f"{POD}/automountServiceAccountToken", True, "token"),
    ("tokens", SERVER, f"{POD}/serviceAccountName", None, "got default"),
    ("tokens", RUNTIME, f"{NODE}/serviceAccountName", "nobody", "got nobody"),
    ("tokens", "ServiceAccount/flowloom-servers", "automountServiceAccountToken", None, "token"),
    ("default_deny", "NetworkPolicy/default-deny", "spec/policyTypes", ["Ingress"], "denies"),
    ("default_deny", "NetworkPolicy/default-deny", "spec/egress", [{}], "denies"),
    ("wildcards", "Role/flowloom-steps", "rules/0/verbs", ["*"], "trainjobs"),
    ("wildcards", "Role/flowloom-steps", "rules/0/verbs", ["escalate"], "escalate"),
    ("loose_bindings", "RoleBinding/flowloom-steps", "roleRef/name", "admin", "no such role"),
    ("loose_bindings", "RoleBinding/flowloom-steps", "subjects/0/name", "default", "not there"),
    ("missing", SERVER, f"{POD}/priorityClassName", "high", "PriorityClass/high"),
    ("missing", RUNTIME, f"{NODE}/volumes/0/persistentVolumeClaim/claimName", "other",
     "PersistentVolumeClaim/other"),
    ("missing", SERVER, f"-{CONTAINER}/envFrom", {"configMapRef": {"name": "other"}},
     "ConfigMap/other"),
    ("unserved", SERVER, f"{CONTAINER}/ports/0/name", "web", "has none"),
    ("unserved", "Service/flowloom-mlflow", "spec/selector", {"app": "other"}, "no pods"),
]  # fmt: skip
"""Policy, document, path in it, what is put there (None: nothing), what the finding says."""
BUDGET = {
    "apiVersion": "policy/v1",
    "kind": "PodDisruptionBudget",
    "metadata": {"name": "budget"},
    "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app.kubernetes.io/name": "mlflow"}}},
}


STEP = "flowloom/role=step"
STAGE = "flowloom/role In step|training"
TRAINING = "flowloom/role=training"
RUNS = "pipelines.kubeflow.org/v2_component=true"
MLFLOW = "app.kubernetes.io/name=mlflow"
MLFLOW_SERVER = "app.kubernetes.io/component=server,app.kubernetes.io/name=mlflow"
KUBEFLOW = "[kubernetes.io/metadata.name=kubeflow]"
PUBLIC = (
    "0.0.0.0/0 but 10.0.0.0/8 but 100.64.0.0/10 but 169.254.0.0/16 but 172.16.0.0/12 "
    "but 192.168.0.0/16"
)
EVERYWHERE = {
    ("*", "[kubernetes.io/metadata.name=kube-system] k8s-app=kube-dns", "53/TCP 53/UDP"),
    (RUNS, f"{KUBEFLOW} app=ml-pipeline", "8887/TCP"),
    (RUNS, f"{KUBEFLOW} app=seaweedfs", "8333/TCP"),
    (RUNS, f"{KUBEFLOW} component=metadata-grpc-server", "8080/TCP"),
    (STAGE, MLFLOW_SERVER, "5000/TCP"),
    (TRAINING, TRAINING, "any"),
}
OUTSIDE = EVERYWHERE | {
    (RUNS, "192.0.2.0/28", "443/TCP 6443/TCP"),
    (MLFLOW, "192.0.2.16/28", "5432/TCP"),
    (MLFLOW, PUBLIC, "443/TCP"),
    (STAGE, PUBLIC, "443/TCP"),
}
FLOWS = {
    "kind": EVERYWHERE
    | {
        (RUNS, "172.18.0.0/16", "6443/TCP"),
        (MLFLOW, "app.kubernetes.io/name=postgres", "5432/TCP"),
        (MLFLOW, "app.kubernetes.io/name=store", "8333/TCP"),
        (STAGE, "app.kubernetes.io/name=store", "8333/TCP"),
        (STEP, PUBLIC, "443/TCP"),
    },
    "dev": OUTSIDE,
    "prod": OUTSIDE | {(STEP, "app.kubernetes.io/name=render", "8188/TCP")},
}
"""From, to, ports. Nothing else passes."""
STEPS_ROLE = "Role/flowloom-steps"
SUBMIT_ROLE = "Role/flowloom-submit"
RULES = {
    (STEPS_ROLE, "", "configmaps kfp-launcher", "get"),
    (STEPS_ROLE, "", "pods", "get list watch"),
    (STEPS_ROLE, "", "pods/log", "get"),
    (STEPS_ROLE, "", "secrets mlpipeline-minio-artifact", "get"),
    (STEPS_ROLE, "argoproj.io", "workflowtaskresults", "create patch"),
    (STEPS_ROLE, "trainer.kubeflow.org", "trainjobs", "create delete get"),
    (SUBMIT_ROLE, "pipelines.kubeflow.org", "experiments", "create get list"),
    (SUBMIT_ROLE, "pipelines.kubeflow.org", "jobs", "create delete disable enable get list"),
    (SUBMIT_ROLE, "pipelines.kubeflow.org", "pipelines", "create get list"),
    (SUBMIT_ROLE, "pipelines.kubeflow.org", "runs", "create get list"),
}
"""Role, API group, resource and the names it is limited to, verbs."""
BINDINGS = {
    (f"RoleBinding {STEPS_ROLE}", "ServiceAccount/flowloom/flowloom-steps"),
    (f"RoleBinding {SUBMIT_ROLE}", "ServiceAccount/flowloom/flowloom-submit"),
}
CLUSTER_WIDE = {"Namespace", "PriorityClass", "ClusterTrainingRuntime", "NodePool"}


@pytest.fixture(params=OVERLAYS)
def overlay(request):
    return request.param


@pytest.mark.parametrize("policy", POLICIES)
def test_kept(overlay, policy):
    assert POLICIES[policy](rendered.documents(overlay)) == []


@pytest.mark.parametrize(("policy", "target", "path", "value", "finding"), MUTATIONS)
def test_mutation_is_found(policy, target, path, value, finding):
    documents = rendered.documents("dev")
    put(documents, target, path, value)
    found = POLICIES[policy](documents)
    assert any(finding in line for line in found), found


def test_every_policy_is_seen_to_fail():
    assert {mutation[0] for mutation in MUTATIONS} | {"stuck_budgets", "one_sided"} == set(POLICIES)


def test_budget_lets_pods_go():
    documents = [*rendered.documents("dev"), copy.deepcopy(BUDGET)]
    assert references.stuck_budgets(documents) == [
        "PodDisruptionBudget/budget: 1 pods, none of which may go"
    ]
    put(documents, SERVER, "spec/replicas", 2)
    assert references.stuck_budgets(documents) == []
    put(documents, "PodDisruptionBudget/budget", "spec/selector/matchLabels", {"app": "other"})
    assert "no pod has" in references.stuck_budgets(documents)[0]


def test_images_of_ours_have_digests_in_prod():
    ours = {pods.base_name(image) for image in (CPU_IMAGE, GPU_IMAGE, RENDER_IMAGE)}
    documents = rendered.documents("prod")
    assert pods.undigested(documents, ours) == []
    put(documents, SERVER, f"{CONTAINER}/image", CPU_IMAGE)
    (finding,) = pods.undigested(documents, ours)
    assert SERVER in finding


def test_flows(overlay):
    assert access.reached(rendered.documents(overlay)) == FLOWS[overlay]


@pytest.mark.parametrize("side", ["ingress", "egress"])
def test_flow_that_one_side_allows_is_found(side):
    documents = [
        document
        for document in rendered.documents("dev")
        if document["metadata"]["name"] != {"ingress": "stages-to-mlflow",
                                            "egress": "mlflow-from-stages"}[side]
    ]  # fmt: skip
    (finding,) = access.one_sided(documents)
    assert finding == f"{STAGE} -> {MLFLOW_SERVER} 5000/TCP: {side} alone allows it"


def test_wider_policy_is_another_flow():
    documents = rendered.documents("dev")
    put(documents, "NetworkPolicy/stages-to-mlflow", "spec/egress/0/to", [{"podSelector": {}}])
    put(documents, "NetworkPolicy/mlflow-from-stages", "spec/ingress/0/from", None)
    put(documents, "NetworkPolicy/dns", "spec/egress/0/ports", None)
    assert access.reached(documents) - FLOWS["dev"] == {
        (STAGE, "*", "5000/TCP"),
        ("anywhere", MLFLOW_SERVER, "5000/TCP"),
        ("*", "[kubernetes.io/metadata.name=kube-system] k8s-app=kube-dns", "any"),
    }


def test_roles(overlay):
    documents = rendered.documents(overlay)
    assert access.rules(documents) == RULES
    assert access.bindings(documents) == BINDINGS
    put(documents, STEPS_ROLE, "-rules/1/verbs", "delete")
    assert access.rules(documents) - RULES == {(STEPS_ROLE, "", "pods", "delete get list watch")}


def test_everything_is_in_the_namespace(overlay):
    for document in rendered.documents(overlay):
        expected = None if document["kind"] in CLUSTER_WIDE else "flowloom"
        assert document["metadata"].get("namespace") == expected, rendered.title(document)
