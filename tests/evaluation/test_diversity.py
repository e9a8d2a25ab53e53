"""Facts pinned: near-equal numbers count once, other files and structures never; likeness is the
share of equal facts with one known workflow, by hand; a known workflow has 1."""

import numpy as np
import pytest

from flowloom.evaluation.diversity import Known, collapsed_fingerprint, distinct, facts
from tests.render.tiny import CHECKPOINTS, flow

BASE = flow(CHECKPOINTS[0], steps=8, cfg=2.0)


def _same(workflow):
    return collapsed_fingerprint(workflow) == collapsed_fingerprint(BASE)


def test_numbers_within_a_bin_are_one():
    # Bins of ratio 1.5 around 1.5 ** k: 2 and 2.5 round to 1.5 ** 2, 3 to 1.5 ** 3, 1.5 to itself.
    assert _same(flow(CHECKPOINTS[0], steps=8, cfg=2.5))
    assert not _same(flow(CHECKPOINTS[0], steps=8, cfg=3.0))
    assert not _same(flow(CHECKPOINTS[0], steps=8, cfg=1.5))
    # 8 is nearest to 1.5 ** 5 = 7.6, as is 7; 6 to 1.5 ** 4 = 5.06, 12 to 1.5 ** 6 = 11.4.
    assert _same(flow(CHECKPOINTS[0], steps=7, cfg=2.0))
    assert not _same(flow(CHECKPOINTS[0], steps=6, cfg=2.0))
    assert not _same(flow(CHECKPOINTS[0], steps=12, cfg=2.0))


def test_what_is_no_number_is_never_joined():
    assert not _same(flow(CHECKPOINTS[1], steps=8, cfg=2.0))
    assert not _same(flow(CHECKPOINTS[0], steps=8, cfg=2.0, lora=(1.0, 1.0)))
    api = BASE.to_api()
    sampler = next(node for node in api.values() if node["class_type"] == "KSampler")
    sampler["inputs"]["sampler_name"] = "heun"
    assert not _same(type(BASE).from_api(api))


def test_signs_zeros_and_prefixes():
    def lora(strength):
        return flow(CHECKPOINTS[0], lora=(strength, 1.0))

    different = {collapsed_fingerprint(lora(value)) for value in (-1.0, 0.0, 1.0, 1e-6)}
    assert len(different) == 4
    assert collapsed_fingerprint(lora(0.9)) == collapsed_fingerprint(lora(1.1))
    api = BASE.to_api()
    output = next(node for node in api.values() if node["class_type"] == "SaveImage")
    output["inputs"]["filename_prefix"] = "elsewhere"
    assert _same(type(BASE).from_api(api))
    # Filled in or not: texts and seeds are slots.
    assert _same(BASE.fill("two stars", seed=5))


def test_distinct_counts_by_hand():
    workflows = [flow(CHECKPOINTS[0], steps=8, cfg=cfg) for cfg in (2.0, 2.5, 2.0, 4.0, 6.0)]
    # cfg 2 twice; 2 and 2.5 near; 4 and 6 are 1.5 ** 3.4 and 1.5 ** 4.4.
    assert distinct(workflows) == {"n": 5, "raw": 4, "collapsed": 3}
    assert distinct([]) == {"n": 0, "raw": 0, "collapsed": 0}


def test_likeness_is_the_share_of_equal_facts():
    other = flow(CHECKPOINTS[0], steps=8, cfg=3.0)
    both = flow(CHECKPOINTS[1], steps=6, cfg=2.0)
    number = len(facts(BASE))
    assert number == len(facts(other)) == len(facts(both))
    known = Known([BASE, BASE])
    assert len(known) == 1
    # One input of `number` differs; then the file and the steps.
    found = known.nearest([BASE, other, both])
    assert found == pytest.approx([1.0, (number - 1) / number, (number - 2) / number], abs=1e-6)
    # The nearest counts, not the mean.
    assert Known([both, other, BASE]).nearest([other])[0] == 1.0


def test_likeness_counts_what_is_missing_on_either_side():
    longer = flow(CHECKPOINTS[0], steps=8, cfg=2.0, second_pass={"steps": 4, "denoise": 0.5})
    common = set(facts(BASE)) & set(facts(longer))
    dice = 2 * len(common) / (len(facts(BASE)) + len(facts(longer)))
    assert 0.5 < dice < 1
    assert Known([BASE]).nearest([longer])[0] == pytest.approx(dice, abs=1e-6)
    assert Known([longer]).nearest([BASE])[0] == pytest.approx(dice, abs=1e-6)
    # A second sampler's equal settings are facts of their own.
    repeated = [fact for fact in facts(longer) if fact[3] == 1]
    assert ("KSampler", "cfg", "2.0", 1) in repeated


def test_many_designs_are_compared_in_blocks():
    workflows = [flow(CHECKPOINTS[k % 2], steps=4 + k % 5) for k in range(600)]
    known = Known(workflows[:3])
    one_by_one = np.array([known.nearest([workflow])[0] for workflow in workflows[:20]])
    assert np.array_equal(known.nearest(workflows)[:20], one_by_one)
    with pytest.raises(ValueError, match="no known workflow"):
        Known([])
