"""Facts: a pass that adds no noise goes on where another one stopped, with as many steps; what
begins below pure noise has a picture to begin with; no range is empty. The grammar with taste
writes nothing else unless the budget leaves no choice; validation warns of the rest."""

from __future__ import annotations

import copy

import pytest

from flowloom.workflow import (
    Grammar,
    Workflow,
    decode,
    encode,
    is_valid,
    random_workflows,
    validate,
)
from flowloom.workflow.weights import embedded_weights
from tests.workflow.flows import PLAIN

SHARED = {"model": ["4", 0], "cfg": 2.5, "positive": ["6", 0], "negative": ["7", 0]}
RARE = ("KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")


def advanced(latent, **changes):
    """A KSamplerAdvanced that draws 8 steps from pure noise."""
    inputs = {
        **SHARED, "latent_image": latent, "add_noise": "enable", "noise_seed": 0, "steps": 8,
        "sampler_name": "euler", "scheduler": "simple", "start_at_step": 0,
        "end_at_step": 10000, "return_with_leftover_noise": "disable",
    }  # fmt: skip
    return {"class_type": "KSamplerAdvanced", "inputs": inputs | changes}


def custom(latent, sigmas, add_noise=True):
    inputs = {**SHARED, "latent_image": latent, "add_noise": add_noise, "noise_seed": 0}
    inputs |= {"sampler": ["20", 0], "sigmas": sigmas}
    return {"class_type": "SamplerCustom", "inputs": inputs}


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def flow(**nodes):
    """The plain flow with other nodes: n3 is what is decoded, and may be given anew."""
    api = copy.deepcopy(PLAIN)
    api.update({key[1:]: value for key, value in nodes.items()})
    return api


def schedule(**changes):
    inputs = {"model": ["4", 0], "scheduler": "simple", "steps": 8, "denoise": 1.0}
    return node("BasicScheduler", **(inputs | changes))


SELECT = node("KSamplerSelect", sampler_name="euler")
FIRST = advanced(["5", 0], end_at_step=3, return_with_leftover_noise="enable")
REST = {"add_noise": "disable", "start_at_step": 3}
SPLIT = node("SplitSigmas", sigmas=["21", 0], step=3)

