"""Facts: a TrainJob's body is what Kubeflow Trainer's models know, with nothing they would drop; a
job is named by its run, made once and taken over by the same call; its first process's log is
shown; a failure names the first failed rank and its lines, and is not tried again; a disrupted job
is made again, bounded, and goes on from its checkpoints; what waits in vain, is deleted by others
or leaves no result ends with a line; an interrupt deletes the job; pods that run the job's command
make what torchrun makes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from flowloom import launch, stages
from flowloom.launch import api, request, trainjob
from flowloom.launch.errors import LaunchError
from flowloom.runs import home
from tests.launch.rehearsal import RehearsalConfig
from tests.launch.scripts import (
    DISRUPTED,
    RUNNING,
    ended,
    fails,
    num_made,
    process,
    start,
    well,
)


def test_the_body_is_what_the_trainer_knows(rehearse, monkeypatch):
    monkeypatch.setenv("FLOWLOOM_TURN", "run-7")
    monkeypatch.setenv("FLOWLOOM_STEP", "train_sft_round_2")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    run, _ = stages.opened(rehearse, RehearsalConfig())
    body = trainjob.body(run, run.dir / "launch.json", launch.parse("trainjob:2x4"))
    job = TrainerV1alpha1TrainJob.from_dict(body)
    assert job.to_dict() == body
    assert body["metadata"]["name"] == f"flowloom-rehearse-{run.dir.name}"
    assert job.spec.runtime_ref.name == "flowloom-torch-gpu"
    trainer = job.spec.trainer
    assert (trainer.num_nodes, trainer.num_proc_per_node) == (2, 4)
    file = str(home() / "runs" / rehearse / run.dir.name / "launch.json")
    assert trainer.command == ["python", "-m", "flowloom.launch", file]
    assert body["spec"]["trainer"]["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "4"}
    env = {item.name: item.value for item in trainer.env}
    assert env == {
        "FLOWLOOM_HOME": str(home()), "FLOWLOOM_TURN": "run-7",
        "FLOWLOOM_STEP": "train_sft_round_2", "FLOWLOOM_CODE_DIGEST": "0" * 64,
        "FLOWLOOM_FOLLOWED": str(run.dir / "followed"),
    }  # fmt: skip
    plain = trainjob.body(run, run.dir / "launch.json", launch.parse("trainjob:1x2/cpu"))
    assert plain["spec"]["runtimeRef"] == {"name": "flowloom-torch-cpu"}
    assert "resourcesPerNode" not in plain["spec"]["trainer"]
    assert TrainerV1alpha1TrainJob.from_dict(plain).to_dict() == plain
    for stage in stages.STAGES:
        name = trainjob.name_of(stages.Run(stage, run.dir))
        # Of a pod: the job's, `-node-0-`, an index and five letters.
        assert len(name) + len("-node-0-10-abcde") <= 63


def test_a_job_that_ends_well_leaves_the_run_and_is_deleted(cluster, capfd):
    server = cluster(well)
    result = start()
    assert (result.metrics, result.cached) == ({"rehearse/total": 0.75}, False)
    err = capfd.readouterr().err
    assert err.count("step 1\n") == err.count("step 2\n") == 1
    assert "not shown" not in err
    assert server.objects == {"trainjobs": {}, "pods": {}}
    assert num_made(server) == 1
    again = start()
    assert (again.digest, again.cached) == (result.digest, True)
    assert num_made(server) == 1


def test_a_failure_names_the_first_failed_rank_and_is_not_repeated(cluster):
    server = cluster(fails)
    with pytest.raises(LaunchError) as error:
        start()
    first, *lines = str(error.value).splitlines()
    name = next(iter(server.objects["trainjobs"]))
    expected = f"rehearse: TrainJob flowloom/{name}: rank 2 of 4 failed, exit code 1"
    assert first == f"{expected}; its last lines:"
    assert lines[-1].strip() == "RuntimeError: out of memory"
    assert num_made(server) == 1
    # The next call is another try: the failed job gives way.
    server.script = well
    assert start().metrics == {"rehearse/total": 0.75}
    assert num_made(server) == 2


def test_a_failure_without_a_report_says_how_the_pod_ended(cluster):
    def script(server, job):
        server.pod(job, 0, **RUNNING)
        server.pod(job, 1, **ended(137, reason="OOMKilled"))
        server.end(job, "Failed", "FailedJobs", "jobset failed")

    cluster(script)
    said = r"FailedJobs: jobset failed; pod .*-node-0-1-.*: OOMKilled, exit code 137"
    with pytest.raises(LaunchError, match=said):
        start()


def test_a_disrupted_job_is_made_again_and_goes_on_from_checkpoints(cluster):
    attempts = []

    def script(server, job):
        attempts.append(job["metadata"]["annotations"]["flowloom/attempt"])
        work = Path(job["spec"]["trainer"]["command"][-1]).parent / "work"
        if len(attempts) == 3:
            assert (work / "checkpoint").read_text() == "2"
            return well(server, job)
        work.mkdir(exist_ok=True)
        (work / "checkpoint").write_text(str(len(attempts)))
        server.pod(job, 0, **RUNNING)
        name = server.pod(job, 1, **RUNNING)
        # Its peer breaks too, and says so first; the pod itself is soon gone.
        server.pod(job, 0, **ended(1))
        server.pod(job, 1, conditions=DISRUPTED, **ended(143))
        time.sleep(0.2)
        server.put("pods", server.objects["pods"][name], "DELETED")
        return server.end(job, "Failed", "FailedJobs", "jobset failed")

    server = cluster(script)
    assert start().metrics == {"rehearse/total": 0.75}
    assert attempts == ["1", "2", "3"]
    assert server.asked.count(next(x for x in server.asked if x.startswith("DELETE"))) == 3


def test_disruptions_are_bounded_and_one_of_an_earlier_restart_is_none(cluster, monkeypatch):
    monkeypatch.setattr(trainjob, "MAX_ATTEMPTS", 2)

    def script(server, job):
        server.pod(job, 0, conditions=DISRUPTED, **ended(143))
        time.sleep(0.2)
        server.end(job, "Failed", "FailedJobs", "jobset failed")

    server = cluster(script)
    with pytest.raises(LaunchError, match="was disrupted 2 times; the same step, run again"):
        start()
    assert num_made(server) == 2

    def restarted(server, job):
        server.pod(job, 0, conditions=DISRUPTED, **ended(143))
        server.pod(job, 0, restart=1, **ended(1))
        time.sleep(0.2)
        server.end(job, "Failed", "FailedJobs", "jobset failed")

    server.script = restarted
    with pytest.raises(LaunchError, match=r"pod .*: Error, exit code 1"):
        start()
    assert num_made(server) == 3


def test_a_job_that_goes_already_is_taken_over(cluster, capfd):
    goes, follow = threading.Event(), threading.Event()

    def script(server, job):
        server.pod(job, 0, **RUNNING)
        goes.set()
        follow.wait(20)
        well(server, job)

    server = cluster(script)
    run, _ = stages.opened("rehearse", RehearsalConfig())
    file = request.write(run, RehearsalConfig(), {})
    connected = api.connect()
    connected.create(api.TRAIN_JOBS, trainjob.body(run, file, launch.parse("trainjob:2x2")))
    goes.wait(20)
    threading.Timer(0.2, follow.set).start()
    assert start().metrics == {"rehearse/total": 0.75}
    assert "goes already: taken over" in capfd.readouterr().err
    assert num_made(server) == 1


def test_somebody_elses_job_of_the_name_is_left_alone(cluster):
    server = cluster(well)
    run, _ = stages.opened("rehearse", RehearsalConfig())
    other = {"metadata": {"name": trainjob.name_of(run), "labels": {}}}
    server.put("trainjobs", other, "ADDED")
    with pytest.raises(LaunchError, match="is not flowloom's"):
        start()
    assert server.current(trainjob.name_of(run)) is other


def test_a_job_that_somebody_deletes_is_not_made_again(cluster):
    def script(server, job):
        server.pod(job, 0, **RUNNING)
        time.sleep(0.2)
        server._carry_out("DELETE", "trainjobs", job["metadata"]["name"], {}, _FOREGROUND)

    server = cluster(script)
    with pytest.raises(LaunchError, match="was deleted by somebody else"):
        start()
    assert num_made(server) == 1


_FOREGROUND = {"propagationPolicy": "Foreground"}


def test_pods_that_wait_in_vain_end_the_call(cluster, monkeypatch, capfd):
    monkeypatch.setattr(trainjob, "STUCK_S", 0.2)
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    status = {"phase": "Pending", "containerStatuses": [{"state": {"waiting": waiting}}]}
    server = cluster(lambda server, job: server.pod(job, 0, **status))
    with pytest.raises(LaunchError, match=r"pod .*: ImagePullBackOff: no such image"):
        start()
    assert "waits: pod" in capfd.readouterr().err
    assert server.objects["trainjobs"] == {}


def test_a_complete_job_without_a_result_is_an_error(cluster):
    cluster(lambda server, job: server.end(job, "Complete"))
    with pytest.raises(LaunchError, match="its pods have another home folder"):
        start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_deletes_the_job(cluster, number):
    server = cluster(lambda server, job: server.pod(job, 0, **RUNNING))
    code = "from tests.launch.scripts import start; start()"
    with process(code) as child:
        until_s = time.monotonic() + 60
        while not any("watch" in line for line in server.asked):
            assert time.monotonic() < until_s
            time.sleep(0.05)
        assert len(server.objects["trainjobs"]) == 1
        child.send_signal(number)
        _, said = child.communicate(timeout=30)
    assert server.objects["trainjobs"] == {}
    assert child.returncode == (-number if number == signal.SIGINT else 143), said


@pytest.mark.slow
def test_pods_that_run_the_command_make_what_torchrun_makes(cluster, monkeypatch, tmp_path):
    def script(server, job):
        trainer = job["spec"]["trainer"]
        name = server.pod(job, 0, **RUNNING)
        env = {item["name"]: item["value"] for item in trainer["env"]}
        # As the trainer's torch plugin sets them, but for a name that only a cluster resolves.
        env |= {"PET_NNODES": str(trainer["numNodes"]), "PET_NODE_RANK": "0"}
        env |= {"PET_NPROC_PER_NODE": str(trainer["numProcPerNode"])}
        env |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "29500"}
        done = subprocess.run(
            [sys.executable, *trainer["command"][1:]], env={**os.environ, **env},
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        server.say(name, *done.stderr.splitlines())
        server.pod(job, 0, **ended(done.returncode))
        server.end(job, "Complete" if done.returncode == 0 else "Failed")

    cluster(script)
    job = launch.run("rehearse", RehearsalConfig(), {}, "trainjob:1x2/cpu")
    monkeypatch.setenv("FLOWLOOM_HOME", str(tmp_path / "home"))
    child = launch.run("rehearse", RehearsalConfig(), {}, "torchrun:2")
    assert child.digest == job.digest
    logs = [(result.out_dir.parent / "log.txt").read_text() for result in (job, child)]
    assert logs[0] == logs[1] == "2 processes, OMP_WAIT_POLICY=passive\n"
    assert json.loads((job.out_dir.parent / "result.json").read_text())["digest"] == job.digest
