"""Runs and schedules on a server: kfp's real client against a scripted API server.

Facts pinned:
- the same submission finds its run, finished or going; failed, it is tried again under its next
  name; another champion alone makes no other run; what is not of this command is left alone;
- the package is uploaded once per content and data, byte by byte what was compiled (what it asks
  of a cluster: test_clusters); per-step cache settings stay; runs have the cluster's account;
- `--if-changed` starts a run only where the newest of its pipeline, recipe and overrides, by hand
  or by a schedule, had other data or another catalogue;
- waiting says each state, survives an outage, and names the task that failed of itself;
- whatever call fails, before or after it took effect, at once or slowly: nothing is lost, nothing
  doubled;
- a schedule is declared, replaced, switched and deleted, and never are two of it enabled, not even
  where a replacement was interrupted;
- errors are one line; cron has five fields or six.
"""

import pytest

import pipelines.__main__ as command
from pipelines import cluster, clusters, cron
from pipelines import server as servers
from pipelines.__main__ import compile_to, main
from tests.pipelines.kfp_server import KfpServer

NAME = "continuous_training"
LABEL = "continuous_training-demo"
SUBMIT = ["submit", NAME]
SCHEDULE = ["schedule", NAME, "--cron", "0 3 * * *"]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    path = tmp_path_factory.mktemp("compiled") / "package.yaml"
    compile_to(NAME, path)
    return path.read_bytes()


