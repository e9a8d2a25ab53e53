"""What a pipeline asks of the cluster it is compiled for, as a server is given it.

Facts pinned:
- submitted for a cluster with GPUs, steps that train and steps that render have the selector of
  their pool, the toleration, GPUs and limits, and others have none of it; kind has none at all;
- each step has the home's volume, /tmp, labels, a user that is not root, secrets by name; only
  those that tell the webhook how a turn ended, or what its gate decided, have its address;
- images are the overlay's, by digest, tag or new name; what nobody built is compiled, but not
  submitted;
- runs have the cluster's service account;
- a step that only starts a TrainJob asks for no GPU; one under torchrun has room for each process.
"""

import sys

import pytest
import yaml

from components.images import CPU_IMAGE, GPU_IMAGE
from pipelines import clusters
from pipelines.__main__ import main
from tests.pipelines.kfp_server import KfpServer
from tests.pipelines.test_compile import steps_of
from tests.pipelines.tracing import trace_anew

NAME = "continuous_training"
DIGEST = f"sha256:{64 * 'a'}"
IMAGES = {
    "kind": {"cpu": {"newTag": "1.2.3"}},
    "dev": {"cpu": {"newName": "images.example.com/team/cpu"}, "gpu": {"newTag": "1.2.3"}},
    "prod": {
        "cpu": {"newName": "images.example.com/cpu", "digest": DIGEST},
        "gpu": {"digest": DIGEST, "newTag": "ignored"},
    },
}
EXPECTED = {
    "kind": {"cpu": "flowloom/cpu:1.2.3"},
    "dev": {"cpu": f"images.example.com/team/{CPU_IMAGE[9:]}", "gpu": "flowloom/gpu:1.2.3"},
    "prod": {"cpu": f"images.example.com/cpu@{DIGEST}", "gpu": f"flowloom/gpu@{DIGEST}"},
}
RENDERING = ("build_triplets", "evaluate")
TRAINING = ("train_reward", "calibrate_reward", "train_sft", "train_grpo", "tune_generator")
TELLING = ("end_turn", "promote")
LAUNCHED = ("train_sft", "train_grpo", "tune_generator")
LIMITS = {"kind": ("1", "3Gi"), "dev": ("4", "16Gi"), "prod": ("4", "16Gi")}


