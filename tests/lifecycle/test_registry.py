"""Register, promote, roll back.

Facts pinned:
- the same parts give the same folder and one version, also when the process died in between, and
  another one where they were compared with another champion;
- promotion is a compare-and-swap: a champion that changed meanwhile refuses, and is recorded,
  also where the other machine shares nothing but the registry;
- every decision is in the journal with all its numbers, for any machine to read;
- rollback goes back through champions in order; what was refused was never one;
- an alias that a person moved is right, one that a dying process left behind is mended;
- a registered folder comes back byte by byte, and a missing registry gives one line.
"""

import json
import shutil

import pytest
from mlflow.exceptions import MlflowException

from flowloom.cli import main
from flowloom.lifecycle import journal, registry
from flowloom.lifecycle.config import GateConfig
from flowloom.lifecycle.gate import gate
from flowloom.runs import folder_digest, home

CONFIG = GateConfig()


def aliases(client):
    found = client.get_registered_model(registry.NAME).aliases
    return {alias: str(version) for alias, version in found.items()}


@pytest.fixture
def three(tracked, make_parts):
    """Three registered versions: the first two compared with nobody, the third with version 1."""
    versions = [registry.register(make_parts(name, name.encode()))[1] for name in ("a", "b")]
    versions.append(registry.register(make_parts("c", b"c", opponent="champion"), "1")[1])
    return versions


def test_registering_twice_gives_one_version(tracked, make_parts):
    parts = make_parts()
    result, version = registry.register(parts)
    assert version == "1"
    assert aliases(tracked) == {"candidate": "1"}
    assert registry.register(parts)[1] == "1"
    # The process died after the registry took it and before that was noted.
    (result.out_dir.parent / "version.json").unlink()
    assert registry.register(parts)[1] == "1"
    # The run folder is gone, the registry is not.
    shutil.rmtree(result.out_dir.parent)
    again, version = registry.register(parts)
    assert (version, again.digest) == ("1", result.digest)
    assert len(tracked.search_model_versions(f"name = '{registry.NAME}'")) == 1
    assert registry.register(make_parts("b", b"other"))[1] == "2"
    assert aliases(tracked) == {"candidate": "2"}


def test_compared_with_another_champion_it_is_another_version(tracked, make_parts):
    parts = make_parts()
    first = registry.register(parts)[1]
    tracked.set_registered_model_alias(registry.NAME, registry.CHAMPION, first)
    second = registry.register(parts, first)[1]
    assert (first, second) == ("1", "2")
    assert aliases(tracked) == {"champion": "1", "candidate": "2"}
    assert tracked.get_model_version(registry.NAME, "2").tags["flowloom.expected"] == "1"


def test_the_folder_holds_all_that_a_design_needs(tracked, make_parts):
    out = registry.register(make_parts())[0].out_dir
    assert {path.name for path in out.iterdir()} == {
        "model",
        "adapter",
        "reward",
        "models",
        "vocabulary.json",
        "catalogue.json.gz",
        "policies.json",
        "evaluation.json",
        "config.json",
        "card.md",
    }
    policies = json.loads((out / "policies.json").read_text())
    assert policies["best_fixed"] == {"1": {}}
    # "a" was drawn best by workflow 2; "b" was only drawn by workflow 1.
    assert policies["retrieval"] == {"prompts": ["a", "b"], "workflows": [{"2": {}}, {"1": {}}]}
    assert json.loads((out / "config.json").read_text())["guidance"] == 1.5
    assert "| best_fixed | +0.1000 | +0.0600 to +0.1400 | 160 |" in (out / "card.md").read_text()


def test_a_missing_part_is_named(tracked, make_parts):
    parts = make_parts()
    (parts["triplets"] / "best_fixed.json").unlink()
    with pytest.raises(ValueError, match=r"register: got no best_fixed.json in '.*triplets'"):
        registry.register(parts)


