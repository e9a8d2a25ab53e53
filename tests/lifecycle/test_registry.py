"""Register, promote, roll back.

Facts pinned:
- the same parts give the same folder and one version, also when the process died in between;
- promotion is a compare-and-swap: a champion that changed meanwhile refuses, and is recorded;
- rollback goes back through champions in order; what was refused was never one;
- a registered folder comes back byte by byte, and a missing registry gives one line.
"""

import json
import shutil

import pytest

from flowloom.lifecycle import registry
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
    with pytest.raises(ValueError, match="got version 2, expected an earlier champion: none"):
        registry.rollback("2")


def test_an_evaluation_against_another_opponent_refuses(tracked, three, evaluation):
    registry.promote("1", gate(evaluation, CONFIG))
    refused = registry.promote("3", gate(evaluation, CONFIG))  # against best_fixed, not champion
    assert refused.reason == "opponent: best_fixed = champion: FAILS"
    assert registry.champion().version == "1"


def test_promoting_the_champion_again_changes_nothing(tracked, three, evaluation):
    decision = gate(evaluation, CONFIG)
    assert registry.promote("1", decision) == registry.promote("1", decision)
    assert json.loads(tracked.get_registered_model(registry.NAME).tags[registry._STACK]) == ["1"]


def test_rollback_to_a_named_champion(tracked, three, evaluation):
    # An alias moved by hand is the truth, whatever the list says.
    for version in ("1", "2", "3"):
        champions = [*registry._champions(tracked), version]
        tracked.set_registered_model_tag(registry.NAME, registry._STACK, json.dumps(champions))
        tracked.set_registered_model_alias(registry.NAME, registry.CHAMPION, version)
    assert registry._champions(tracked) == ["1", "2", "3"]
    assert registry.rollback("1") == "1"
    assert registry._champions(tracked) == ["1"]
    # A process died between the list and the alias: the alias counts.
    tracked.set_registered_model_tag(registry.NAME, registry._STACK, '["1", "2"]')
    assert registry._champions(tracked) == ["1"]


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
    with pytest.raises(ValueError, match=r"models:/flow-designer@champion: no such model in"):
        registry.champion_dir()
    with pytest.raises(ValueError, match="flow-designer: got version '9', expected one in"):
        registry.champion_dir("models:/flow-designer/9")
    with pytest.raises(ValueError, match="expected models:/flow-designer@ALIAS or /VERSION"):
        registry.champion_dir("models:/other/1")
    with pytest.raises(ValueError, match="expected a model's folder"):
        registry.champion_dir("/nowhere")
