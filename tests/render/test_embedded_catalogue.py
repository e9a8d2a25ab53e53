"""Pins: the engine knows every class of the embedded catalogue and takes exactly its inputs; what
the grammar writes, it renders; LoRA stacks and merges are sums of weights."""

import copy

import numpy as np
import pytest
import torch

from flowloom.render.engine import FUNCTIONS, Engine, RenderJob
from flowloom.render.inputs import parameters
from flowloom.render.models import ModelStore, Part, Patch, Weights
from flowloom.shapes.model import apply_lora
from flowloom.workflow import Catalogue, Grammar, random_workflows
from flowloom.workflow.weights import embedded_weights
from tests.render.tiny import CHECKPOINTS, LORA, Sheet, write_world

TOLERANCE = 1e-5
NUM_WORKFLOWS = 96


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(ModelStore.open(write_world(tmp_path_factory.mktemp("world"), contrast=0.1)))


def test_every_class_takes_exactly_its_inputs():
    nodes = Catalogue.load("embedded").nodes
    assert set(FUNCTIONS) == set(nodes)
    for class_type, spec in nodes.items():
        taken = {p.spec.name for p in parameters(class_type, FUNCTIONS[class_type])}
        assert taken == {item.name for item in spec.inputs}, class_type


def test_what_the_grammar_writes_is_rendered(engine):
    grammar = Grammar(engine.store.catalogue)
    flat = copy.deepcopy(embedded_weights())
    for entries in (*flat["fields"].values(), flat["context"]):
        entries.update({name: value**0.25 for name, value in entries.items()})
    codes = random_workflows(grammar, NUM_WORKFLOWS // 2, 0)
    codes += random_workflows(grammar, NUM_WORKFLOWS // 2, 1, flat)
    templates = [grammar.codec.decode(code.tokens, code.texts, code.seeds) for code in codes]
    classes = {node.class_type for template in templates for node in template.nodes.values()}
    assert len(classes) > 30
    jobs = [RenderJob(t.fill("a red circle", seed=k), str(k)) for k, t in enumerate(templates)]
    for result in engine.render(jobs):
        assert result.image.shape[0] == 3
        assert np.abs(result.image).max() <= 1


def weight(model, name="blocks.0.to_q"):
    return dict(model.named_modules())[name].weight


def delta(engine, strength):
    base = engine.store.checkpoint(CHECKPOINTS[0])
    patched = apply_lora(base, engine.store.lora(LORA), strength, 0.0)
    return weight(patched) - weight(base)


def test_the_same_lora_twice_adds_up(engine):
    weights = Weights.of(CHECKPOINTS[0]).patched(LORA, 0.75).patched(LORA, -0.25)
    base = weight(engine.store.checkpoint(CHECKPOINTS[0]))
    got = weight(engine.store.transformer(weights)) - base
    torch.testing.assert_close(got, 0.5 * delta(engine, 1.0), atol=TOLERANCE, rtol=TOLERANCE)
    assert weights == Weights.of(CHECKPOINTS[0]).patched(LORA, 0.5)
    assert weights.patched(LORA, -0.5) == Weights.of(CHECKPOINTS[0])


def test_a_lora_acts_on_the_part_it_is_put_on(engine):
    weights = Weights.of(CHECKPOINTS[0]).patched(LORA, 1.0)
    base = engine.store.checkpoint(CHECKPOINTS[0])
    encoder = engine.store.text_encoder(weights)
    torch.testing.assert_close(weight(encoder), weight(base))
    name = "text.blocks.0.to_v"
    assert (weight(encoder, name) - weight(base, name)).abs().max() > 0.1
    torch.testing.assert_close(weight(engine.store.transformer(weights), name), weight(base, name))


def test_merging_is_a_weighted_mean(engine):
    first, second = (Weights.of(name) for name in CHECKPOINTS)
    merged = first.patched(LORA, 1.0).merged(second, 0.3).patched(LORA, 2.0)
    one, two = (weight(engine.store.checkpoint(name)) for name in CHECKPOINTS)
    expected = 0.3 * (one + delta(engine, 1.0)) + 0.7 * two + delta(engine, 2.0)
    got = weight(engine.store.transformer(merged))
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert first.merged(second, 1.0) == first
    assert first.merged(second, 0.0) == second


def test_a_merge_in_a_workflow_reaches_the_sampler(engine):
    def picture(ratio, order=CHECKPOINTS):
        sheet = Sheet()
        loaders = [sheet.loader(name) for name in order]
        model = sheet("ModelMergeSimple", model1=loaders[0][0], model2=loaders[1][0], ratio=ratio)[
            0
        ]
        model = sheet("LoraLoaderModelOnly", model=model, lora_name=LORA, strength_model=0.5)[0]
        text = sheet.text(loaders[0 if order == CHECKPOINTS else 1][1], "a star")
        latent = sheet(
            "KSampler",
            model=model,
            positive=text,
            negative=text,
            cfg=1.0,
            steps=2,
            latent_image=sheet.latent(),
        )[0]
        return engine.render([RenderJob(sheet.decoded(latent), "x")])[0].image

    half = picture(0.5)
    np.testing.assert_allclose(half, picture(0.5, CHECKPOINTS[::-1]), atol=TOLERANCE)
    assert np.abs(half - picture(1.0)).max() > 0.01


def test_however_often_merged_each_file_is_there_once():
    one, two = Weights.of("a").patched("l", 1.0), Weights.of("b").patched("l", -1.0)
    merged = one
    for _ in range(40):
        merged = merged.merged(two, 0.5).merged(one, 0.5)
    assert [part.checkpoint for part in merged.parts] == ["a", "b"]
    assert merged.parts[0].share == pytest.approx(2 / 3)
    assert merged.patches == (Patch("l", pytest.approx(1 / 3)),)
    assert one.merged(two, 0.5) == Weights((Part("a", 0.5), Part("b", 0.5)))