def write_overlays(folder, images):
    for cluster, entries in images.items():
        path = folder / cluster / "images" / "kustomization.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        listed = [{"name": f"flowloom/{name}", **entry} for name, entry in entries.items()]
        path.write_text(yaml.safe_dump({"kind": "Component", "images": listed}))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """No settings of this machine's; pipelines are traced anew, for overlays of the test's."""
    import kfp

    for name in ("KFP_TOKEN", "KFP_NAMESPACE", "KF_PIPELINES_UI_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    trace_anew(monkeypatch, tmp_path)
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    write_overlays(tmp_path, IMAGES)
    return tmp_path


def compiled(tmp_path, *arguments):
    """Steps of the pipeline as the command compiles it."""
    out = tmp_path / "out.yaml"
    assert main(["compile", NAME, "--out", str(out), *arguments]) == 0
    return steps_of(list(yaml.safe_load_all(out.read_text())))


def stage(step):
    """The component of a step."""
    return step.removesuffix("_round_2").removesuffix("_part")


def gpus(container):
    accelerator = container["resources"].get("accelerator")
    assert accelerator is None or accelerator["resourceType"] == "nvidia.com/gpu"
    return int(accelerator["resourceCount"]) if accelerator else 0


@pytest.mark.parametrize("cluster", IMAGES)
def test_what_is_submitted_asks_for_what_the_cluster_has(machine, cluster, monkeypatch):
    with KfpServer() as server:
        assert main(["submit", NAME, "--cluster", cluster, "--host", server.url]) == 0
        (run,) = server.runs.values()
        steps = steps_of(server.documents())
    assert run["service_account"] == "flowloom-steps"
    for step, (_, container, pod) in steps.items():
        rendering, training = stage(step) in RENDERING, stage(step) in TRAINING
        launching = cluster == "prod" and stage(step) in LAUNCHED
        heavy = (rendering or training) and not launching
        on_gpu = heavy and cluster != "kind"
        assert container["image"] == EXPECTED[cluster]["gpu" if on_gpu else "cpu"], step
        resources = container["resources"]
        limits = (resources["resourceCpuLimit"], resources["resourceMemoryLimit"])
        assert limits == (LIMITS[cluster] if heavy else ("1", "2Gi")), step
        secrets = {secret["secretName"]: secret for secret in pod["secretAsEnv"]}
        optional = {"flowloom-tracking", "flowloom-store"}
        assert set(secrets) - {"flowloom-webhook"} == optional
        assert ("flowloom-webhook" in secrets) == (step in TELLING), step
        assert all(secret["optional"] for secret in secrets.values())
        (turn,) = pod["fieldPathAsEnv"]
        assert turn == {"name": "FLOWLOOM_TURN", "fieldPath": "metadata.labels['pipeline/runid']"}
        (home,) = pod["pvcMount"]
        assert (home["constant"], home["mountPath"]) == ("flowloom-home", "/var/lib/flowloom")
        labels = {"app.kubernetes.io/part-of": "flowloom", "flowloom/role": "step"}
        assert pod["podMetadata"]["labels"] == labels
        user = {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}
        assert pod["securityContext"] == user
        mounts = {"/tmp", "/dev/shm"} if on_gpu else {"/tmp"}
        assert {mount["mountPath"] for mount in pod["emptyDirMounts"]} == mounts
        assert gpus(container) == on_gpu, step
        if not on_gpu:
            assert not {"nodeSelector", "tolerations"} & set(pod), step
            continue
        pool = {"dev": "gpu", "prod": "rendering" if rendering else "training"}[cluster]
        assert pod["nodeSelector"]["labels"] == {"flowloom/pool": pool}, step
        toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        assert pod["tolerations"] == [toleration]
    launches = {
        stage(step): task["inputs"]["parameters"]["launch"]["runtimeValue"]["constant"]
        for step, (task, _, _) in steps.items()
        if "launch" in task.get("inputs", {}).get("parameters", {})
    }
    assert launches == dict.fromkeys(LAUNCHED, clusters.CLUSTERS[cluster].launch)


def test_under_torchrun_a_step_has_room_for_each_process(machine, tmp_path):
    steps = compiled(tmp_path, "--launch", "torchrun:4")
    for step, (_, container, _) in steps.items():
        num = 0 if stage(step) not in TRAINING + RENDERING else 4 if stage(step) in LAUNCHED else 1
        assert gpus(container) == num, step
        if num:
            resources = container["resources"]
            limits = (resources["resourceCpuLimit"], resources["resourceMemoryLimit"])
            assert limits == (f"{4 * num}", f"{16 * num}Gi"), step


def test_without_an_overlay_images_are_the_components_own(machine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clusters, "OVERLAYS", tmp_path / "nothing")
    steps = compiled(tmp_path)
    assert {container["image"] for _, container, _ in steps.values()} == {CPU_IMAGE, GPU_IMAGE}
    with KfpServer() as server:
        for command in ("submit", "schedule"):
            assert main([command, NAME, "--host", server.url]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"pipelines: images of dev: got no {tmp_path}/nothing/dev/")
            assert error.endswith("from `make images CLUSTER=dev`\n")
        assert not server.packages


def test_images_that_nobody_built_are_not_submitted(machine, tmp_path, capsys):
    zeros = {"digest": f"sha256:{64 * '0'}"}
    write_overlays(tmp_path, {"prod": {"cpu": zeros, "gpu": zeros}})
    compiled(tmp_path, "--cluster", "prod")
    with KfpServer() as server:
        for command in ("submit", "schedule"):
            given = [command, NAME, "--cluster", "prod", "--host", server.url]
            assert main(given) == 2
            error = capsys.readouterr().err
            assert "images of prod: got a digest of zeros in" in error
            assert error.endswith("from `make images CLUSTER=prod`\n")
        assert not server.packages


@pytest.mark.parametrize(
    ("cluster", "launch", "message"),
    [
        ("dev", "torchrun:0", "launch: got 'torchrun:0', expected process, torchrun:N or"),
        ("kind", "trainjob:1x2", "launch: got trainjob:1x2 for kind, which has no GPU; expected"),
    ],
)
def test_what_cannot_be_launched_is_refused(machine, capsys, cluster, launch, message):
    assert main(["compile", NAME, "--cluster", cluster, "--launch", launch]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pipelines: {message}")
    assert error.count("\n") == 1


def test_another_cluster_is_refused(machine, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main(["compile", NAME, "--cluster", "moon"])
    monkeypatch.setenv(clusters.CLUSTER, "moon")
    assert main(["compile", NAME]) == 2
    error = capsys.readouterr().err
    assert "FLOWLOOM_CLUSTER: got 'moon', expected one of kind, dev, prod" in error


def test_a_local_run_is_for_no_cluster(machine, monkeypatch, capsys):
    monkeypatch.setenv(clusters.CLUSTER, "prod")
    monkeypatch.setenv(clusters.LAUNCH, "trainjob:2x4")
    assert main(["run", NAME, "--turn", "2"]) == 2
    assert "turn: got 2, expected 1" in capsys.readouterr().err
    assert (clusters.current().num_parts, clusters.current().launch) == (1, "process")


def test_a_job_on_processors_is_launched_on_kind(machine):
    cluster = clusters.choose("kind", "trainjob:2x1/cpu")
    assert (cluster.name, cluster.launch) == ("kind", "trainjob:2x1/cpu")
    assert clusters.current() == cluster


def test_a_file_that_cannot_be_written_is_one_line(machine, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["compile", NAME, "--out", str(tmp_path / "file" / "x.yaml")]) == 2
    error = capsys.readouterr().err
    assert error == f"pipelines: {tmp_path / 'file'}: File exists\n"


def test_an_interrupted_command_is_one_line(machine, capsys, monkeypatch):
    def interrupt(name, out):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["pipelines.__main__"], "compile_to", interrupt)
    assert main(["compile", NAME]) == 130
    assert capsys.readouterr().err == "pipelines: interrupted; the same command goes on\n"
