"""Schedules on a server: kfp's real client against a scripted API server.

Facts pinned:
- a schedule is declared once, with the cluster's account, one run at a time and no catching up;
- it is replaced, switched, listed and deleted, and never are two of it enabled, not even where a
  replacement was interrupted; schedules of others stay;
- whatever call fails, before or after it took effect, at once or slowly: nothing is lost, nothing
  doubled;
- usage errors are one line and ask no server.
"""

import dataclasses

import pytest

from pipelines import clusters
from pipelines import server as servers
from pipelines.__main__ import main
from tests.pipelines.kfp_server import FAULTS, LABEL, NAME, SCHEDULE, only


def test_a_schedule_is_declared_once(kfp_server, capsys):
    assert main(SCHEDULE) == 0
    job = only(kfp_server.recurring)
    assert (job["display_name"], job["mode"]) == (LABEL, "ENABLE")
    assert job["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * *"}}
    assert (job["max_concurrency"], job["no_catchup"]) == ("1", True)
    # A schedule outlives champions: each run takes the one of its day.
    assert job["runtime_config"]["parameters"]["champion"] == "auto"
    assert job["pipeline_version_reference"]["pipeline_version_id"] in kfp_server.versions
    said, link = capsys.readouterr().out.splitlines()
    assert said == f"schedule {LABEL}: created, enabled, 0 0 3 * * * UTC"
    assert link == f"{kfp_server.url}/#/recurringrun/details/{job['recurring_run_id']}"

    asked = len(kfp_server.asked)
    assert job["service_account"] == "flowloom-steps"
    assert main(["schedule", NAME]) == 0  # the default is the same, with its seconds
    said = capsys.readouterr().out.splitlines()[0]
    assert said == f"schedule {LABEL}: there already, enabled, 0 0 3 * * * UTC"
    assert {method for method, _ in kfp_server.asked[asked:]} == {"GET"}


@pytest.mark.parametrize(
    "changed",
    [
        ["schedule", NAME, "--cron", "0 4 * * *"],
        [*SCHEDULE, "--set", "promote.margin=0.01"],
    ],
)
def test_a_changed_schedule_replaces_the_old_one(kfp_server, capsys, changed):
    main(SCHEDULE)
    old = only(kfp_server.recurring)["recurring_run_id"]
    assert main(changed) == 0
    job = only(kfp_server.recurring)
    assert (job["recurring_run_id"] != old, job["mode"]) == (True, "ENABLE")
    assert "replaced, enabled" in capsys.readouterr().out


def test_another_account_is_another_schedule(kfp_server, monkeypatch):
    main(SCHEDULE)
    dev = dataclasses.replace(clusters.CLUSTERS["dev"], service_account="other")
    monkeypatch.setitem(clusters.CLUSTERS, "dev", dev)
    main(SCHEDULE)
    assert only(kfp_server.recurring)["service_account"] == "other"


def test_of_two_that_are_the_same_the_older_stays(kfp_server):
    main(SCHEDULE)
    job = only(kfp_server.recurring)
    made = "2025-01-01T00:00:00Z"
    again = {"recurring_run_id": "again", "created_at": made, "mode": "DISABLE"}
    kfp_server.recurring["again"] = job | again
    assert main(SCHEDULE) == 0
    kept = only(kfp_server.recurring)
    assert (kept["recurring_run_id"], kept["mode"]) == ("again", "ENABLE")


def test_schedules_of_others_stay(kfp_server, capsys):
    main(SCHEDULE)
    main([*SCHEDULE, "--recipe", "smoke"])
    job = next(iter(kfp_server.recurring.values()))
    theirs = job | {"recurring_run_id": "theirs", "description": "by hand"}
    kfp_server.recurring["theirs"] = dict(theirs)
    for arguments in (["--cron", "0 5 * * *"], ["--disable"], ["--delete"]):
        assert main(["schedule", NAME, *arguments]) == 0
        assert f"schedule {LABEL}: theirs is not ours and stays" in capsys.readouterr().out
    assert kfp_server.recurring["theirs"] == theirs
    names = sorted(job["display_name"] for job in kfp_server.recurring.values())
    assert names == [LABEL, f"{NAME}-smoke"]