SOUND = {
    "one pass": flow(n3=advanced(["5", 0])),
    "two parts": flow(n3=advanced(["10", 0], **REST), n10=FIRST),
    "second pass": flow(n3=advanced(["10", 0], start_at_step=4), n10=advanced(["5", 0])),
    "schedule": flow(n3=custom(["5", 0], ["21", 0]), n20=SELECT, n21=schedule()),
    "rest of a schedule": flow(
        n3=custom(["10", 0], ["22", 1]),
        n10=advanced(["5", 0]),
        n20=SELECT,
        n21=schedule(),
        n22=SPLIT,
    ),
    "both parts of a schedule": flow(
        n3=custom(["10", 0], ["22", 1], False),
        n10=custom(["5", 0], ["22", 0]),
        n20=SELECT,
        n21=schedule(),
        n22=SPLIT,
    ),
}
WASTED = {
    "no step is left from 4 to 4": flow(n3=advanced(["5", 0], start_at_step=4, end_at_step=4)),
    "no step is left from 8 to 8": flow(n3=advanced(["5", 0], start_at_step=8)),
    "adds no noise, and the latent has none left": flow(n3=advanced(["5", 0], add_noise="disable")),
    "the latent has noise left": flow(n3=FIRST),
    "adds noise to a latent that has noise left": flow(
        n3=advanced(["10", 0], start_at_step=3), n10=FIRST
    ),
    "goes on at step 4, where noise of step 3 is": flow(
        n3=advanced(["10", 0], add_noise="disable", start_at_step=4), n10=FIRST
    ),
    "begins below pure noise with an empty latent": flow(
        n3=custom(["5", 0], ["21", 0]), n20=SELECT, n21=schedule(denoise=0.5)
    ),
    "splits at step 9 of 8": flow(
        n3=custom(["10", 0], ["22", 1]),
        n10=advanced(["5", 0]),
        n20=SELECT,
        n21=schedule(),
        n22=node("SplitSigmas", sigmas=["21", 0], step=9),
    ),
    "nothing guides the way from 0.6 to 1": flow(
        n3=advanced(["5", 0], positive=["30", 0]),
        n30=node("ConditioningSetTimestepRange", conditioning=["6", 0], start=0.0, end=0.6),
    ),
    "nothing is left from 0.5 to 0.5": flow(
        n3=advanced(["5", 0], positive=["31", 0]),
        n30=node("ConditioningSetTimestepRange", conditioning=["6", 0], start=0.5, end=0.5),
        n31=node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["30", 0]),
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_passes_are_not_warned_of(embedded, name):
    assert validate(SOUND[name], embedded) == []


@pytest.mark.parametrize("message", WASTED)
def test_wasted_passes_are_warned_of(embedded, message):
    api = WASTED[message]
    found = [p.message for p in validate(api, embedded) if p.type == "wasted_pass"]
    assert [text for text in found if text.startswith(message)]
    assert is_valid(api, embedded)


def test_taste_writes_the_sound_ones_only(grammar, embedded, vocabulary):
    """But for what adds no noise of its own in a custom sampler, which taste never writes."""
    for name, api in SOUND.items():
        code = encode(Workflow.from_api(api), grammar).tokens
        assert grammar.accepts(code) == (name != "both parts of a schedule"), name
    anything = Grammar(embedded, vocabulary, taste=False)
    for message, api in WASTED.items():
        code = encode(Workflow.from_api(api), grammar).tokens
        on_grid = "9 of 8" not in message and "8 to 8" not in message
        assert anything.accepts(code) == on_grid, message
        guided = "guides" in message
        assert grammar.accepts(code) == guided, message


def test_random_flows_of_many_passes_are_sound(grammar, embedded):
    """Weights that make every way to sample about as likely as KSampler, and room for all."""
    weights = copy.deepcopy(embedded_weights())
    weights["fields"]["samples"] |= dict.fromkeys(RARE, 1.0)
    weights["fields"]["latent_image"] |= dict.fromkeys(RARE, 0.1)
    weights["fields"]["sigmas"] |= {"SplitSigmas": 0.5}
    roomy = Grammar(embedded, grammar.vocabulary, budget=140)
    flows = [decode(code.tokens, roomy) for code in random_workflows(roomy, 500, 0, weights)]
    used = [n.class_type for flow in flows for n in flow.nodes.values()]
    assert min(used.count(name) for name in (*RARE, "SplitSigmas")) > 80
    quiet = [n for flow in flows for n in flow.nodes.values() if n.inputs.get("add_noise")]
    assert sum(n.inputs["add_noise"] == "disable" for n in quiet) > 20
    assert not any(validate(flow, embedded) for flow in flows)


def test_a_custom_sampler_does_the_work_of_its_schedule(embedded):
    """64 x 64 pixels allow 200 steps."""
    latent = node("EmptyLatentImage", width=64, height=64, batch_size=1)

    def judged(steps):
        sigmas = schedule(steps=steps)
        api = flow(n3=custom(["5", 0], ["21", 0]), n5=latent, n20=SELECT, n21=sigmas)
        return [(p.type, p.node_id, p.input) for p in validate(api, embedded)]

    assert judged(200) == []
    assert judged(201) == [("resource_bound", "3", "sigmas")]


def test_an_upscale_model_doubles_the_sides(embedded, grammar):
    """32 pixels become 64, the most that there may be; 48 would become 96."""

    def upscaled(side):
        loader = node("UpscaleModelLoader", model_name="shapes-x2.safetensors")
        scaled = node("ImageUpscaleWithModel", upscale_model=["10", 0], image=["8", 0])
        save = node("SaveImage", images=["11", 0], filename_prefix="flowloom")
        latent = node("EmptyLatentImage", width=side, height=side, batch_size=1)
        return flow(n5=latent, n9=save, n10=loader, n11=scaled)

    assert validate(upscaled(32), embedded) == []
    (problem,) = validate(upscaled(48), embedded)
    assert (problem.type, problem.node_id) == ("resource_bound", "11")
    for side in (32, 48):
        code = encode(Workflow.from_api(upscaled(side)), grammar).tokens
        assert grammar.accepts(code) == (side == 32)
