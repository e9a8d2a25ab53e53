"""The gate.

Facts pinned:
- the lower end of the paired interval must lie strictly above the margin;
- every refusal names its number and its bound, and one failed check is enough;
- a value that is not a number never passes;
- an evaluation that lacks what is checked is an error, not a pass;
- measured by the evaluation's own code, a random adapter, one ruined kind, one invalid design, too
  few different designs, and the champion itself are refused and recorded, each for its reason; what
  is better is promoted, and rollback restores what was before.
"""

import dataclasses
import math

import numpy as np
import pytest

from flowloom.evaluation.statistics import paired_interval
from flowloom.evaluation.unrendered import check_designs
from flowloom.lifecycle import registry
from flowloom.lifecycle.config import GateConfig
from flowloom.lifecycle.gate import champion_unchanged, gate
from flowloom.workflow import Catalogue, Grammar, random_workflows

CONFIG = GateConfig()


def failed(decision):
    return [check.name for check in decision.checks if not check.holds]


def test_a_good_candidate_passes_every_check(evaluation):
    decision = gate(evaluation, CONFIG)
    assert decision.promoted
    assert decision.opponent == "best_fixed"
    # interval, prompts, designs, valid, decodable, distinct, and one per kind
    assert len(decision.checks) == 6 + 2
    by_name = {check.name: check for check in decision.checks}
    assert by_name["paired difference to best_fixed, lower end"].value == 0.06
    # 0.5 - 0.4 by hand
    assert by_name["change on counting"].value == pytest.approx(0.1, abs=1e-12)
    assert by_name["change on counting"].bound == -0.05


def test_the_interval_must_lie_above_the_margin(evaluation):
    assert gate(evaluation, GateConfig(margin=0.0599)).promoted
    decision = gate(evaluation, GateConfig(margin=0.06))
    assert failed(decision) == ["paired difference to best_fixed, lower end"]
    assert "+0.0600 > +0.0600: FAILS" in decision.reason


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (
            ("paired", "vs_best_fixed", "low"),
            math.nan,
            "paired difference to best_fixed, lower end",
        ),
        (("paired", "vs_best_fixed", "n"), 99, "held-out prompts"),
        (("designs", "valid"), 4999, "valid designs"),
        (("designs", "decodable"), 4999, "decodable designs"),
        (("designs", "unique_frac"), 0.0019, "distinct share"),
        (("policies", "grpo", "by_kind", "single"), 0.3499, "change on single"),
        (("policies", "grpo", "by_kind", "single"), math.nan, "change on single"),
    ],
)
def test_each_refusal(evaluation, path, value, name):
    target = evaluation
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    decision = gate(evaluation, CONFIG)
    assert not decision.promoted
    assert failed(decision) == [name]


def test_too_few_designs_are_refused(evaluation):
    evaluation["designs"] = {"n": 4999, "valid": 4999, "decodable": 4999, "unique_frac": 0.5}
    assert failed(gate(evaluation, CONFIG)) == ["unrendered designs"]


def test_a_kind_the_candidate_does_not_have_is_refused(evaluation):
    del evaluation["policies"]["grpo"]["by_kind"]["single"]
    assert failed(gate(evaluation, CONFIG)) == ["change on single"]


def test_the_opponent_is_the_one_the_evaluation_names(evaluation):
    evaluation["opponent"] = "champion"
    evaluation["paired"]["vs_champion"]["low"] = -0.01
    assert failed(gate(evaluation, CONFIG)) == ["paired difference to champion, lower end"]


@pytest.mark.parametrize("lost", ["designs", "policies", "paired", "opponent"])
def test_what_cannot_be_checked_is_an_error(evaluation, lost):
    del evaluation[lost]
    with pytest.raises(ValueError, match=rf"evaluation.json: got no '{lost}"):
        gate(evaluation, CONFIG)


def test_a_changed_champion_fails():
    assert champion_unchanged("3", "3").holds
    assert champion_unchanged(None, None).holds
    assert not champion_unchanged("4", "3").holds
    assert not champion_unchanged("1", None).holds


def test_bounds_are_checked():
    with pytest.raises(ValueError, match="min_unique_frac: got 2, expected 0 to 1"):
        GateConfig(min_unique_frac=2)


# Candidates as the evaluation itself would measure them, on few prompts and designs.
KINDS = ("counting", "occlusion", "single", "spatial")
NUM_PROMPTS, NUM_SEEDS, NUM_CHECKED = 160, 4, 50
SMALL = GateConfig(min_designs=NUM_CHECKED, min_unique_frac=0.1)


