"""The gate.

Facts pinned:
- the lower end of the paired interval must lie strictly above the margin;
- every refusal names its number and its bound, and one failed check is enough;
- a value that is not a number never passes;
- an evaluation that lacks what is checked is an error, not a pass.
"""

import math

import pytest

from flowloom.lifecycle.config import GateConfig
from flowloom.lifecycle.gate import champion_unchanged, gate

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
