"""Pins `doctor --cluster`: a cluster with all that an overlay needs is status 0; each thing that is
missing, of another version or not allowed is one row with what to do, and status 1; where no
cluster answers, one line and status 2. It only reads, and no value of a secret is ever said."""

import base64
import copy
import http.server
import json
import threading

import pytest
import yaml

from flowloom.cli import cluster_doctor

VALUE = "hunter2-of-the-cluster"
KEPT = base64.b64encode(VALUE.encode()).decode()
NAMESPACE = "/api/v1/namespaces/flowloom"
REVIEW = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
GPU = "nvidia.com/gpu"


def deployment(image, labels=None):
    containers = [{"name": "main", "image": image}]
    return {
        "metadata": {"labels": labels or {}},
        "spec": {"template": {"spec": {"containers": containers}}},
    }


def node(name, pool, num_gpus=4, tainted=True):
    taints = [{"key": GPU, "value": "true", "effect": "NoSchedule"}] if tainted else []
    return {
        "metadata": {"name": name, "labels": {"flowloom/pool": pool}},
        "spec": {"taints": taints},
        "status": {"allocatable": {GPU: str(num_gpus)} if num_gpus else {}},
    }


def claim(mode="ReadWriteMany", phase="Bound"):
    spec = {"accessModes": [mode], "storageClassName": "shared"}
    return {"spec": spec, "status": {"phase": phase}}


def storage_class(name, provisioner, default=False):
    annotations = {cluster_doctor.DEFAULT_CLASS: "true"} if default else {}
    return {"metadata": {"name": name, "annotations": annotations}, "provisioner": provisioner}


def whole():
    """What a cluster answers that has everything, by path."""
    wanted = cluster_doctor.prerequisites()
    answers = {
        "/version": {"gitVersion": "v1.34.2"},
        "/api/v1/nodes": {"items": [node("t0", "training"), node("r0", "rendering")]},
        "/apis/storage.k8s.io/v1/storageclasses": {
            "items": [
                storage_class("standard", "ebs.csi.aws.com"),
                storage_class("shared", "efs.csi.aws.com", default=True),
            ]
        },
        "/api/v1/namespaces/kubeflow/configmaps/pipeline-install-config": {"data": {}},
        f"{NAMESPACE}/configmaps/kfp-launcher": {},
        REVIEW: {"status": {"allowed": True}},
    }
    for item in wanted["storage"]:
        answers[f"{NAMESPACE}/persistentvolumeclaims/{item['claim']}"] = claim()
    for secret in wanted["secrets"]:
        keys = [*secret["keys"], *secret["optional"]]
        answers[f"{NAMESPACE}/secrets/{secret['name']}"] = {"data": dict.fromkeys(keys, KEPT)}
    for name in cluster_doctor.ACCOUNTS:
        answers[f"{NAMESPACE}/serviceaccounts/{name}"] = {}
    for name in ("flowloom-torch-cpu", "flowloom-torch-gpu"):
        answers[f"/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/{name}"] = {}
    for part in wanted["components"]:
        image = f"registry.example.com:5000/upstream/{part['name']}:v{part['version']}"
        path = f"/apis/apps/v1/namespaces/{part['namespace']}/deployments/{part['deployment']}"
        answers[path] = deployment(image)
        for kind in part["kinds"]:
            listed = answers.setdefault(
                f"/apis/{kind['group']}/{kind['version']}", {"resources": []}
            )
            listed["resources"].append({"kind": kind["kind"]})
    return answers


class ScriptedCluster:
    """Answers each path from `answers`: an object, a status, or 404; keeps what was asked."""

    def __init__(self):
        self.answers, self.asked = whole(), []
        cluster = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size) or "null")
                path = self.path.partition("?")[0]
                cluster.asked.append((self.command, path, body))
                found = cluster.answers.get(path, 404)
                found = found(body) if callable(found) else found
                status, answer = (
                    (found, {"message": "no"}) if isinstance(found, int) else (200, found)
                )
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_GET

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def running():
    cluster = ScriptedCluster()
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(running, tmp_path, monkeypatch):
    running.answers, running.asked = whole(), []
    configure(tmp_path, monkeypatch, running.address)
    return running


