"""Runs on a server: kfp's real client against a scripted API server.

Facts pinned:
- the same submission finds its run, finished or going; failed, it is tried again under its next
  name; another champion alone makes no other run; what is not of this command is left alone;
- the package is uploaded once per content and data, byte by byte what was compiled (what it asks
  of a cluster: test_clusters); per-step cache settings stay; runs have the cluster's account;
- whatever call fails, before or after it took effect, at once or slowly: nothing is lost, nothing
  doubled;
- errors are one line; a server with several users is given the cluster's namespace.
"""

import pytest

import pipelines.__main__ as command
from pipelines import server as servers
from pipelines.__main__ import main
from tests.pipelines.kfp_server import FAULTS, LABEL, NAME, SCHEDULE, SUBMIT, only


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


def test_the_next_attempt_comes_after_the_last_even_if_one_between_is_archived(kfp_server):
    for _ in range(3):
        main([*SUBMIT, "--new-turn"])
    first, second, _ = kfp_server.runs.values()
    second["storage_state"] = "ARCHIVED"
    main([*SUBMIT, "--new-turn"])
    names = [run["display_name"] for run in kfp_server.runs.values()]
    assert names[3] == f"{first['display_name']}-4"


def test_an_archived_experiment_is_refused(kfp_server, capsys):
    main(SUBMIT)
    only(kfp_server.experiments)["storage_state"] = "ARCHIVED"
    assert main([*SUBMIT, "--new-turn"]) == 2
    assert "experiment flowloom: is archived; restore it" in capsys.readouterr().err
    assert len(kfp_server.runs) == 1


def test_somebody_elses_run_is_not_taken_for_the_one_that_failed_to_start(kfp_server, monkeypatch):
    answer = kfp_server.answer

    def theirs_first(method, path, query, body):
        if (method, path.endswith("/runs")) == ("POST", True) and not kfp_server.runs:
            answer(method, path, query, body | {"description": "by hand"})
            return 500, {"message": "scripted fault"}
        return answer(method, path, query, body)

    monkeypatch.setattr(kfp_server, "answer", theirs_first)
    assert main(SUBMIT) == 0
    descriptions = [run["description"] for run in kfp_server.runs.values()]
    assert descriptions[0] == "by hand"
    assert descriptions[1].startswith("flowloom run ")


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


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("path", ["/experiments$", "/pipelines$", "/upload_version$", "/runs$"])
def test_a_submission_with_a_fault_is_neither_lost_nor_doubled(
    kfp_server, request, path, fault, monkeypatch
):
    if "slow" in fault:
        request.getfixturevalue("impatient")
    kfp_server.fault("POST", path, **FAULTS[fault])
    assert main(SUBMIT) == 0
    kfp_server.settle()
    for things in (kfp_server.experiments, kfp_server.pipelines, kfp_server.versions):
        assert len(things) == 1
    assert len(kfp_server.runs) == 1
    assert kfp_server.faults[0].times == 0


@pytest.mark.parametrize("path", ["/experiments", "/pipelines", "/upload_version"])
def test_what_another_process_created_meanwhile_is_taken(kfp_server, monkeypatch, path):
    answer, seen = kfp_server.answer, []

    def theirs_first(method, asked, query, body):
        if method == "POST" and asked.endswith(path) and not seen:
            seen.append(answer(method, asked, query, body))
        return answer(method, asked, query, body)

    monkeypatch.setattr(kfp_server, "answer", theirs_first)
    assert main(SUBMIT) == 0
    for things in (kfp_server.experiments, kfp_server.pipelines, kfp_server.versions):
        assert len(things) == 1
    assert len(seen) == len(kfp_server.runs) == 1


def test_a_server_that_has_too_much_to_do_is_asked_again(kfp_server):
    kfp_server.fault("POST", "/runs$", status=429)
    kfp_server.fault("GET", "/experiments$", status=429)
    assert main(SUBMIT) == 0
    assert len(kfp_server.runs) == 1


@pytest.mark.parametrize("status", [408, 504])
def test_a_creation_that_timed_out_is_not_repeated(kfp_server, capsys, status):
    kfp_server.fault("POST", "/runs$", status=status)
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


def test_of_several_users_it_is_the_one_of_the_clusters_namespace(kfp_server, monkeypatch):
    kfp_server.multi_user = True
    assert main(SUBMIT) == 0
    assert only(kfp_server.experiments)["namespace"] == "flowloom"
    assert only(kfp_server.pipelines)["namespace"] == "flowloom"
    monkeypatch.setenv("KFP_NAMESPACE", "team")
    assert main([*SUBMIT, "--experiment", "other"]) == 0
    assert main([*SUBMIT, "--experiment", "third", "--namespace", "ours"]) == 0
    found = [made["namespace"] for made in kfp_server.experiments.values()]
    assert found == ["flowloom", "team", "ours"]


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
    assert main([*SUBMIT, "--host", "127.0.0.1:9"]) == 2
    assert "server https://127.0.0.1:9: connecting: " in capsys.readouterr().err


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
