"""Facts: an API that is away for a while, forgets, refuses for a moment or loses an answer changes
nothing: the job is made once and each line of its log shown once; one that stays away ends the call
and not the job; a refusal, or no cluster at all, is said at once."""

import time

import pytest

from flowloom.launch import api, trainjob
from flowloom.launch.errors import LaunchError
from tests.launch.api_server import Fault
from tests.launch.scripts import RUNNING, carry_out, ended, num_made, start, well

JOBS = "/trainjobs"
MADE = f"POST .*{JOBS}"


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(MADE, status=503, times=2), Fault(r"GET .*/pods$", status=429)],
        [Fault(MADE, lost=True)],  # made, but the answer never comes: found, not made twice
        [Fault("watch", status=500), Fault(f"GET .*{JOBS}/", times=3)],
        [Fault("DELETE", status=503), Fault("DELETE", times=1)],
        [Fault("/log", times=2), Fault("/log", status=500)],
    ],
    ids=["refused", "lost answer", "watch and reads", "deletion", "logs"],
)
def test_faults_that_pass_change_nothing(cluster, capfd, faults):
    server = cluster(well)
    server.faults = faults
    assert start().metrics == {"rehearse/total": 0.75}
    assert sum(fault.times for fault in faults) == 0
    assert len(server.objects["trainjobs"]) == 0
    assert server.made == 1
    err = capfd.readouterr().err
    assert err.count("step 1\n") == err.count("step 2\n") == 1


def test_an_outage_a_cut_watch_and_a_forgotten_past_are_survived(cluster, capfd):
    def script(server, job):
        name = server.pod(job, 0, **RUNNING)
        server.say(name, "step 1")
        time.sleep(0.2)
        server.forget()
        server.cut()
        time.sleep(0.2)
        with server.away():
            server.say(name, "step 2")
            time.sleep(0.5)
        server.say(name, "step 3")
        carry_out(job)
        server.pod(job, 0, **ended(0))
        server.end(job, "Complete")

    server = cluster(script)
    assert start().metrics == {"rehearse/total": 0.75}
    err = capfd.readouterr().err
    assert [err.count(f"step {k}\n") for k in (1, 2, 3)] == [1, 1, 1]
    assert "no answer" in err
    assert server.gone > 0
    assert server.made == 1


def test_an_api_that_stays_away_ends_the_call_but_not_the_job(cluster, monkeypatch):
    monkeypatch.setattr(trainjob, "OUTAGE_S", 0.3)

    def script(server, job):
        server.pod(job, 0, **RUNNING)
        time.sleep(0.1)
        server.faults = [Fault("", status=500, times=10**6)]
        server.cut()

    server = cluster(script)
    said = r"API has been away for \d+ s .*TrainJob flowloom/flowloom-rehearse-\w+ may still run"
    with pytest.raises(LaunchError, match=said):
        start()
    assert len(server.objects["trainjobs"]) == 1
    # The step is tried again later: the job has ended well meanwhile.
    server.faults = []
    well(server, next(iter(server.objects["trainjobs"].values())))
    assert start().metrics == {"rehearse/total": 0.75}
    assert server.made == 1


def test_a_refusal_is_said_at_once(cluster):
    server = cluster(well)
    server.faults = [Fault(MADE, status=403, times=9)]
    with pytest.raises(api.ApiError, match=r"POST .*trainjobs: 403 status 403") as error:
        start()
    assert error.value.status == 403
    assert num_made(server) == 1


def test_without_a_cluster_there_is_one_line(rehearse, monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(api.ApiError, match="Kubernetes: connect: no cluster to talk to"):
        start()
    (tmp_path / "none").write_text("{contexts: [")
    with pytest.raises(api.ApiError, match=r"connect: /.*/none: got .*, expected a kubeconfig$"):
        start()


def test_half_a_line_of_a_watch_is_no_answer(cluster, monkeypatch):
    cluster(well)
    connected = api.connect()
    monkeypatch.setattr(connected, "_lines", lambda *asked: iter(['{"type": "MODI']))
    with pytest.raises(api.ApiError, match=r"watch /api/v1/.*: half an answer") as error:
        list(connected.watch(api.PODS, "", "1", 1))
    assert error.value.passes