@pytest.fixture
def machine(monkeypatch, tmp_path, package):
    """No settings of this machine's, no waiting, one compilation, champion 3."""
    import kfp

    from flowloom.lifecycle import turns

    for name in ("KFP_HOST", "KFP_TOKEN", "KFP_NAMESPACE", "KF_PIPELINES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("KF_PIPELINES_UI_ENDPOINT", clusters.CLUSTER, clusters.LAUNCH):
        monkeypatch.delenv(name, raising=False)
    overlay = tmp_path / "overlays" / "dev" / "images"
    overlay.mkdir(parents=True)
    (overlay / "kustomization.yaml").write_text("images: []")
    monkeypatch.setattr(clusters, "OVERLAYS", tmp_path / "overlays")
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    monkeypatch.setattr(servers, "PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(cluster, "POLL_S", 0.0)
    monkeypatch.setattr(command, "_champion", lambda: "3")
    monkeypatch.setattr(command, "compile_to", lambda name, out: out.write_bytes(package))
    fields = turns.key(NAME, "demo", {})

    def key(name, recipe, overrides):
        return {**fields, "recipe": recipe, "overrides": overrides}

    monkeypatch.setattr(turns, "key", key)
    return fields


@pytest.fixture
def kfp_server(machine, monkeypatch):
    with KfpServer() as server:
        monkeypatch.setenv("KFP_HOST", server.url)
        yield server
        assert not server.two_enabled


def only(things):
    (thing,) = things.values()
    return thing


def test_a_submission_is_found_again(kfp_server, capsys):
    assert main([*SUBMIT, "--set", "promote.margin=0.01"]) == 0
    run = only(kfp_server.runs)
    started, link = capsys.readouterr().out.splitlines()
    assert started == f"run {run['display_name']}: started"
    assert run["display_name"].startswith(f"{LABEL}-")
    assert link == f"{kfp_server.url}/#/runs/details/{run['run_id']}"
    assert only(kfp_server.experiments)["display_name"] == "flowloom"
    assert only(kfp_server.pipelines)["display_name"] == "continuous-training"
    overrides = {"promote": {"margin": 0.01}}
    expected = {"recipe": "demo", "overrides": overrides, "champion": "3"}
    assert run["runtime_config"]["parameters"] == expected
    version = only(kfp_server.versions)
    assert run["pipeline_version_reference"] == {
        "pipeline_id": version["pipeline_id"],
        "pipeline_version_id": version["pipeline_version_id"],
    }

    asked = len(kfp_server.asked)
    assert main([*SUBMIT, "--set", "promote.margin=0.01"]) == 0
    assert capsys.readouterr().out.startswith(f"run {run['display_name']}: there already, PENDING")
    assert {method for method, _ in kfp_server.asked[asked:]} == {"GET"}
    assert main(SUBMIT) == 0  # other arguments
    assert len(kfp_server.runs) == 2
    assert kfp_server.count("POST", "upload_version") == 1


def test_another_champion_is_no_other_submission(kfp_server, monkeypatch):
    main(SUBMIT)
    monkeypatch.setattr(command, "_champion", lambda: "4")
    only(kfp_server.runs)["state"] = "SUCCEEDED"
    assert main([*SUBMIT, "--wait"]) == 0
    assert only(kfp_server.runs)["runtime_config"]["parameters"]["champion"] == "3"


def test_changed_sources_are_another_version_and_run(kfp_server, monkeypatch, package):
    main(SUBMIT)
    changed = package + b"# changed\n"
    monkeypatch.setattr(command, "compile_to", lambda name, out: out.write_bytes(changed))
    main(SUBMIT)
    assert len(kfp_server.runs) == len(kfp_server.versions) == 2
    assert len(kfp_server.pipelines) == 1
    assert sorted(kfp_server.packages.values()) == sorted([package, changed])


def test_what_is_uploaded_is_what_was_compiled(kfp_server, package):
    main(SUBMIT)
    assert only(kfp_server.packages) == package
    run = only(kfp_server.runs)
    assert run["service_account"] == "flowloom-steps"
    assert "enable_caching" not in str(run)


def changed(machine, **fields):
    """Have what is submitted from now on be of other data or another catalogue."""
    machine.update(fields)


def test_only_changed_sources_start_a_run(kfp_server, machine, capsys):
    early = [*SUBMIT, "--if-changed", "data,catalogue"]
    changed(machine, data="aa.dir", catalogue="c1")
    assert main(early) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["data: the newest run had none", "catalogue: the newest run had none"]
    assert only(kfp_server.versions)["description"] == "data aa.dir, catalogue c1"
    first = only(kfp_server.runs)["display_name"]

    only(kfp_server.runs)["state"] = "FAILED"  # somebody is told so; it is not a reason
    assert main([*early, "--wait"]) == 0
    assert capsys.readouterr().out == (
        f"{LABEL}: the newest run had the same data,catalogue; none is started\n"
    )
    changed(machine, catalogue="c2")
    assert main([*SUBMIT, "--if-changed", "data"]) == 0
    assert len(kfp_server.runs) == 1
    assert main(early) == 0
    assert "catalogue: the newest run had c1\n" in capsys.readouterr().out
    assert main(early) == 0
    assert len(kfp_server.runs) == 2
    # As it was before: the run that is there is not the newest.
    changed(machine, catalogue="c1")
    assert main(early) == 0
    assert main(early) == 0
    names = [run["display_name"] for run in kfp_server.runs.values()]
    assert (len(names), names[2]) == (3, f"{first}-2")


def test_only_a_run_of_the_same_recipe_overrides_and_pipeline_counts(kfp_server, machine):
    early = [*SUBMIT, "--if-changed", "data"]
    changed(machine, data="aa.dir")
    main([*SUBMIT, "--set", "promote.margin=0.01"])
    main([*SUBMIT, "--recipe", "smoke"])
    main(early)
    assert len(kfp_server.runs) == 3
    main(early)
    assert len(kfp_server.runs) == 3
    for run in kfp_server.runs.values():  # now they are of another pipeline
        run["pipeline_version_reference"] = {"pipeline_version_id": "other"}
    main(early)
    assert len(kfp_server.runs) == 4


def test_the_run_of_a_schedule_counts_even_if_that_was_replaced(kfp_server, machine):
    changed(machine, data="aa.dir")
    main(SCHEDULE)
    job = only(kfp_server.recurring)
    kept = ("experiment_id", "pipeline_version_reference", "runtime_config")
    kfp_server.runs["theirs"] = {name: job[name] for name in kept} | {
        "run_id": "theirs",
        "display_name": "Run of a schedule",
        "created_at": "2026-02-01T00:00:00Z",
    }
    main(["schedule", NAME, "--delete"])
    early = [*SUBMIT, "--if-changed", "data"]
    main(early)
    assert list(kfp_server.runs) == ["theirs"]
    changed(machine, data="bb.dir")
    main(early)
    assert len(kfp_server.runs) == 2
    assert len(kfp_server.versions) == 2  # the same package, for other data


def test_other_data_replaces_the_schedule(kfp_server, machine, capsys):
    main(SCHEDULE)
    changed(machine, data="bb.dir")
    main(SCHEDULE)
    only(kfp_server.recurring)
    assert "replaced, enabled" in capsys.readouterr().out


def test_a_new_turn_is_another_run_of_the_next_name(kfp_server, capsys):
    main(SUBMIT)
    main([*SUBMIT, "--new-turn"])
    first, second = (run["display_name"] for run in kfp_server.runs.values())
    assert second == f"{first}-2"
    capsys.readouterr()
    main(SUBMIT)
    assert f"run {second}: there already" in capsys.readouterr().out
    assert len(kfp_server.runs) == 2


def test_a_failed_run_is_tried_again_and_an_archived_one_forgotten(kfp_server, capsys):
    main(SUBMIT)
    run = only(kfp_server.runs)
    run["state"] = "FAILED"
    capsys.readouterr()
    main(SUBMIT)
    out = capsys.readouterr().out
    assert f"run {run['display_name']}: FAILED; another attempt follows" in out
    assert f"run {run['display_name']}-2: started" in out
    for run in kfp_server.runs.values():
        run["storage_state"] = "ARCHIVED"
    main(SUBMIT)
    names = [run["display_name"] for run in kfp_server.runs.values()]
    assert names[2] == names[0]


def test_a_name_that_is_taken_is_refused(kfp_server, capsys):
    main([*SUBMIT, "--run-name", "nightly"])
    main([*SUBMIT, "--run-name", "nightly"])
    assert only(kfp_server.runs)["display_name"] == "nightly"
    for arguments in ([*SUBMIT, "--set", "promote.margin=0.01"], SUBMIT):
        only(kfp_server.runs)["description"] *= arguments is not SUBMIT  # or somebody else's
        assert main([*arguments, "--run-name", "nightly"]) == 2
        error = capsys.readouterr().err
        assert "run nightly: is there with other arguments, data or code" in error
    assert len(kfp_server.runs) == 1


def test_listings_are_read_to_their_last_page(kfp_server, capsys):
    kfp_server.page = 1
    for _ in range(3):
        main([*SUBMIT, "--new-turn"])
    names = [run["display_name"] for run in kfp_server.runs.values()]
    assert names == [names[0], f"{names[0]}-2", f"{names[0]}-3"]
    capsys.readouterr()
    main(SUBMIT)
    assert f"run {names[2]}: there already" in capsys.readouterr().out


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


FAULTS = {
    "failed": {},
    "failed after it was done": {"done": True},
    "failed twice": {"times": 2},
    "cut off": {"drop": True},
    "cut off after it was done": {"drop": True, "done": True},
    "gateway timed out after it was done": {"status": 504, "done": True},
    "slow, and done after the client left": {"delay_s": 1.0, "done": True},
}
SLOW = (2.0, 0.5)
"""Timeouts shorter than the slow answer; the pauses add up to more than it takes."""


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(servers, "TIMEOUTS_S", SLOW)
    monkeypatch.setattr(servers, "PAUSES_S", (0.3, 0.6, 0.9))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("path", ["/experiments$", "/pipelines$", "/upload_version$", "/runs$"])
def test_a_submission_with_a_fault_is_neither_lost_nor_doubled(
    kfp_server, request, path, fault, monkeypatch
):
    if "slow" in fault:
        request.getfixturevalue("impatient")
    kfp_server.fault("POST", path, **FAULTS[fault])
    assert main(SUBMIT) == 0
    for things in (kfp_server.experiments, kfp_server.pipelines, kfp_server.versions):
        assert len(things) == 1
    assert len(kfp_server.runs) == 1
    assert kfp_server.faults[0].times == 0


def test_a_creation_that_timed_out_is_not_repeated(kfp_server, capsys):
    kfp_server.fault("POST", "/runs$", status=504)
    assert main(SUBMIT) == 2
    assert "starting run" in capsys.readouterr().err
    assert kfp_server.count("POST", "/runs$") == 1
    assert main(SUBMIT) == 0
    assert len(kfp_server.runs) == 1


def test_a_server_that_keeps_failing_is_given_up(kfp_server, capsys):
    kfp_server.fault("POST", "/runs$", times=99)
    assert main(SUBMIT) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pipelines: server {kfp_server.url}: starting run {LABEL}-")
    assert error.endswith(": 500 Internal Server Error: scripted fault\n")
    assert kfp_server.count("POST", "/runs$") == 1 + len(servers.PAUSES_S)
    assert not kfp_server.runs


def test_a_refusal_is_not_repeated(kfp_server, capsys):
    kfp_server.fault("POST", "/runs$", status=400, times=99)
    assert main(SUBMIT) == 2
    assert capsys.readouterr().err.endswith(": 400 Bad Request: scripted fault\n")
    assert kfp_server.count("POST", "/runs$") == 1


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, "401 Unauthorized: scripted fault; expected a token that it knows in KFP_TOKEN"),
        (403, "403 Forbidden: scripted fault; expected a token (KFP_TOKEN) and a --namespace"),
        (404, "404 Not Found: scripted fault; expected a Kubeflow Pipelines server with API v2"),
        (500, "500 Internal Server Error: scripted fault"),
    ],
)
def test_a_connection_that_is_refused_is_one_line(kfp_server, capsys, status, expected):
    kfp_server.fault("GET", "/healthz", status=status, times=99)
    for arguments in (SUBMIT, SCHEDULE):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"pipelines: server {kfp_server.url}: connecting: {expected}")
        assert error.count("\n") == 1