@pytest.fixture(scope="module")
def grammar():
    return Grammar(Catalogue.load("embedded"))


@pytest.fixture(scope="module")
def rows(grammar):
    """Token rows of different valid designs."""
    return [encoded.tokens for encoded in random_workflows(grammar, NUM_CHECKED, 0)]


def measure(ours_PS, theirs_PS, designs):
    """The evaluation of a candidate from its rendered scores, prompt p being of kind p modulo 4."""
    kinds_P = np.array([KINDS[p % len(KINDS)] for p in range(NUM_PROMPTS)])
    return {
        "opponent": "champion",
        "paired": {"vs_champion": dataclasses.asdict(paired_interval(ours_PS, theirs_PS))},
        "policies": {
            name: {"by_kind": {kind: float(of_PS[kinds_P == kind].mean()) for kind in KINDS}}
            for name, of_PS in (("grpo", ours_PS), ("champion", theirs_PS))
        },
        "designs": designs,
    }


def candidates(rows, grammar):
    """Evaluations of a good candidate and of five that must not serve."""
    rng = np.random.default_rng(0)
    theirs_PS = 0.6 + 0.1 * rng.normal(size=(NUM_PROMPTS, NUM_SEEDS))
    better_PS = theirs_PS + 0.1 + 0.05 * rng.normal(size=theirs_PS.shape)
    ruined_PS = better_PS + 0.1
    ruined_PS[KINDS.index("occlusion") :: len(KINDS)] -= 0.4
    random_PS = 0.25 + 0.2 * rng.normal(size=theirs_PS.shape)
    fine = check_designs(rows, grammar)
    broken = check_designs([*rows[1:], rows[0][:-3]], grammar)
    alike = check_designs([rows[0]] * NUM_CHECKED, grammar)
    return {
        "good": measure(better_PS, theirs_PS, fine),
        "random adapter": measure(random_PS, theirs_PS, fine),
        "one kind ruined": measure(ruined_PS, theirs_PS, fine),
        "once invalid": measure(better_PS, theirs_PS, broken),
        "all alike": measure(better_PS, theirs_PS, alike),
        "equal": measure(theirs_PS, theirs_PS, fine),
    }


def test_five_that_must_not_serve_are_refused_each_for_its_reason(
    rows, grammar, evaluation, tracked
):
    found = candidates(rows, grammar)
    decisions = {name: gate(measured, SMALL) for name, measured in found.items()}
    paired = "paired difference to champion, lower end"
    everywhere = [f"change on {kind}" for kind in KINDS]
    assert {name: failed(decision) for name, decision in decisions.items()} == {
        "good": [],
        "random adapter": [paired, *everywhere],
        "one kind ruined": ["change on occlusion"],
        "once invalid": ["valid designs", "decodable designs"],
        "all alike": ["distinct share"],
        "equal": [paired],
    }
    assert found["one kind ruined"]["paired"]["vs_champion"]["low"] > 0.05  # its mean is good
    assert "valid designs: 49 = 50: FAILS" in decisions["once invalid"].reason
    assert decisions["all alike"].reason == "distinct share: +0.0200 >= +0.1000: FAILS"
    assert decisions["equal"].reason == f"{paired}: +0.0000 > +0.0000: FAILS"

    # In the registry: a champion, then each of them, compared with it.
    tracked.create_registered_model(registry.NAME)
    run_id = tracked.create_run(tracked.create_experiment("gate")).info.run_id
    for expected in ("", *["1"] * len(decisions)):
        tags = {"flowloom.digest": "d.dir", "flowloom.expected": expected}
        tracked.create_model_version(registry.NAME, f"runs:/{run_id}/model", run_id, tags=tags)
    assert registry.promote("1", gate(evaluation, CONFIG)).promoted
    refused = [name for name in decisions if name != "good"]
    for version, name in enumerate(refused, start=2):
        assert registry.promote(str(version), decisions[name]).reason == decisions[name].reason
        assert registry.champion().version == "1"
    history = registry.history()[1:]
    assert [row["event"] for row in history] == ["refuse"] * len(refused)
    assert [row["reason"] for row in history] == [decisions[name].reason for name in refused]
    assert registry.promote("7", decisions["good"]).promoted
    assert registry.champion().version == "7"
    assert registry.rollback() == "1"
    assert registry.champion().version == "1"


def test_once_in_five_thousand_is_once_too_often(evaluation):
    evaluation["designs"] = {"n": 5000, "valid": 4999, "decodable": 5000, "unique_frac": 0.5}
    assert gate(evaluation, CONFIG).reason == "valid designs: 4999 = 5000: FAILS"