def test_promotion_and_rollback(tracked, three, evaluation):
    assert registry.champion() is None
    assert registry.promote("1", gate(evaluation, CONFIG)).promoted
    assert registry.champion().version == "1"
    against_champion = evaluation | {"opponent": "champion"}
    assert registry.promote("3", gate(against_champion, CONFIG)).promoted
    assert registry.champion().version == "3"
    assert tracked.get_model_version(registry.NAME, "3").tags["flowloom.decision"] == "promoted"
    assert registry.rollback() == "1"
    assert registry.champion().version == "1"
    assert tracked.get_model_version(registry.NAME, "3").tags["flowloom.decision"] == "rolled back"
    with pytest.raises(ValueError, match="rollback: got 1 champions so far, expected >= 2"):
        registry.rollback()
    events = [(row["event"], row["version"], row["previous"]) for row in registry.history()]
    assert events == [("promote", "1", None), ("promote", "3", "1"), ("rollback", "1", "3")]


def test_a_champion_that_changed_meanwhile_refuses(tracked, three, evaluation):
    decision = gate(evaluation, CONFIG)
    assert registry.promote("1", decision).promoted
    # Version 2 was compared with nobody, as version 1 was, and comes second.
    refused = registry.promote("2", decision)
    assert not refused.promoted
    assert refused.reason == "champion: 1 = none: FAILS"
    assert registry.champion().version == "1"
    tags = tracked.get_model_version(registry.NAME, "2").tags
    assert (tags["flowloom.decision"], tags["flowloom.reason"]) == ("refused", refused.reason)
    assert registry.history()[-1]["event"] == "refuse"
    for version in ("2", "1"):  # never a champion, and the one there is
        said = f"got version {version}, expected an earlier champion: none"
        with pytest.raises(ValueError, match=said):
            registry.rollback(version)
    assert len(registry.history()) == 2


def test_an_evaluation_against_another_opponent_refuses(tracked, three, evaluation):
    registry.promote("1", gate(evaluation, CONFIG))
    refused = registry.promote("3", gate(evaluation, CONFIG))  # against best_fixed, not champion
    assert refused.reason == "opponent: best_fixed = champion: FAILS"
    assert registry.champion().version == "1"


def test_promoting_the_champion_again_changes_nothing(tracked, three, evaluation):
    decision = gate(evaluation, CONFIG)
    assert registry.promote("1", decision) == registry.promote("1", decision)
    assert journal.read(tracked).champions == ("1",)
    assert len(registry.history()) == 1


def test_rollback_to_a_named_champion(tracked, three, evaluation):
    # An alias moved by hand is right, and is recorded like a decision.
    for version in ("1", "2", "3"):
        tracked.set_registered_model_alias(registry.NAME, registry.CHAMPION, version)
        assert journal.settle(tracked).champion == version
    assert journal.read(tracked).champions == ("1", "2", "3")
    assert registry.rollback("1") == "1"
    assert journal.read(tracked).champions == ("1",)
    assert aliases(tracked)["champion"] == "1"
    events = [(row["event"], row["version"], row["previous"]) for row in registry.history()]
    assert events[:3] == [("moved", "1", None), ("moved", "2", "1"), ("moved", "3", "2")]
    assert events[3:] == [("rollback", "1", "3")]
    tracked.delete_registered_model_alias(registry.NAME, registry.CHAMPION)
    assert journal.settle(tracked).champions == ()


def test_a_process_that_died_before_it_moved_the_alias(tracked, three, evaluation):
    decision = gate(evaluation, CONFIG)
    journal.append(tracked, journal.PROMOTE, "1", None, decision.reason, decision.rows())
    assert registry.champion() is None
    # The same process again finds it done; any other finds the champion changed.
    assert registry.promote("2", decision).reason == "champion: 1 = none: FAILS"
    assert registry.champion().version == "1"
    assert registry.promote("1", decision).promoted
    assert [row["event"] for row in registry.history()] == ["promote", "refuse"]


