"""Pins: combine is the mean of the calls, concat one longer text, average and zero-out token by
token, a time range the calls that are left out; what any of it costs; bounds on blow-up."""

import itertools

import numpy as np
import pytest
import torch

from flowloom.render import conditioning
from flowloom.render.batch import noise
from flowloom.render.engine import Engine, RenderJob
from flowloom.render.models import ModelStore
from flowloom.shapes import prompts
from flowloom.shapes.model import Conditioning, flops_per_call
from tests.render.tiny import CHECKPOINTS, Sheet, write_world

TOLERANCE = 1e-5
SHORT, LONG = "a star", "a small red circle left of a blue square"
STEPS = [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(ModelStore.open(write_world(tmp_path_factory.mktemp("world"), contrast=0.1)))


@pytest.fixture
def model(engine):
    return engine.store.checkpoint(CHECKPOINTS[0])


def encoded(model, text):
    """Tokens without padding, and the pooled vector."""
    ids = prompts.tokenize(text)
    cond = model.encode_text([ids])
    return cond.tokens_BLD[0, : len(ids)], cond.pooled_BD[0]


def as_condition(tokens, pooled):
    return Conditioning(tokens[None], torch.ones(1, len(tokens), dtype=torch.bool), pooled[None])


def rendered(engine, write, steps=4, shift=None, sampler="euler"):
    """Unguided picture and FLOPs of what `write(sheet, short, long)` links to."""
    sheet = Sheet()
    net, clip, _ = sheet.loader()
    link = write(sheet, sheet.text(clip, SHORT), sheet.text(clip, LONG))
    if shift:
        net = sheet("ModelSamplingSD3", model=net, shift=shift)[0]
    latent = sheet(
        "KSampler",
        model=net,
        seed=3,
        steps=steps,
        cfg=1.0,
        sampler_name=sampler,
        positive=link,
        negative=link,
        latent_image=sheet.latent(),
    )[0]
    (result,) = engine.render([RenderJob(sheet.decoded(latent), "x")])
    return result.image, result.flops


def by_hand(predict, times=STEPS):
    """Euler over `predict(x, t) -> x0`."""
    x = noise(3, (3, 32, 32))[None]
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * (x - predict(x, torch.tensor([t]))) / t
    return x[0].clamp(-1, 1).numpy()


def call_flops(model, num_tokens=prompts.MAX_TOKENS):
    return flops_per_call(model.config, 32, num_tokens)


def test_combine_is_the_mean_of_the_calls(engine, model):
    image, flops = rendered(
        engine,
        lambda sheet, a, b: sheet("ConditioningCombine", conditioning_1=a, conditioning_2=b)[0],
    )
    conds = [as_condition(*encoded(model, text)) for text in (SHORT, LONG)]
    expected = by_hand(lambda x, t: sum(model(x, t, cond) for cond in conds) / 2)
    np.testing.assert_allclose(image, expected, atol=TOLERANCE)
    assert flops == 8 * call_flops(model)


def test_concat_is_one_longer_text(engine, model):
    image, flops = rendered(
        engine,
        lambda sheet, a, b: sheet("ConditioningConcat", conditioning_to=a, conditioning_from=b)[0],
    )
    (tokens, pooled), (more, _) = encoded(model, SHORT), encoded(model, LONG)
    cond = as_condition(torch.cat([tokens, more]), pooled)
    expected = by_hand(lambda x, t: model(x, t, cond))
    np.testing.assert_allclose(image, expected, atol=TOLERANCE)
    assert flops == 4 * call_flops(model, 2 * prompts.MAX_TOKENS)


@pytest.mark.parametrize(("first", "second"), [(SHORT, LONG), (LONG, SHORT)])
def test_average_pads_the_shorter_with_zeros(engine, model, first, second):
    image, flops = rendered(
        engine,
        lambda sheet, a, b: sheet(
            "ConditioningAverage",
            conditioning_to=a if first == SHORT else b,
            conditioning_from=b if first == SHORT else a,
            conditioning_to_strength=0.7,
        )[0],
    )
    (tokens, pooled), (other, other_pooled) = encoded(model, first), encoded(model, second)
    mixed = torch.zeros(max(len(tokens), len(other)), tokens.shape[1])
    mixed[: len(tokens)] += 0.7 * tokens
    mixed[: len(other)] += 0.3 * other
    cond = as_condition(mixed, 0.7 * pooled + 0.3 * other_pooled)
    expected = by_hand(lambda x, t: model(x, t, cond))
    np.testing.assert_allclose(image, expected, atol=TOLERANCE)
    assert flops == 4 * call_flops(model)


@pytest.mark.parametrize(("weight", "text"), [(1.0, SHORT), (0.0, LONG)])
def test_average_of_one_alone_is_that_one(engine, model, weight, text):
    image, _ = rendered(
        engine,
        lambda sheet, a, b: sheet(
            "ConditioningAverage",
            conditioning_to=a,
            conditioning_from=b,
            conditioning_to_strength=weight,
        )[0],
    )
    cond = as_condition(*encoded(model, text))
    np.testing.assert_allclose(image, by_hand(lambda x, t: model(x, t, cond)), atol=TOLERANCE)


def test_zero_out_keeps_the_tokens_without_content(engine, model):
    image, _ = rendered(engine, lambda sheet, a, b: sheet("ConditioningZeroOut", conditioning=b)[0])
    tokens, pooled = encoded(model, LONG)
    cond = as_condition(torch.zeros_like(tokens), torch.zeros_like(pooled))
    expected = by_hand(lambda x, t: model(x, t, cond))
    np.testing.assert_allclose(image, expected, atol=TOLERANCE)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_time_ranges_leave_calls_out(engine, model, sampler):
    def write(sheet, a, b):
        early = sheet("ConditioningSetTimestepRange", conditioning=a, start=0.0, end=0.4)[0]
        late = sheet("ConditioningSetTimestepRange", conditioning=b, start=0.4, end=0.8)[0]
        return sheet("ConditioningCombine", conditioning_1=early, conditioning_2=late)[0]

    conds = [as_condition(*encoded(model, text)) for text in (SHORT, LONG)]

    def predict(x, t):
        if t < 0.2 - 1e-6:  # neither takes part: nothing is known of the picture
            return torch.zeros_like(x)
        active = [cond for cond, on in zip(conds, (t >= 0.6, t <= 0.6), strict=True) if on]
        return sum(model(x, t, cond) for cond in active) / len(active)

    # Five steps; at t = 0.6 = 1 - 0.4 both ranges meet, and both take part.
    times = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    image, flops = rendered(engine, write, steps=5, sampler=sampler)
    if sampler == "euler":
        np.testing.assert_allclose(image, by_hand(predict, times), atol=TOLERANCE)
        assert flops == 6 * call_flops(model)
    else:  # each inner time is asked for twice
        assert flops == 11 * call_flops(model)


def test_a_range_beside_the_steps_is_never_called(engine, model):
    def write(sheet, a, b):
        return sheet("ConditioningSetTimestepRange", conditioning=a, start=0.1, end=0.2)[0]

    image, flops = rendered(engine, write, steps=2)
    np.testing.assert_allclose(image, np.zeros((3, 32, 32)), atol=TOLERANCE)
    assert flops == 0


def test_a_range_goes_through_the_models_shift(engine, model):
    """At shift 3 the middle of the range is t = 3 * 0.5 / (1 + 2 * 0.5) = 0.75."""

    def write(sheet, a, b):
        return sheet("ConditioningSetTimestepRange", conditioning=a, start=0.0, end=0.5)[0]

    cond = as_condition(*encoded(model, SHORT))
    image, flops = rendered(engine, write, steps=4, shift=3.0)

    def predict(x, t):
        return model(x, t, cond) if t >= 0.75 - 1e-6 else torch.zeros_like(x)

    times = [1.0, 0.9, 0.75, 0.5, 0.0]
    np.testing.assert_allclose(image, by_hand(predict, times), atol=TOLERANCE)
    assert flops == 3 * call_flops(model)


def test_equal_texts_are_encoded_once(engine, monkeypatch):
    seen = []
    encode = conditioning.encode
    monkeypatch.setattr(
        conditioning, "encode", lambda model, texts: seen.extend(texts) or encode(model, texts)
    )
    sheet = Sheet()
    net, clip, _ = sheet.loader()
    links = [sheet.text(clip, text) for text in (SHORT, LONG, SHORT)]
    joined = sheet("ConditioningCombine", conditioning_1=links[0], conditioning_2=links[2])[0]
    latent = sheet(
        "KSampler", model=net, positive=joined, negative=links[1], latent_image=sheet.latent()
    )[0]
    engine.render([RenderJob(sheet.decoded(latent), str(k)) for k in range(3)])
    assert sorted(seen) == sorted([SHORT, LONG])


def test_a_text_combined_with_itself_counts_twice_and_costs_once(engine, model):
    def with_itself(sheet, a, b):
        for _ in range(12):
            b = sheet("ConditioningCombine", conditioning_1=b, conditioning_2=b)[0]
        return b

    image, flops = rendered(engine, with_itself)
    alone, _ = rendered(engine, lambda sheet, a, b: b)
    np.testing.assert_array_equal(image, alone)
    assert flops == 4 * call_flops(model)

    def two_to_one(sheet, a, b):
        both = sheet("ConditioningCombine", conditioning_1=a, conditioning_2=b)[0]
        return sheet("ConditioningCombine", conditioning_1=both, conditioning_2=a)[0]

    image, flops = rendered(engine, two_to_one)
    short, long = (as_condition(*encoded(model, text)) for text in (SHORT, LONG))
    expected = by_hand(lambda x, t: (2 * model(x, t, short) + model(x, t, long)) / 3)
    np.testing.assert_allclose(image, expected, atol=TOLERANCE)
    assert flops == 8 * call_flops(model)


def doubled(number, averaged=False):
    """A text joined to itself, then to another one; and averaged with that one."""

    def write(sheet, a, b):
        for _ in range(number):
            b = sheet("ConditioningConcat", conditioning_to=b, conditioning_from=b)[0]
        b = sheet("ConditioningConcat", conditioning_to=b, conditioning_from=a)[0]
        if not averaged:
            return b
        return sheet(
            "ConditioningAverage",
            conditioning_to=b,
            conditioning_from=a,
            conditioning_to_strength=0.75,
        )[0]

    return write


@pytest.mark.parametrize("averaged", [False, True])
def test_doubled_again_and_again_a_text_is_counted(engine, monkeypatch, averaged):
    written_out, _ = rendered(engine, doubled(4, averaged))
    # The same with a limit that it passes: counted, it is the same picture.
    monkeypatch.setattr(conditioning, "MAX_TOKENS", 40)
    counted, _ = rendered(engine, doubled(4, averaged))
    np.testing.assert_allclose(counted, written_out, atol=TOLERANCE)
    plain, _ = rendered(engine, doubled(0, averaged))
    assert np.abs(written_out - plain).max() > 10 * TOLERANCE
    monkeypatch.undo()
    much, flops = rendered(engine, doubled(30, averaged))
    assert np.isfinite(much).all()
    assert flops == rendered(engine, doubled(20, averaged))[1]


def test_the_average_of_two_counted_texts(engine):
    def write(same, strength):
        def graph(sheet, a, b):
            long = doubled(12)(sheet, a, b)
            return sheet(
                "ConditioningAverage",
                conditioning_to=long,
                conditioning_from=long if same else doubled(11)(sheet, b, a),
                conditioning_to_strength=strength,
            )[0]

        return graph

    alone, _ = rendered(engine, doubled(12))
    itself, _ = rendered(engine, write(True, 0.5))
    np.testing.assert_allclose(itself, alone, atol=TOLERANCE)
    mixed, _ = rendered(engine, write(False, 0.5))
    assert np.isfinite(mixed).all()
    assert np.abs(mixed - alone).max() > 10 * TOLERANCE


def test_counted_tokens_are_averaged_run_by_run():
    def text(tail, counts):
        return conditioning.Text(
            tokens_nD=torch.zeros(2, 1),
            pooled_D=torch.zeros(1),
            num_slots=1,
            tail_mD=torch.tensor(tail)[:, None],
            counts_m=torch.tensor(counts),
        )

    one, other = text([1.0, 3.0], [2.0, 2.0]), text([10.0, 20.0], [3.0, 4.0])
    (found,) = conditioning.average((one,), (other,), 0.75)
    assert found.counts_m.tolist() == [2, 1, 1, 3]
    # 3/4 of 1, 3, 3 and nothing, with 1/4 of 10, 10, 20 and 20.
    assert found.tail_mD[:, 0].tolist() == [3.25, 4.75, 7.25, 5.0]
    (plain,) = conditioning.average((one,), (text([5.0], [1.0]),), 1.0)
    assert plain is one