def test_a_token_is_sent(kfp_server, monkeypatch):
    kfp_server.token = "secret"
    assert main(SUBMIT) == 2
    monkeypatch.setenv("KFP_TOKEN", "secret")
    assert main(SUBMIT) == 0


def test_a_page_that_is_no_api_is_one_line(kfp_server, capsys, monkeypatch):
    monkeypatch.setattr(kfp_server, "answer", lambda *_: (200, "<html>Sign in</html>"))
    assert main(SUBMIT) == 2
    error = capsys.readouterr().err
    assert "its answer has no id" in error
    assert error.count("\n") == 1


def test_no_server_is_one_line(machine, capsys, monkeypatch):
    for arguments in (SUBMIT, SCHEDULE):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "server: got none, expected --host URL or KFP_HOST" in error
        assert main([*arguments, "--host", "http://127.0.0.1:9"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("pipelines: server http://127.0.0.1:9: connecting: ")
        assert "refused" in error
        assert error.count("\n") == 1


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
    assert said == f"schedule {LABEL}: created, enabled, 0 0 3 * * *"
    assert link == f"{kfp_server.url}/#/recurringrun/details/{job['recurring_run_id']}"

    asked = len(kfp_server.asked)
    assert job["service_account"] == "flowloom-steps"
    assert main(["schedule", NAME]) == 0  # the default is the same, with its seconds
    said = capsys.readouterr().out.splitlines()[0]
    assert said == f"schedule {LABEL}: there already, enabled, 0 0 3 * * *"
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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0 3 * * *", "0 0 3 * * *"),
        ("30 0 3 * * *", "30 0 3 * * *"),
        ("  */15  8-18 * * mon-fri ", "0 */15 8-18 * * mon-fri"),
        ("0 0 12 ? JAN,Jul 1-5/2", "0 0 12 ? JAN,Jul 1-5/2"),
        ("5/10 * * * *", "0 5/10 * * * *"),
        ("0 0 29 2 *", "0 0 0 29 2 *"),
        ("0 0 31 2 mon", "0 0 0 31 2 mon"),  # Mondays of February
    ],
)
def test_cron_is_completed(given, expected):
    assert cron.six_fields(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "expected 5 fields"),
        ("0 3 * *", "expected 5 fields"),
        ("0 0 3 * * * 2026", "expected 5 fields"),
        ("@daily", "expected 5 fields"),
        ("60 3 * * *", "cron: minute of '60 3 [*] [*] [*]': expected 0 to 59"),
        ("0 24 * * *", "hour of .* 0 to 23"),
        ("60 0 3 * * *", "second of .* 0 to 59"),
        ("0 0 0 * *", "day of month of .* 1 to 31"),
        ("0 0 * 13 *", "month of .* 1 to 12"),
        ("0 0 * * 7", "day of week of .* 0 to 6"),
        ("0 0 * * fri-mon", "day of week of .* rising"),
        ("*/0 * * * *", "minute of .* a step of 1 or more"),
        ("5/ * * * *", "minute of .* a step of 1 or more"),
        ("1,,2 * * * *", "minute of .* numbers"),
        ("1-2-3 * * * *", "minute of .* numbers"),
        ("mon * * * *", "minute of .* numbers"),
        ("0 0 L * *", "day of month of .* numbers"),
        ("0 0 30 2 *", "a day that its months have"),
        ("0 0 31 4,6 ?", "a day that its months have"),
    ],
)
def test_bad_cron_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        cron.six_fields(given)


def test_a_pipeline_is_given_what_it_takes(machine, monkeypatch):
    from types import SimpleNamespace

    from kfp import dsl

    @dsl.component(base_image="any", install_kfp_package=False)
    def step(recipe: str):
        """Do nothing."""

    @dsl.pipeline(name="short")
    def short(recipe: str = "demo", other: int = 1):
        """No champion."""
        step(recipe=recipe)

    monkeypatch.setattr(command, "load", lambda name: short)
    options = SimpleNamespace(name="short", recipe="smoke")
    assert command._arguments(options, {}, "3") == {"recipe": "smoke"}


def test_a_turn_is_new_or_has_a_number(capsys):
    with pytest.raises(SystemExit):
        main(["run", NAME, "--new-turn", "--turn", "2"])
    assert "not allowed with" in capsys.readouterr().err
    assert main(["run", NAME, "--turn", "2"]) == 2
    assert "turn: got 2, expected 1 (there is none yet)" in capsys.readouterr().err