def configure(folder, monkeypatch, address):
    contexts = [{"name": name, "context": {"cluster": "c", "user": "u"}} for name in ("a", "b")]
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": address}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": contexts,
        "current-context": "a",
    }
    (folder / "config").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(folder / "config"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


@pytest.fixture
def doctor(run_json):
    """Findings by name, and the status, of `doctor --cluster OVERLAY`."""

    def call(overlay="prod", *more):
        status, answer = run_json("doctor", "--cluster", overlay, *more)
        return status, {finding["name"]: finding for finding in answer["findings"]}

    return call


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_a_cluster_with_everything(cluster, doctor, overlay):
    cluster.answers["/api/v1/nodes"]["items"].append(node("g0", "gpu"))
    status, found = doctor(overlay)
    assert {name: f["detail"] for name, f in found.items() if not f["ok"]} == {}
    assert status == 0
    assert found["kubernetes"]["detail"] == "v1.34.2"
    assert found["kubeflow-pipelines"]["detail"] == "v2.17.0"
    assert (
        "shared (efs.csi.aws.com, default, by its name shared)"
        in found["storage classes"]["detail"]
    )
    assert found["rights to trainjobs"]["detail"] == "create, get, delete"
    assert ("karpenter" in found) == (overlay == "prod")


def test_kind_needs_neither_gpus_nor_shared_storage(cluster, doctor):
    cluster.answers["/api/v1/nodes"] = {"items": [node("only", "", num_gpus=0, tainted=False)]}
    cluster.answers[f"{NAMESPACE}/persistentvolumeclaims/flowloom-home"] = claim("ReadWriteOnce")
    del cluster.answers[
        "/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/flowloom-torch-gpu"
    ]
    status, found = doctor("kind")
    assert (status, [name for name, f in found.items() if not f["ok"]]) == (0, [])


def test_a_claim_that_waits_for_its_first_pod_is_no_fault(cluster, doctor):
    """As kind's are before the first turn: its volumes belong to a node."""
    cluster.answers[HOME] = claim(phase="Pending")
    cluster.answers[f"{CLASSES}/shared"] = {"volumeBindingMode": "WaitForFirstConsumer"}
    status, found = doctor()
    assert (status, found["claim flowloom-home"]["ok"]) == (0, True)
    assert found["claim flowloom-home"]["detail"] == "Pending, ReadWriteMany, until its first pod"
    cluster.answers[HOME] = claim("ReadWriteOnce", "Pending")
    assert doctor()[0] == 1
    cluster.answers[HOME] = claim(phase="Pending")
    cluster.answers[f"{CLASSES}/shared"] = {"volumeBindingMode": "Immediate"}
    assert doctor()[0] == 1


def test_nothing_is_changed_and_secrets_stay_secret(cluster, run):
    status, out, err = run("doctor", "--cluster", "prod", "--json")
    shown = [run("doctor", "--cluster", "prod"), (status, out, err)]
    assert all(secret not in str(shown) for secret in (VALUE, KEPT))
    posted = {path for method, path, _ in cluster.asked if method != "GET"}
    assert posted == {REVIEW}


SECRET = f"{NAMESPACE}/secrets/flowloom-store"
HOME = f"{NAMESPACE}/persistentvolumeclaims/flowloom-home"
KFP = "/apis/apps/v1/namespaces/kubeflow/deployments/ml-pipeline"
ZONE = "/api/v1/namespaces/kubeflow/configmaps/pipeline-install-config"
CLASSES = "/apis/storage.k8s.io/v1/storageclasses"


@pytest.mark.parametrize(
    ("path", "answer", "name", "said"),
    [
        ("/version", {"gitVersion": "v1.30.9"}, "kubernetes", "v1.30.9"),
        ("/version", {"gitVersion": "v1.38.0"}, "kubernetes", "v1.38.0"),
        ("/version", {}, "kubernetes", "no version"),
        ("/apis/jobset.x-k8s.io/v1alpha2", 404, "JobSet jobset.x-k8s.io/v1alpha2", "no such group"),
        (
            "/apis/trainer.kubeflow.org/v1alpha1",
            {"resources": [{"kind": "TrainJob"}]},
            "ClusterTrainingRuntime trainer.kubeflow.org/v1alpha1",
            "not among the group's kinds",
        ),
        (KFP, 404, "kubeflow-pipelines", "no deployment kubeflow/ml-pipeline"),
        (KFP, deployment("example.com/api:2.5.0"), "kubeflow-pipelines", "2.5.0"),
        (ZONE, {"data": {"cronScheduleTimezone": "Asia/Tokyo"}}, "time zone", "Asia/Tokyo"),
        (CLASSES, {"items": []}, "storage classes", "none"),
        (CLASSES, {"items": [storage_class("a", "b")]}, "storage classes", "a (b)"),
        (HOME, 404, "claim flowloom-home", "not in namespace flowloom"),
        (HOME, claim(phase="Pending"), "claim flowloom-home", "Pending, ReadWriteMany"),
        (HOME, claim("ReadWriteOnce"), "claim flowloom-home", "Bound, ReadWriteOnce"),
        ("/api/v1/nodes", {"items": [node("x", "training", 0)]}, "pool training", f"0 {GPU}"),
        (SECRET, 404, "secret flowloom-store", "not in namespace flowloom"),
        (
            SECRET,
            {"data": {"FLOWLOOM_STORE": KEPT, "AWS_ACCESS_KEY_ID": KEPT}},
            "secret flowloom-store",
            "missing: AWS_SECRET_ACCESS_KEY",
        ),
        (SECRET, {}, "secret flowloom-store", "keys none"),
        (
            f"{NAMESPACE}/serviceaccounts/flowloom-steps",
            404,
            "serviceaccounts flowloom-steps",
            "not there",
        ),
        (f"{NAMESPACE}/configmaps/kfp-launcher", 404, "configmaps kfp-launcher", "not there"),
        (
            "/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/flowloom-torch-gpu",
            404,
            "clustertrainingruntimes flowloom-torch-gpu",
            "not there",
        ),
        (SECRET, 403, "secret flowloom-store", "not known: Kubernetes: GET"),
        ("/api/v1/nodes", 403, "GPU nodes", "not known"),
        (KFP, 401, "kubeflow-pipelines", "not known"),
    ],
)
def test_what_is_missing_is_named(cluster, doctor, path, answer, name, said):
    assert path in cluster.answers
    cluster.answers[path] = copy.deepcopy(answer)
    status, found = doctor()
    assert status == 1
    assert [n for n, f in found.items() if not f["ok"] and f["needed"]] == [name]
    assert said in found[name]["detail"]
    assert found[name]["fix"]


def test_another_version_of_a_kind_is_named(cluster, doctor):
    served = cluster.answers.pop("/apis/trainer.kubeflow.org/v1alpha1")
    cluster.answers["/apis/trainer.kubeflow.org/v1beta1"] = served
    cluster.answers["/apis/trainer.kubeflow.org"] = {"versions": [{"version": "v1beta1"}]}
    status, found = doctor()
    trainjob = found["TrainJob trainer.kubeflow.org/v1alpha1"]
    assert (status, trainjob["detail"]) == (1, "served as v1beta1 alone")
    assert "install kubeflow-trainer 2.3.0" in trainjob["fix"]


@pytest.mark.parametrize(
    ("path", "answer", "name"),
    [
        ("/api/v1/nodes", {"items": [node("t0", "training")]}, "pool rendering"),
        (
            "/api/v1/nodes",
            {"items": [node("t0", "training", tainted=False), node("r0", "rendering")]},
            "taint of pool training",
        ),
        (f"{NAMESPACE}/secrets/flowloom-webhook", 404, "secret flowloom-webhook"),
    ],
)
def test_what_one_can_do_without_is_said_and_allowed(cluster, doctor, path, answer, name):
    cluster.answers[path] = answer
    status, found = doctor()
    assert status == 0
    assert [n for n, f in found.items() if not f["ok"]] == [name]


def test_rights_are_what_the_server_says(cluster, doctor):
    def review(body):
        asked = body["spec"]["resourceAttributes"]
        assert asked["namespace"] == "flowloom"
        refused = asked["verb"] == "delete" or asked.get("subresource") == "log"
        return {"status": {"allowed": not refused}}

    cluster.answers[REVIEW] = review
    status, found = doctor()
    assert found["rights to trainjobs"]["detail"] == "create, get; may not delete"
    assert found["rights to pods/log"]["detail"] == "nothing; may not get"
    assert found["rights to pods"]["ok"]
    assert status == 0


def test_an_unlabelled_image_by_digest_does_not_tell(cluster, doctor):
    cluster.answers[KFP] = deployment("example.com/api@sha256:" + 64 * "1")
    assert "does not say which version" in doctor()[1]["kubeflow-pipelines"]["detail"]
    labels = {"app.kubernetes.io/version": "2.17.3"}
    cluster.answers[KFP] = deployment("example.com/api@sha256:" + 64 * "1", labels)
    assert doctor()[1]["kubeflow-pipelines"]["detail"] == "2.17.3"


def test_another_namespace_and_context(cluster, run):
    run("doctor", "--cluster", "dev", "--context", "b", "--namespace", "elsewhere")
    paths = {path for _, path, _ in cluster.asked}
    assert "/api/v1/namespaces/elsewhere/secrets/flowloom-store" in paths
    assert not any("/namespaces/flowloom/" in path for path in paths)


def test_a_table_for_people(cluster, run):
    cluster.answers[SECRET] = 404
    status, out, _ = run("doctor", "--cluster", "prod")
    row = next(line for line in out.splitlines() if "secret flowloom-store" in line)
    assert status == 1
    assert "MISSING" in row


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cluster", "moon"), "--cluster: got 'moon', expected one of kind, dev, prod"),
        (("--cluster", "dev", "--context", "nowhere"), "no cluster to talk to"),
        (("--context", "a"), "--context: got no --cluster"),
    ],
)
def test_wrong_questions_are_one_line(cluster, run, arguments, said):
    status, out, err = run("doctor", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err


@pytest.mark.parametrize("broken", ["down", "no file", "in trouble"])
def test_a_cluster_that_does_not_answer_is_one_line(cluster, run, tmp_path, monkeypatch, broken):
    if broken == "down":
        configure(tmp_path, monkeypatch, "http://127.0.0.1:9")
    elif broken == "no file":
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    else:
        cluster.answers["/api/v1/nodes"] = 500
    status, out, err = run("doctor", "--cluster", "prod")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("flowloom doctor: Kubernetes: ")


def test_the_declaration_ships_with_the_package():
    assert cluster_doctor.prerequisites()["kubernetes"]["min"] == "1.31"
