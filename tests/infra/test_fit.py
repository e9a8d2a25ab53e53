"""Pipelines as compiled for each cluster, and TrainJobs, beside the manifests of its overlay.

Facts pinned:
- every secret and key that pods, steps and TrainJobs name is in `infra/prerequisites.yaml` and in
  `docs/deploy.md`; one that may be missing is not waited for; what `kind` generates is complete;
- every claim and service account that steps name is in the namespace they run in; pods of TrainJobs
  have the home of steps at the same place;
- pods and steps with a GPU select a pool of the cluster and tolerate its taint, no others do; pools
  are the same in `pipelines.clusters`, in the prerequisites and, for prod, as NodePools;
- the quota has room for all servers, as many of the largest step as run at once, and a TrainJob;
- every selector of a network policy chooses pods that are there, steps and drivers of runs among
  them; schedules have the time zone of the prerequisites;
- steps run the images that the overlay lists, by the names of `components.images` and of the
  Dockerfile's targets;
- a TrainJob is valid for the trainer, and its runtime is in the overlay;
- each of these is seen to fail on something changed.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from components.images import CPU_IMAGE, GPU_IMAGE, RENDER_IMAGE
from flowloom import launch
from flowloom.launch import trainjob
from infra.images import TARGETS
from pipelines.clusters import CLUSTERS
from tests.infra import (
    access,
    capacity,
    compiled,
    dockerfile,
    pods,
    references,
    rendered,
    validation,
)
from tests.infra.rendered import OVERLAYS, of_kind, put, title

LISTED = {pods.base_name(image) for image in (CPU_IMAGE, GPU_IMAGE, RENDER_IMAGE)}
DOCS = rendered.ROOT / "docs" / "deploy.md"
SERVER = "Deployment/flowloom-mlflow"
GPU_RUNTIME = "ClusterTrainingRuntime/flowloom-torch-gpu"
DRIVER = {"pipelines.kubeflow.org/v2_component": "true"}
"""Label of every pod that Kubeflow Pipelines makes for a run."""
NODE = "spec/template/spec/replicatedJobs/0/template/spec/template/spec"
RUN = SimpleNamespace(stage="train_grpo", dir=Path("0123456789abcdef"))


@pytest.fixture(params=OVERLAYS)
def overlay(request):
    return request.param


@pytest.fixture
def documents(overlay):
    return rendered.documents(overlay)


@pytest.fixture
def cluster(overlay):
    return CLUSTERS[overlay]


@pytest.fixture
def steps(overlay):
    return compiled.steps(overlay)


def declared(documents=()):
    """Keys of each secret, and whether each may be missing; none of what is generated here may."""
    found = {
        secret["name"]: dict.fromkeys(secret["keys"], False)
        | dict.fromkeys(secret["optional"], True)
        for secret in rendered.prerequisites()["secrets"]
    }
    for document in of_kind(documents, "Secret"):
        found[document["metadata"]["name"]] |= dict.fromkeys(document["data"], False)
    return found


def pools(overlay, documents):
    """NodePools if the overlay makes any, else what the prerequisites ask of the cluster."""
    gpu = rendered.prerequisites()["gpu"]
    return capacity.node_pools(documents) or [
        capacity.Pool(name=name, labels={gpu["label"]: name}, taints=[gpu["taint"]])
        for name in gpu["pools"][overlay]
    ]


def train_job(cluster):
    """The TrainJob that a training step of this cluster makes; None if it makes none."""
    way = launch.parse(cluster.launch)
    return trainjob.body(RUN, Path("launch.json"), way) if way.kind == "trainjob" else None


def beside(documents, cluster, steps):
    """What parts of a step ask for at once, each as the largest, and a TrainJob with them."""
    largest = capacity.largest(steps)
    found = Counter({name: cluster.num_parts * amount for name, amount in largest.items()})
    if job := train_job(cluster):
        runtime = f"ClusterTrainingRuntime/{job['spec']['runtimeRef']['name']}"
        trainer = job["spec"]["trainer"]
        (pod,) = [pod for pod in pods.pods(documents) if pod.where.startswith(runtime)]
        asked = pod.spec["containers"][0]["resources"]
        for part, amounts in trainer.get("resourcesPerNode", {}).items():
            asked[part] |= amounts  # as the trainer merges them
        found += capacity.asked(pod, trainer["numNodes"])
    return found


def test_clusters_are_the_overlays():
    assert list(CLUSTERS) == list(OVERLAYS)
    assert {path.name for path in (rendered.INFRA / "overlays").iterdir()} == set(OVERLAYS)


def test_secrets_are_declared(documents, steps):
    uses = references.secrets(documents, steps)
    assert references.undeclared_secrets(uses, declared(documents)) == []
    assert {use.name for use in uses} == set(declared())


def test_generated_secrets_are_complete(documents):
    assert references.unkept_secrets(documents, declared()) == []


def test_secrets_are_in_the_docs():
    text = DOCS.read_text()
    for name, keys in declared().items():
        assert [word for word in (name, *keys) if word not in text] == []


@pytest.mark.parametrize(
    ("path", "value", "finding"),
    [
        ("-spec/template/spec/containers/0/envFrom", {"secretRef": {"name": "other"}}, "other/*"),
        ("-spec/template/spec/volumes", {"name": "a", "secret": {"secretName": "other"}},
         "other/*"),
        ("-spec/template/spec/imagePullSecrets", {"name": "registry"}, "registry/*"),
        ("-spec/template/spec/containers/0/env", {"name": "A", "valueFrom": {
            "secretKeyRef": {"name": "flowloom-store", "key": "OTHER"}}}, "flowloom-store/OTHER"),
        ("-spec/template/spec/containers/0/env", {"name": "A", "valueFrom": {
            "secretKeyRef": {"name": "flowloom-webhook", "key": "FLOWLOOM_WEBHOOK_URL"}}},
         "FLOWLOOM_WEBHOOK_URL: may be missing, is waited for"),
    ],
)  # fmt: skip
def test_undeclared_secret_is_found(path, value, finding):
    documents = rendered.documents("dev")
    put(documents, SERVER, path, value)
    (found,) = references.undeclared_secrets(references.secrets(documents), declared())
    assert finding in found


def test_secret_of_a_step_is_found():
    (step, *_) = compiled.steps("dev")
    entry = {"secretName": "other", "keyToEnv": [{"secretKey": "KEY"}]}
    changed = dataclasses.replace(step, kubernetes={"secretAsEnv": [entry]})
    (found,) = references.undeclared_secrets(references.secrets([], [changed]), declared())
    assert "secret other/KEY: is not declared" in found


def test_incomplete_secret_is_found():
    documents = rendered.documents("kind")
    put(documents, "Secret/flowloom-store", "data/AWS_ACCESS_KEY_ID", None)
    put(documents, "Secret/flowloom-store", "data/ACCESS_KEY", "a2V5")
    assert references.unkept_secrets(documents, declared()) == [
        "Secret/flowloom-store ACCESS_KEY: is not declared",
        "Secret/flowloom-store AWS_ACCESS_KEY_ID: is missing",
    ]


def test_what_steps_name_is_there(documents, cluster, steps):
    space, account = cluster.namespace, cluster.service_account
    assert references.outside(steps, documents, space, account) == []
    assert len(references.outside(steps, documents, "other", account)) > len(steps)
    (found,) = references.outside([], documents, space, "default")
    assert "no ServiceAccount/default in flowloom" in found


def test_training_runtimes_have_the_home_of_steps(documents, steps):
    (home,) = {
        (mount["constant"], mount["mountPath"])
        for step in steps
        for mount in step.kubernetes["pvcMount"]
    }
    runtimes = [pod for pod in pods.pods(documents) if pod.kind == "ClusterTrainingRuntime"]
    assert runtimes
    for pod in runtimes:
        ((_, container),) = pod.containers
        assert container["name"] == "node"  # where the trainer puts command and variables
        claims = {
            volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName")
            for volume in pod.spec["volumes"]
        }
        mounts = container["volumeMounts"]
        assert home in {(claims[mount["name"]], mount["mountPath"]) for mount in mounts}


def test_pods_are_placed(overlay, documents, steps):
    gpu = rendered.prerequisites()["gpu"]["resource"]
    wanted = capacity.placements(documents, steps, gpu)
    assert capacity.unplaced(wanted, pools(overlay, documents)) == []


def test_pools_agree(overlay, documents, cluster):
    gpu = rendered.prerequisites()["gpu"]
    labels = {pool.labels[gpu["label"]] for pool in pools(overlay, documents)}
    assert labels == {cluster.training_pool, cluster.rendering_pool} - {None}
    assert labels == set(gpu["pools"][overlay])
    for pool in pools(overlay, documents):
        assert [(t["key"], t["effect"]) for t in pool.taints] == [tuple(gpu["taint"].values())]


@pytest.mark.parametrize(
    ("path", "value", "finding"),
    [
        ("nodeSelector", None, "asks for a GPU, selects no pool"),
        ("nodeSelector", {"flowloom/pool": "gpu"}, "no pool has {'flowloom/pool': 'gpu'}"),
        ("tolerations", None, "does not tolerate the taints of NodePool/flowloom-training"),
        ("tolerations/0/effect", "NoExecute", "does not tolerate"),
        ("tolerations/0", {"key": "nvidia.com/gpu", "value": "false"}, "does not tolerate"),
        ("containers/0/resources", {}, "takes room of GPU nodes without a GPU"),
    ],
)
def test_misplaced_pod_is_found(path, value, finding):
    documents = rendered.documents("prod")
    put(documents, GPU_RUNTIME, f"{NODE}/{path}", value)
    wanted = capacity.placements(documents, [], "nvidia.com/gpu")
    found = capacity.unplaced(wanted, pools("prod", documents))
    assert len(found) == 1
    assert finding in found[0]


def test_step_of_another_cluster_is_misplaced():
    documents = rendered.documents("prod")
    wanted = capacity.placements(documents, compiled.steps("dev"), "nvidia.com/gpu")
    found = capacity.unplaced(wanted, pools("prod", documents))
    assert found
    assert all(line.endswith("no pool has {'flowloom/pool': 'gpu'}") for line in found)


def test_quota_has_room(documents, cluster, steps):
    assert capacity.over_quota(documents, beside(documents, cluster, steps)) == []
    assert capacity.over_limits(documents, steps) == []


@pytest.mark.parametrize(
    ("name", "amount"),
    [("requests.nvidia.com/gpu", "9"), ("requests.memory", "250Gi"), ("pods", "5")],
)
def test_small_quota_is_found(name, amount):
    documents = rendered.documents("prod")
    put(documents, "ResourceQuota/flowloom", f"spec/hard/{name.replace('/', '~')}", amount)
    needed = beside(documents, CLUSTERS["prod"], compiled.steps("prod"))
    (finding,) = capacity.over_quota(documents, needed)
    assert f"{name}: got {amount}" in finding


def test_step_over_a_limit_is_found():
    documents = rendered.documents("dev")
    put(documents, "LimitRange/flowloom", "spec/limits/0/max", {"memory": "8Gi"})
    found = capacity.over_limits(documents, compiled.steps("dev"))
    assert any("dev-continuous_training" in line and "allows 8Gi" in line for line in found)


def test_network_policies_choose_pods(documents, steps):
    labels = [step.kubernetes["podMetadata"]["labels"] for step in steps]
    assert access.idle(documents, [*labels, DRIVER]) == []
    assert len(access.idle(documents, [*labels])) == 2
    put(documents, "NetworkPolicy/training", "spec/podSelector/matchLabels", {"role": "training"})
    (finding,) = access.idle(documents, [*labels, DRIVER])
    assert finding == "NetworkPolicy/training: no pod has role=training"


def test_time_zones_agree(cluster):
    assert cluster.time_zone == rendered.prerequisites()["time_zone"]


def test_images_are_the_overlays(overlay, documents, steps):
    path = rendered.INFRA / "overlays" / overlay / "images" / "kustomization.yaml"
    listed = yaml.safe_load(path.read_text())["images"]
    assert {entry["name"] for entry in listed} <= LISTED
    run = {container["image"] for pod in pods.pods(documents) for _, container in pod.containers}
    run |= {step.container["image"] for step in steps}
    assert _foreign(run, listed) == set()
    assert _foreign({CPU_IMAGE + "-rc"}, listed) == {CPU_IMAGE + "-rc"}


def _foreign(run, listed):
    """Images of ours that run otherwise than the overlay lists them."""
    names = {entry.get("newName", entry["name"]) for entry in listed} | LISTED
    return {image for image in run if pods.base_name(image) in names} - set(map(_reference, listed))


def _reference(entry):
    name = entry.get("newName", entry["name"])
    return f"{name}@{entry['digest']}" if "digest" in entry else f"{name}:{entry['newTag']}"


def test_image_names_are_the_targets():
    assert {f"flowloom/{target}" for target in TARGETS} == LISTED
    assert set(TARGETS) <= set(dockerfile.read(rendered.INFRA / "Dockerfile"))


@pytest.mark.parametrize("word", ["trainjob:2x4", "trainjob:2x2/cpu"])
def test_train_job_is_valid(word):
    job = trainjob.body(RUN, Path("launch.json"), launch.parse(word))
    assert validation.findings(job, "1.37") == []
    runtime = f"ClusterTrainingRuntime/{job['spec']['runtimeRef']['name']}"
    assert runtime in {title(document) for document in rendered.documents("prod")}
    for path, value in (("spec/trainer/numNodes", "2"), ("spec/trainer/nodes", 2)):
        broken = trainjob.body(RUN, Path("launch.json"), launch.parse(word))
        put([broken], title(broken), path, value)
        assert validation.findings(broken, "1.37")
