"""How fast the embedded engine renders, beside a loop over one workflow at a time.

    python -m benchmarks.render [--models DIR] [--quick] [--json]

Milliseconds are CPU time of one thread per picture, so that other load on the machine matters
little; rows alternate engine and loop, and the best of the repeats counts. `mixed` is what
`build_triplets` renders: random workflows in shards, sorted, with scoring apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from flowloom.dataset.config import DEMO_KINDS, PriorConfig
from flowloom.dataset.prompts import draw_prompts
from flowloom.dataset.workflows import base_workflow, draw_workflows, make_grammar
from flowloom.render import sampling
from flowloom.render.engine import BATCH_SIZE, Engine, RenderJob, batch_key, noise
from flowloom.render.models import ModelStore
from flowloom.score.rubric import shapes_rubric
from flowloom.shapes import prompts

SHARD = 64
STEPS = (4, 8, 16)


def naive(store: ModelStore, job: RenderJob) -> None:
    """What a first script does: one picture and one network call at a time."""
    nodes = {node.class_type: node.inputs for node in job.workflow.nodes.values()}
    texts = [n.inputs["text"] for n in job.workflow.nodes.values() if "text" in n.inputs]
    model = store.checkpoint(nodes["CheckpointLoaderSimple"]["ckpt_name"])
    sampler = nodes["KSampler"]
    positive, negative = (model.encode_text([prompts.tokenize(text)]) for text in texts)
    x = noise(sampler["seed"], (3, 32, 32))[None]
    times = sampling.simple_schedule(sampler["steps"])
    for t, t_next in itertools.pairwise(times):
        at = torch.tensor([t])
        v_pos, v_neg = model.velocity(x, at, positive), model.velocity(x, at, negative)
        x = x + (t_next - t) * (v_neg + sampler["cfg"] * (v_pos - v_neg))


def cpu_ms(function: Callable[[], object], count: int) -> float:
    """CPU milliseconds per item of a call."""
    began = time.process_time()
    function()
    return (time.process_time() - began) / count * 1e3


def plain_jobs(store: ModelStore, steps: int, count: int) -> list[RenderJob]:
    """One checkpoint, one setting, different prompts and seeds."""
    name = store.catalogue.files_in("checkpoints")[0].name
    template = base_workflow(store.catalogue, name, steps, 2.5)
    specs = draw_prompts("test", count, DEMO_KINDS, 0)
    return [RenderJob(template.fill(spec.text, seed=k), str(k)) for k, spec in enumerate(specs)]


def mixed_jobs(store: ModelStore, count: int) -> tuple[list[RenderJob], list[str]]:
    """Random valid workflows as `build_triplets` draws them, and their prompts."""
    prior = PriorConfig()
    flows = draw_workflows(make_grammar(store.catalogue, prior.budget), prior, count, 0)
    flows.sort(key=batch_key)
    texts = [spec.text for spec in draw_prompts("train", min(count, 240), DEMO_KINDS, 0)]
    texts = [texts[k % len(texts)] for k in range(count)]
    jobs = [RenderJob(w.fill(texts[k], seed=k), str(k)) for k, w in enumerate(flows)]
    return jobs, texts


def render_shards(engine: Engine, jobs: Sequence[RenderJob]) -> list:
    """Render in shards, as the stages do."""
    results = []
    for first in range(0, len(jobs), SHARD):
        results += engine.render(jobs[first : first + SHARD])
    return results


def main() -> None:
    """Print a table; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", type=Path, help="folder with a catalogue; default: data/")
    parser.add_argument("--quick", action="store_true", help="fewer pictures and repeats")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats, count = (2, 128) if options.quick else (5, 512)
    engine = Engine(ModelStore.open(options.models))
    store = engine.store
    result: dict[str, float] = {"batch_size": BATCH_SIZE}
    with torch.inference_mode():
        for steps in STEPS:
            jobs = plain_jobs(store, steps, BATCH_SIZE)
            best = {"engine": float("inf"), "loop": float("inf")}
            engine.render(jobs)
            for _ in range(repeats):
                ours = cpu_ms(lambda jobs=jobs: engine.render(jobs), len(jobs))
                some = jobs[:8]
                theirs = cpu_ms(lambda some=some: [naive(store, job) for job in some], len(some))
                best = {"engine": min(best["engine"], ours), "loop": min(best["loop"], theirs)}
            result[f"euler_{steps}_steps_ms"] = round(best["engine"], 2)
            result[f"loop_{steps}_steps_ms"] = round(best["loop"], 2)
            result[f"ratio_{steps}_steps"] = round(best["loop"] / best["engine"], 2)
    jobs, texts = mixed_jobs(store, count)
    results = render_shards(engine, jobs)
    mixed = min(cpu_ms(lambda: render_shards(engine, jobs), count) for _ in range(2))
    rubric, images = shapes_rubric(), [r.image for r in results]
    scoring = min(cpu_ms(lambda: rubric.score(texts, images), count) for _ in range(2))
    flops = sum(r.flops for r in results) / count
    result["mixed_ms"], result["score_ms"] = round(mixed, 2), round(scoring, 2)
    result["mixed_gflop"] = round(flops / 1e9, 3)
    result["mixed_gflop_per_s"] = round(flops / mixed / 1e6, 1)
    for name, value in result.items():
        print(f"{name:24} {value}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
