"""Facts pinned: what a render costs is counted without it, to the last operation, for any workflow;
a fitted speed underrates no render it was fitted to, and finds the constants that made them."""

import pytest

from flowloom.render.cost import CostMeter, Counted, Speed, fit
from flowloom.render.engine import Engine, RenderJob
from flowloom.render.models import ModelStore
from flowloom.workflow import Grammar, decode, random_workflows
from tests.render.tiny import flow, write_world


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ModelStore.open(write_world(tmp_path_factory.mktemp("world")))


def test_counts_are_those_of_the_render(store):
    grammar = Grammar(store.catalogue)
    drawn = [decode(row.tokens, grammar) for row in random_workflows(grammar, 40, 5)]
    flows = [template.fill("two red stars", seed=3) for template in drawn]
    rendered = Engine(store).render([RenderJob(one, str(k)) for k, one in enumerate(flows)])
    meter = CostMeter(store)
    assert [meter.count(one).flops for one in flows] == [result.flops for result in rendered]
    assert len({result.flops for result in rendered}) > 10


@pytest.mark.parametrize(
    ("template", "calls"),
    [
        (flow(steps=3, cfg=2.5), 3),
        (flow(steps=3, cfg=1.0), 3),
        (flow(steps=3, sampler="heun"), 5),
        (flow(steps=4, second_pass={"steps": 4, "denoise": 0.5}), 8),
    ],
)
def test_a_call_holds_all_guided_texts(store, template, calls):
    assert CostMeter(store).count(template.fill("a star", seed=0)).calls == calls


def test_measured_seconds_are_positive(store):
    meter = CostMeter(store)
    flows = [flow(steps=n, cfg=cfg).fill("a star", seed=0) for n in (2, 6) for cfg in (1.0, 3.0)]
    speed = meter.measure(flows)
    assert all(speed.seconds(meter.count(one)) > 0 for one in flows)
    with pytest.raises(ValueError, match="got 1 workflows without a sampler to time"):
        meter.measure([flow(denoise=0.0).fill("a star", seed=0)])


def test_fit_finds_the_constants_and_underrates_nothing():
    counts = [Counted(c, f) for c, f in ((4, 800), (4, 400), (8, 800), (16, 3200))]
    exact = Speed(0.002, 1e-5)
    found = fit(counts, [exact.seconds(row) for row in counts])
    assert (found.call_s, found.flop_s) == pytest.approx((0.002, 1e-5))
    spent = [0.02, 0.01, 0.03, 0.04]
    found = fit(counts, spent)
    assert found.call_s >= 0
    assert found.flop_s >= 0
    ratios = [s / found.seconds(row) for s, row in zip(spent, counts, strict=True)]
    assert max(ratios) == pytest.approx(1.0)


def test_a_constant_that_would_be_negative_is_left_out():
    counts = [Counted(4, 800), Counted(4, 400), Counted(8, 800)]
    found = fit(counts, [0.03, 0.01, 0.015])
    assert (found.call_s == 0) != (found.flop_s == 0)
    assert found.seconds(counts[0]) >= 0.03 - 1e-12