def test_another_machine_was_faster_between_look_and_leap(tracked, three, evaluation, monkeypatch):
    decision = gate(evaluation, CONFIG)
    append = journal.append

    def late(client, *arguments):
        monkeypatch.setattr(journal, "append", append)
        append(client, journal.PROMOTE, "2", None, "elsewhere")
        return append(client, *arguments)

    monkeypatch.setattr(journal, "append", late)
    refused = registry.promote("1", decision)
    assert refused.reason == "champion: 2 = none: FAILS"
    assert registry.champion().version == "2"
    last = registry.history()[-1]
    assert (last["event"], last["version"], last["reason"]) == ("refuse", "1", refused.reason)
    assert last["checks"] == refused.rows()
    assert tracked.get_model_version(registry.NAME, "1").tags["flowloom.decision"] == "refused"


def test_another_machine_was_faster_than_a_rollback(tracked, three, monkeypatch):
    for version in ("1", "2"):
        tracked.set_registered_model_alias(registry.NAME, registry.CHAMPION, version)
        journal.settle(tracked)
    append = journal.append

    def late(client, *arguments):
        monkeypatch.setattr(journal, "append", append)
        append(client, journal.PROMOTE, "3", "2", "elsewhere")
        return append(client, *arguments)

    monkeypatch.setattr(journal, "append", late)
    with pytest.raises(ValueError, match="rollback: got champion 3 meanwhile, expected 2"):
        registry.rollback()
    assert registry.champion().version == "3"
    assert "flowloom.decision" not in tracked.get_model_version(registry.NAME, "2").tags


def test_a_number_that_another_machine_took_is_asked_for_again(tracked, three):
    class Busy:
        """A registry whose table others hold at first."""

        refusals = 2

        def __getattr__(self, name):
            return getattr(tracked, name)

        def create_model_version(self, *args, **kwargs):
            if self.refusals:
                self.refusals -= 1
                raise MlflowException("database is locked")
            return tracked.create_model_version(*args, **kwargs)

    assert journal.append(Busy(), journal.REFUSE, "1", None, "why") == 1
    assert [row["reason"] for row in registry.history()] == ["why"]


