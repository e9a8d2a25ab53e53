"""Workflows to learn from: sane base flows, variations of them, random ones, edits of good ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from flowloom.dataset.config import PanelConfig, PriorConfig
from flowloom.workflow import Catalogue, Grammar, Workflow, random_workflows
from flowloom.workflow.mutation import mutate_all
from flowloom.workflow.vocabulary import grid
from flowloom.workflow.weights import embedded_weights, weights_for

Node = dict[str, Any]
WILD_POWER = 0.25
"""A weight of 1e-4 becomes 0.1."""


def make_grammar(catalogue: Catalogue, budget: int) -> Grammar:
    """The grammar that random and edited workflows are drawn from."""
    return Grammar(catalogue, budget=budget)


def token_weights(prior: PriorConfig, grammar: Grammar) -> dict[str, Any]:
    """The shipped token weights that suit a grammar, with the prior's choices put in."""
    return _with_prior(copy.deepcopy(weights_for(grammar)), prior)


def _with_prior(weights: dict[str, Any], prior: PriorConfig) -> dict[str, Any]:
    fields = weights["fields"]
    fields.setdefault("KSampler.steps", {}).update(
        {f"steps={n}": w for n, w in zip(prior.steps, prior.steps_weights, strict=True)}
    )
    if prior.heun_weight is not None:
        fields.setdefault("KSampler.sampler_name", {})["sampler=heun"] = prior.heun_weight
    return weights


def draw_workflows(grammar: Grammar, prior: PriorConfig, num: int, seed: int) -> list[Workflow]:
    """Random valid templates."""
    drawn = random_workflows(grammar, num, seed, token_weights(prior, grammar))
    return [grammar.codec.decode(code.tokens, code.texts, code.seeds) for code in drawn]


def draw_wild_workflows(
    grammar: Grammar, prior: PriorConfig, num: int, seed: int
) -> list[Workflow]:
    """Valid templates of every sort, senseless ones too: all weights but the prior's flattened.

    A reward model that has only seen sane workflows is optimistic about the others, and a policy
    finds them. Flattened is w ** `WILD_POWER`.
    """
    weights = copy.deepcopy(embedded_weights())
    for entries in (*weights["fields"].values(), weights["context"]):
        entries.update({name: weight**WILD_POWER for name, weight in entries.items()})
    drawn = random_workflows(grammar, num, seed, _with_prior(weights, prior))
    return [grammar.codec.decode(code.tokens, code.texts, code.seeds) for code in drawn]


def base_workflow(
    catalogue: Catalogue,
    checkpoint: str,
    steps: int,
    cfg: float,
    *,
    lora: str | None = None,
    **sampler: Any,
) -> Workflow:
    """A plain template: loader, optional LoRA, texts, empty latent, sampler, decode, save.

    Args:
        catalogue: Gives the picture size and the output's prefix.
        checkpoint: File name.
        steps: Sampler steps.
        cfg: Guidance.
        lora: File name of a LoRA at strength 1.
        sampler: Further inputs of the sampler.
    """
    model: list[Any] = ["1", 0]
    clip: list[Any] = ["1", 1]
    nodes: dict[str, Node] = {"1": _node("CheckpointLoaderSimple", ckpt_name=checkpoint)}
    if lora is not None:
        nodes["2"] = _node(
            "LoraLoader",
            model=model,
            clip=clip,
            lora_name=lora,
            strength_model=1.0,
            strength_clip=1.0,
        )
        model, clip = ["2", 0], ["2", 1]
    nodes["3"] = _node("CLIPTextEncode", text="{prompt}", clip=clip)
    nodes["4"] = _node("CLIPTextEncode", text="{negative}", clip=clip)
    side = _first(catalogue, "EmptyLatentImage", "width")
    nodes["5"] = _node("EmptyLatentImage", width=side, height=side, batch_size=1)
    inputs = {
        "model": model,
        "seed": 0,
        "steps": steps,
        "cfg": cfg,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": ["3", 0],
        "negative": ["4", 0],
        "latent_image": ["5", 0],
        "denoise": 1.0,
    }
    nodes["6"] = _node("KSampler", **(inputs | sampler))
    nodes["7"] = _node("VAEDecode", samples=["6", 0], vae=["1", 2])
    prefix = _first(catalogue, "SaveImage", "filename_prefix")
    nodes["8"] = _node("SaveImage", images=["7", 0], filename_prefix=prefix)
    return Workflow.from_api(nodes)


