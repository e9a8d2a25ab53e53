"""Waiting for a run on a server.

Facts pinned:
- each state is said once, and what failed of itself is named, not what it made fail;
- waiting ends at its limit, and survives an outage, but not for ever;
- an interrupt leaves the run as it is.
"""

import pytest

from pipelines import cluster
from pipelines.__main__ import main
from tests.pipelines.kfp_server import SUBMIT, only


def test_waiting_says_each_state(kfp_server, capsys):
    kfp_server.script("PENDING", "PENDING", "RUNNING", "RUNNING", "SUCCEEDED")
    assert main([*SUBMIT, "--wait"]) == 0
    lines = capsys.readouterr().out.splitlines()
    states = [line.split(": ")[1].split(" ")[0] for line in lines if " after " in line]
    assert states == ["RUNNING", "SUCCEEDED"]


def task(ident, name, state="FAILED", parent=None, children=(), message=None):
    error = {"error": {"code": 13, "message": message}} if message else {}
    given = {"task_id": ident, "display_name": name, "state": state, "pod_name": f"pod-{ident}"}
    if parent:
        given["parent_task_id"] = parent
    given["child_tasks"] = [{"pod_name": f"pod-{child}"} for child in children]
    return given | error


@pytest.mark.parametrize("linked", ["parents", "children"])
def test_a_failed_run_names_the_task_that_failed_of_itself(kfp_server, capsys, linked):
    down = linked == "children"
    tasks = [
        task("1", "root", children="234" if down else ""),
        task("2", "build-pairs", "SUCCEEDED", None if down else "1"),
        task("3", "train-sft", "FAILED", None if down else "1", "4" if down else ""),
        task("4", "executor", "FAILED", None if down else "3", message="exit code\n137"),
    ]
    if down:
        tasks[0]["child_tasks"] = [{"pod_name": "pod-2"}, {"pod_name": "pod-3"}]
    failed = {"state": "FAILED", "run_details": {"task_details": tasks}}
    kfp_server.script("RUNNING", failed)
    assert main([*SUBMIT, "--wait"]) == 1
    name = only(kfp_server.runs)["display_name"]
    expected = f"pipelines: run {name} FAILED: train-sft/executor: exit code 137\n"
    assert capsys.readouterr().err == expected


def test_a_run_that_failed_before_any_task_says_why(kfp_server, capsys):
    kfp_server.script({"state": "FAILED", "error": {"code": 3, "message": "quota:\nno room"}})
    assert main([*SUBMIT, "--wait"]) == 1
    assert capsys.readouterr().err.endswith(" FAILED: quota: no room\n")


def test_waiting_ends_at_its_limit(kfp_server, capsys):
    kfp_server.script("RUNNING")
    assert main([*SUBMIT, "--wait", "--timeout-s", "0.05"]) == 2
    assert "RUNNING after 0.05 s of waiting; it goes on" in capsys.readouterr().err


def test_an_interrupted_wait_leaves_the_run(kfp_server, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "wait", interrupt)
    with pytest.raises(SystemExit) as ended:
        main([*SUBMIT, "--wait"])
    assert ended.value.code == cluster.INTERRUPTED
    name = only(kfp_server.runs)["display_name"]
    assert f"run {name}: goes on; the same command waits again\n" in capsys.readouterr().out


def test_waiting_survives_an_outage_but_not_for_ever(kfp_server, capsys, monkeypatch):
    kfp_server.script("RUNNING", "SUCCEEDED")
    kfp_server.fault("GET", "/runs/", status=503, times=10)
    assert main([*SUBMIT, "--wait"]) == 0
    kfp_server.fault("GET", "/runs/", status=503, times=10)
    monkeypatch.setattr(cluster, "OUTAGE_S", -1.0)
    assert main([*SUBMIT, "--wait"]) == 2
    assert "503 Service Unavailable: scripted fault" in capsys.readouterr().err
