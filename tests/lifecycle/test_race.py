"""Twenty processes promote at once.

Facts pinned: whether they share a home or nothing but the registry, one candidate becomes the
champion, nineteen are refused because of it, and the journal and the tags record all of them.
"""

import pytest

from flowloom.lifecycle import registry
from flowloom.runs import home
from tests.lifecycle.race import NUM_PROCESSES, winner_of


@pytest.fixture
def versions(tracked):
    """Registered versions with no files: a promotion reads none."""
    registry_tags = {"flowloom.digest": "d.dir", "flowloom.expected": ""}
    tracked.create_registered_model(registry.NAME)
    experiment = tracked.create_experiment("race", (home() / "files").as_uri())
    run_id = tracked.create_run(experiment).info.run_id
    source = f"runs:/{run_id}/model"
    made = [
        tracked.create_model_version(registry.NAME, source, run_id, tags=registry_tags)
        for _ in range(NUM_PROCESSES)
    ]
    return [str(version.version) for version in made]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("shared", ["home", "homes"])
def test_twenty_promotions_leave_one_champion(tracked, versions, evaluation, shared):
    winner = winner_of(shared, versions, evaluation)
    assert registry.champion().version == winner

    history = registry.history()
    assert sorted(row["version"] for row in history) == sorted(versions)
    assert [row["event"] for row in history].count("promote") == 1
    refused = [row for row in history if row["event"] == "refuse"]
    assert len(refused) == NUM_PROCESSES - 1
    assert {row["reason"] for row in refused} == {f"champion: {winner} = none: FAILS"}
    assert {row["previous"] for row in refused} == {winner}
    for version in versions:
        tags = tracked.get_model_version(registry.NAME, version).tags
        assert tags["flowloom.decision"] == ("promoted" if version == winner else "refused")