def panel_workflows(catalogue: Catalogue, config: PanelConfig) -> list[Workflow]:
    """Every checkpoint in a few good settings, also with every LoRA of its family."""
    flows = []
    for file in catalogue.files_in("checkpoints"):
        for steps, cfg in map(_setting, config.settings):
            flows.append(base_workflow(catalogue, file.name, steps, cfg))
        for lora in catalogue.files_in("loras"):
            if lora.family == file.family:
                for steps, cfg in map(_setting, config.lora_settings):
                    flows.append(base_workflow(catalogue, file.name, steps, cfg, lora=lora.name))
    return flows


def variations(workflow: Workflow, grammar: Grammar) -> list[Workflow]:
    """Neighbours of a base workflow: steps, guidance, scheduler, sampler, negative, sharpening.

    Values next to the given ones on the grid; what the grammar cannot write is left out.
    """
    catalogue = grammar.catalogue
    sampler = next(i for i, node in workflow.nodes.items() if node.class_type == "KSampler")
    inputs = workflow.nodes[sampler].inputs
    found = []
    for name in ("steps", "cfg"):
        values = sorted(
            grid("KSampler", catalogue.nodes["KSampler"].by_name[name], catalogue.families)
        )
        above = [value for value in values if value > inputs[name]]
        below = [value for value in values if value < inputs[name]]
        found += [workflow.replace(sampler, name, value) for value in below[-1:] + above[:2]]
    found.append(workflow.replace(sampler, "scheduler", "karras"))
    # Second order at the price of Euler, where Heun costs twice as much a step.
    found.append(workflow.replace(sampler, "sampler_name", "dpmpp_2m"))
    api = workflow.to_api()
    negative = api[sampler]["inputs"]["negative"][0]
    positive = api[sampler]["inputs"]["positive"]
    zeroed = copy.deepcopy(api)
    zeroed[negative] = _node("ConditioningZeroOut", conditioning=positive)
    found.append(Workflow.from_api(zeroed))
    output = next(i for i, node in workflow.nodes.items() if node.class_type == "SaveImage")
    sharp = copy.deepcopy(api)
    sharp["sharpen"] = _node(
        "ImageSharpen",
        image=api[output]["inputs"]["images"],
        sharpen_radius=1,
        sigma=0.5,
        alpha=0.25,
    )
    sharp[output]["inputs"]["images"] = ["sharpen", 0]
    found.append(Workflow.from_api(sharp))
    return writable(found, grammar)


def writable(workflows: Sequence[Workflow], grammar: Grammar) -> list[Workflow]:
    """Those that the grammar can write, in canonical form."""
    canonical = [workflow.canonical(grammar.catalogue) for workflow in workflows]
    codes = [grammar.codec.encode(workflow).tokens for workflow in canonical]
    accepted = grammar.accept_all(codes)
    return [workflow for workflow, good in zip(canonical, accepted, strict=True) if good]


def edited(
    workflows: Sequence[Workflow],
    grammar: Grammar,
    rng: np.random.Generator,
    twice_frac: float = 0.3,
) -> list[Workflow]:
    """Each workflow with one small edit, a share of them with two."""
    once = mutate_all(workflows, grammar, rng)
    again = np.flatnonzero(rng.random(len(once)) < twice_frac)
    for place, workflow in zip(
        again, mutate_all([once[i] for i in again], grammar, rng), strict=True
    ):
        once[place] = workflow
    return once


def _node(class_type: str, **inputs: Any) -> Node:
    return {"class_type": class_type, "inputs": inputs}


def _first(catalogue: Catalogue, class_type: str, name: str) -> Any:
    """The first value of an input's grid."""
    return grid(class_type, catalogue.nodes[class_type].by_name[name], catalogue.families)[0]


def _setting(text: str) -> tuple[int, float]:
    steps, separator, cfg = text.partition("/")
    if not separator:
        raise ValueError(f"settings: got {text!r}, expected steps/guidance, such as 8/2.5")
    return int(steps), float(cfg)
