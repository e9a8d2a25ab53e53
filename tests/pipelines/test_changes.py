"""A run that starts only because data or catalogue changed.

Facts pinned:
- it starts only where the newest run of its pipeline, recipe and overrides, by hand or by a
  schedule, had other data or another catalogue; what that run came to does not matter;
- the same command again starts none; what changes back starts one more.
"""

import pytest

from pipelines.__main__ import main
from tests.pipelines.kfp_server import LABEL, NAME, SCHEDULE, SUBMIT, only


def test_only_changed_sources_start_a_run(kfp_server, machine, capsys):
    early = [*SUBMIT, "--if-changed", "data,catalogue"]
    machine.update(data="aa.dir", catalogue="c1")
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
    machine.update(catalogue="c2")
    assert main([*SUBMIT, "--if-changed", "data"]) == 0
    assert len(kfp_server.runs) == 1
    assert main(early) == 0
    assert "catalogue: the newest run had c1\n" in capsys.readouterr().out
    assert main(early) == 0
    assert len(kfp_server.runs) == 2
    # As it was before: the run that is there is not the newest.
    machine.update(catalogue="c1")
    assert main(early) == 0
    assert main(early) == 0
    names = [run["display_name"] for run in kfp_server.runs.values()]
    assert (len(names), names[2]) == (3, f"{first}-2")


def test_only_a_run_of_the_same_recipe_overrides_and_pipeline_counts(kfp_server, machine):
    early = [*SUBMIT, "--if-changed", "data"]
    machine.update(data="aa.dir")
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
    machine.update(data="aa.dir")
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
    machine.update(data="bb.dir")
    main(early)
    assert len(kfp_server.runs) == 2
    assert len(kfp_server.versions) == 2  # the same package, for other data


@pytest.mark.parametrize("names", ["prompts", "data,", "data catalogue"])
def test_what_cannot_be_compared_is_refused(kfp_server, capsys, names):
    assert main([*SUBMIT, "--if-changed", names]) == 2
    assert "expected some of data,catalogue" in capsys.readouterr().err
    assert not kfp_server.asked