def test_a_schedule_is_switched_listed_and_deleted(kfp_server, capsys):
    main([*SCHEDULE, "--disable"])
    job = only(kfp_server.recurring)
    assert job["mode"] == "DISABLE"
    capsys.readouterr()

    def said(*arguments):
        assert main(["schedule", *arguments]) == 0
        return capsys.readouterr().out

    assert said(NAME, "--disable") == f"schedule {LABEL}: already disabled\n"
    assert said(NAME, "--enable") == f"schedule {LABEL}: now enabled\n"
    assert job["mode"] == "ENABLE"
    listed = said("--list")
    assert listed.split() == said(NAME, "--list").split()
    assert listed.split()[:2] == [LABEL, "enabled"]
    assert "0 0 3 * * *" in listed
    assert said(NAME, "--disable") == f"schedule {LABEL}: now disabled\n"
    assert "now enabled, 0 0 3 * * *" in said(*SCHEDULE[1:])  # a declaration means it
    assert said(NAME, "--delete") == f"schedule {LABEL}: deleted\n"
    assert said(NAME, "--delete") == f"schedule {LABEL}: there is none\n"
    assert said("--list") == ""
    assert main(["schedule", NAME, "--enable"]) == 2
    assert "there is none; --cron declares it" in capsys.readouterr().err
    assert len(kfp_server.experiments) == 1


def test_asking_for_schedules_makes_nothing(kfp_server):
    assert main(["schedule", "--list"]) == 0
    assert main(["schedule", NAME, "--delete"]) == 0
    assert not kfp_server.experiments
    assert not kfp_server.pipelines


@pytest.mark.parametrize("fault", FAULTS)
def test_a_schedule_with_a_fault_is_neither_lost_nor_doubled(kfp_server, request, fault):
    if "slow" in fault:
        request.getfixturevalue("impatient")
    kfp_server.fault("POST", "/recurringruns$", **FAULTS[fault])
    assert main(SCHEDULE) == 0
    kfp_server.settle()
    assert only(kfp_server.recurring)["mode"] == "ENABLE"


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/recurringruns$"), ("DELETE", "/recurringruns/"), ("POST", ":enable$")],
)
@pytest.mark.parametrize("fault", ["failed after it was done", "cut off after it was done"])
@pytest.mark.parametrize("lasting", [False, True])
def test_a_replacement_that_is_interrupted_goes_on(
    kfp_server, capsys, method, path, fault, lasting
):
    """The call fails once, or until the command gives up; it took effect or not."""
    main(SCHEDULE)
    done = not lasting
    options = FAULTS[fault] | {"done": done, "times": 1 if done else 1 + len(servers.PAUSES_S)}
    kfp_server.fault(method, path, **options)
    assert main(["schedule", NAME, "--cron", "0 4 * * *"]) == (2 if lasting else 0)
    if lasting:
        assert kfp_server.recurring  # the old one, or the new one
        assert main(["schedule", NAME, "--cron", "0 4 * * *"]) == 0
    job = only(kfp_server.recurring)
    assert (job["mode"], job["trigger"]["cron_schedule"]["cron"]) == ("ENABLE", "0 0 4 * * *")


def test_half_a_replacement_is_not_enabled(kfp_server, capsys):
    main(SCHEDULE)
    kfp_server.fault("DELETE", "/recurringruns/", times=99)
    assert main(["schedule", NAME, "--cron", "0 4 * * *"]) == 2
    assert len(kfp_server.recurring) == 2
    assert main(["schedule", NAME, "--enable"]) == 2
    assert "as a replacement was interrupted" in capsys.readouterr().err
    kfp_server.faults.clear()
    assert main(["schedule", NAME, "--disable"]) == 0
    assert {job["mode"] for job in kfp_server.recurring.values()} == {"DISABLE"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cron", "every day"], "cron: got 'every day', expected 5 fields"),
        ([NAME, "--list", "--cron", "0 3 * * *"], "schedule: got --cron or --set beside"),
        ([NAME, "--disable", "--set", "promote.margin=0.1"], "schedule: got --cron or --set"),
        (["--delete"], "NAME: got none, expected one of"),
        ([NAME, "--set", "promote.margins=1"], "promote.margins: unknown field"),
    ],
)
def test_usage_errors_ask_no_server(kfp_server, capsys, arguments, message):
    given = arguments if arguments[0] in (NAME, "--delete") else [NAME, *arguments]
    assert main(["schedule", *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not kfp_server.asked


def test_other_data_replaces_the_schedule(kfp_server, machine, capsys):
    main(SCHEDULE)
    machine.update(data="bb.dir")
    main(SCHEDULE)
    only(kfp_server.recurring)
    assert "replaced, enabled" in capsys.readouterr().out