def test_a_decision_is_recorded_with_all_its_numbers(tracked, three, evaluation, capsys):
    evaluation["paired"]["vs_best_fixed"]["low"] = float("nan")
    registry.promote("1", gate(evaluation, CONFIG))
    tags = tracked.get_model_version(registry.NAME, "1").tags
    (row,) = registry.history()
    assert json.loads(tags["flowloom.checks"]) == row["checks"]
    # 6 checks of the gate, one per kind, opponent and champion.
    assert len(row["checks"]) == 6 + 2 + 2
    assert row["checks"][0]["value"] == "nan"  # JSON has no such number
    assert row["checks"][1] == {
        "name": "held-out prompts", "value": 160, "bound": 100, "rule": ">=", "holds": True
    }  # fmt: skip
    assert main(["promote", "--history", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"history": [row]}
    assert main(["promote", "--history"]) == 0
    shown = capsys.readouterr().out
    assert "UTC  refuse version 1 (champion before: none): paired difference" in shown
    assert "\n  distinct share: +0.1000 >= +0.0020: holds\n" in shown


def test_a_journal_is_read_the_same_way_by_all():
    def entry(number, event, version, expected):
        return journal.Entry(number, event, version, expected, "", (), 0, True)

    rows = [
        entry(1, "promote", "1", None),
        entry(2, "promote", "2", None),  # second: refused
        entry(3, "promote", "3", "1"),
        entry(4, "refuse", "4", "3"),
        entry(5, "rollback", "1", "1"),  # knew of an older champion: nothing
        entry(6, "rollback", "1", "3"),
        entry(7, "promote", "5", "1"),  # the champion is again the one it was compared with
        entry(8, "promote", "5", "1"),  # sent twice
    ]
    found = journal.fold(reversed(rows))
    assert [row.holds for row in found.entries] == [
        True,
        False,
        True,
        False,
        False,
        True,
        True,
        False,
    ]
    assert [row.previous for row in found.entries] == [None, "1", "1", "3", "3", "3", "1", "5"]
    assert found.champions == ("1", "5")
    assert found.entries[1].reason == "champion: 1 = none: FAILS"
    assert found.entries[7].reason == "it is the champion already"


def test_a_rollback_goes_to_the_latest_time_that_a_version_was_champion():
    rows = [("1", None), ("2", "1"), ("1", "2"), ("3", "1")]
    entries = [
        journal.Entry(number, journal.PROMOTE, version, expected, "", (), 0, True)
        for number, (version, expected) in enumerate(rows, start=1)
    ]
    back = journal.Entry(5, journal.ROLLBACK, "1", "3", "", (), 0, True)
    assert journal.fold([*entries, back]).champions == ("1", "2", "1")
    moved = journal.Entry(5, journal.MOVED, "2", "3", "", (), 0, True)  # by hand, the same
    assert journal.fold([*entries, moved]).champions == ("1", "2")


def test_the_promote_stage_writes_its_decision_once(tracked, make_parts):
    parts = make_parts(designs={"n": 10, "valid": 10, "decodable": 10, "unique_frac": 1.0})
    _, version = registry.register(parts)
    result = registry.decide(CONFIG, version, parts["evaluation"])
    decision = json.loads((result.out_dir / "decision.json").read_text())
    assert (decision["promoted"], result.metrics) == (False, {"gate/promoted": 0.0})
    failed = [check for check in decision["checks"] if not check["holds"]]
    assert failed == [
        {"name": "unrendered designs", "value": 10, "bound": 5000, "rule": ">=", "holds": False}
    ]
    assert registry.decide(CONFIG, version, parts["evaluation"]).cached
    # A looser gate is another decision.
    assert registry.decide(GateConfig(min_designs=10), version, parts["evaluation"]).metrics == {
        "gate/promoted": 1.0
    }
    assert registry.champion().version == version
    assert len(registry.history()) == 2


def test_reconsidering_uses_the_registered_evaluation(tracked, make_parts):
    registry.register(make_parts())
    version, decision = registry.reconsider(CONFIG)
    assert (version, decision.promoted) == ("1", True)
    assert registry.champion().version == "1"


def test_a_registered_folder_comes_back(tracked, make_parts, evaluation):
    result, version = registry.register(make_parts())
    registry.promote(version, gate(evaluation, CONFIG))
    folder = registry.champion_dir()
    assert folder_digest(folder) == result.digest
    assert folder.is_relative_to(home() / "models")
    assert registry.champion_dir("models:/flow-designer/1") == folder
    assert registry.champion_dir(str(folder)) == folder
    assert registry.opponent("auto") == ("1", folder)
    assert registry.opponent("") == ("", None)


def test_what_is_not_there_is_named_in_one_line(monkeypatch):
    assert registry.champion() is None
    assert registry.opponent("auto") == ("", None)
    for call in (registry.champion_dir, registry.rollback, lambda: registry.reconsider(CONFIG)):
        with pytest.raises(ValueError, match=r"registry: got nothing at sqlite:.*`make demo`"):
            call()
    assert not (home() / "mlflow.db").exists()  # asking does not make one


def test_what_the_registry_lacks_is_named(tracked):
    with pytest.raises(ValueError, match="@candidate: no such alias; expected a registered"):
        registry.reconsider(CONFIG)
    with pytest.raises(ValueError, match=r"models:/flow-designer@champion: no such model in"):
        registry.champion_dir()
    with pytest.raises(ValueError, match="flow-designer: got version '9', expected one in"):
        registry.champion_dir("models:/flow-designer/9")
    with pytest.raises(ValueError, match="expected models:/flow-designer@ALIAS or /VERSION"):
        registry.champion_dir("models:/other/1")
    with pytest.raises(ValueError, match="expected a model's folder"):
        registry.champion_dir("/nowhere")
