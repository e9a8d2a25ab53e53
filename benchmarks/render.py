"""How fast the embedded engine renders, and what batching and reuse bring.

    python -m benchmarks.render [--models DIR] [--quick] [--json]

Milliseconds are CPU time of one thread per picture, so that other load on the machine matters
little; what is compared is run in turn, and the best of the repeats counts.

bare      the network calls of a batch in a plain loop: no nodes, no samplers, texts encoded before
engine    the same pictures from workflows
alone     the engine with one workflow per call
variants  pictures that differ behind the sampler only, beside as many different ones
mixed     random workflows in shards, sorted, as `build_triplets` renders them; scoring apart
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from flowloom.dataset.config import PriorConfig
from flowloom.dataset.prompts import draw_prompts
from flowloom.dataset.workflows import base_workflow, draw_workflows, make_grammar
from flowloom.render import schedules
from flowloom.render.batch import noise
from flowloom.render.engine import BATCH_SIZE, Engine, RenderJob, RenderResult, batch_key
from flowloom.render.models import ModelStore
from flowloom.score.rubric import shapes_rubric
from flowloom.shapes import prompts
from flowloom.shapes.model import Conditioning
from flowloom.workflow import Workflow

SHARD = 64
STEPS = (4, 8, 20)
CFG = 2.5
BEHIND: tuple[tuple[str, dict], ...] = (
    ("ImageSharpen", {"sharpen_radius": 1, "sigma": 1.0, "alpha": 0.3}),
    ("ImageBlur", {"blur_radius": 1, "sigma": 0.5}),
    ("ImageScaleBy", {"upscale_method": "lanczos", "scale_by": 1.5}),
)


def bare(store: ModelStore, jobs: Sequence[RenderJob], steps: int) -> Callable[[], torch.Tensor]:
    """A loop over the network calls of one batch of guided Euler runs."""
    model = store.checkpoint(store.catalogue.files_in("checkpoints")[0].name)
    texts = [
        [n.inputs["text"] for n in job.workflow.nodes.values() if "text" in n.inputs]
        for job in jobs
    ]
    positive, negative = (
        model.encode_text([prompts.tokenize(row[slot]) for row in texts]) for slot in (0, 1)
    )
    keys = model.text_keys(Conditioning.cat([positive, negative]))
    start = torch.stack([noise(k, (3, 32, 32)) for k in range(len(jobs))])

    def loop() -> torch.Tensor:
        x = start
        for t, t_next in itertools.pairwise(schedules.schedule("simple", steps)):
            times = torch.full((2 * len(x),), t)
            x0_pos, x0_neg = model(torch.cat([x, x]), times, keys).chunk(2)
            x0 = torch.lerp(x0_neg, x0_pos, CFG)
            x = torch.lerp(x0, x, t_next / t)
        return x.clamp(-1, 1)

    return loop


def cpu_ms(function: Callable[[], object], count: int) -> float:
    """CPU milliseconds per item of a call."""
    began = time.process_time()
    function()
    return (time.process_time() - began) / count * 1e3


def race(rivals: dict[str, Callable[[], object]], count: int, repeats: int) -> dict[str, float]:
    """Best CPU milliseconds per item of each, run in turn."""
    best = dict.fromkeys(rivals, float("inf"))
    for _ in range(repeats):
        for name, function in rivals.items():
            best[name] = min(best[name], cpu_ms(function, count))
    return best


def plain_jobs(store: ModelStore, steps: int, count: int) -> list[RenderJob]:
    """One checkpoint, one setting, different prompts and seeds."""
    name = store.catalogue.files_in("checkpoints")[0].name
    template = base_workflow(store.catalogue, name, steps, CFG)
    specs = draw_prompts("test", count, prompts.KINDS, 0)
    return [RenderJob(template.fill(spec.text, seed=k), str(k)) for k, spec in enumerate(specs)]


def variant_jobs(jobs: Sequence[RenderJob]) -> list[RenderJob]:
    """Each workflow as it is, and with each of `BEHIND` before its output."""
    made = []
    for job in jobs:
        api = job.workflow.to_api()
        output = next(i for i, node in api.items() if node["class_type"] == "SaveImage")
        made.append(job)
        for class_type, inputs in BEHIND:
            image = api[output]["inputs"]["images"]
            added = {"class_type": class_type, "inputs": {"image": image, **inputs}}
            save = {"class_type": "SaveImage", "inputs": {"images": ["behind", 0]}}
            workflow = Workflow.from_api(api | {"behind": added, output: save})
            made.append(RenderJob(workflow, f"{job.id} {class_type}"))
    return made


def mixed_jobs(store: ModelStore, count: int) -> tuple[list[RenderJob], list[str]]:
    """Random valid workflows as `build_triplets` draws them, and their prompts."""
    prior = PriorConfig()
    flows = draw_workflows(make_grammar(store.catalogue, prior.budget), prior, count, 0)
    flows.sort(key=batch_key)
    texts = [spec.text for spec in draw_prompts("train", min(count, 240), prompts.KINDS, 0)]
    texts = [texts[k % len(texts)] for k in range(count)]
    jobs = [RenderJob(w.fill(texts[k], seed=k), str(k)) for k, w in enumerate(flows)]
    return jobs, texts


def render_shards(engine: Engine, jobs: Sequence[RenderJob]) -> list[RenderResult]:
    """Render in shards, as the stages do."""
    results = []
    for first in range(0, len(jobs), SHARD):
        results += engine.render(jobs[first : first + SHARD])
    return results


def one_by_one(engine: Engine, jobs: Sequence[RenderJob]) -> list[RenderResult]:
    """Render without batches and without reuse."""
    return [engine.render([job])[0] for job in jobs]


def measure(engine: Engine, repeats: int, count: int) -> dict[str, float]:
    """All figures by name."""
    store, found = engine.store, {"batch_size": float(BATCH_SIZE)}
    for steps in STEPS:
        jobs = plain_jobs(store, steps, BATCH_SIZE)
        loop = bare(store, jobs, steps)
        pictures = torch.from_numpy(np.stack([r.image for r in engine.render(jobs)]))
        found[f"difference_{steps}_steps"] = float((pictures - loop()).abs().max())
        rivals = {
            "bare": loop,
            "engine": lambda jobs=jobs: engine.render(jobs),
            "alone": lambda jobs=jobs: one_by_one(engine, jobs),
        }
        best = race(rivals, len(jobs), repeats)
        found |= {f"{name}_{steps}_steps_ms": value for name, value in best.items()}
        found[f"overhead_{steps}_steps_percent"] = (best["engine"] / best["bare"] - 1) * 100
        found[f"batching_{steps}_steps_gain"] = best["alone"] / best["engine"]

    different = plain_jobs(store, 8, BATCH_SIZE)
    variants = variant_jobs(different[: BATCH_SIZE // (1 + len(BEHIND))])
    best = race(
        {
            "variants": lambda: engine.render(variants),
            "different": lambda: engine.render(different),
        },
        BATCH_SIZE,
        repeats,
    )
    found |= {f"{name}_8_steps_ms": value for name, value in best.items()}
    found["reuse_gain"] = best["different"] / best["variants"]

    jobs, texts = mixed_jobs(store, count)
    results = render_shards(engine, jobs)
    rubric, images = shapes_rubric(), [result.image for result in results]
    best = race(
        {
            "mixed": lambda: render_shards(engine, jobs),
            "score": lambda: rubric.score(texts, images),
        },
        count,
        2,
    )
    found |= {f"{name}_ms": value for name, value in best.items()}
    flops = sum(result.flops for result in results) / count
    found["mixed_gflop"] = flops / 1e9
    found["mixed_gflop_per_s"] = flops / best["mixed"] / 1e6
    few = jobs[:: max(count // 48, 1)]
    gaps = [
        float(np.abs(alone.image - results[int(job.id)].image).max())
        for job, alone in zip(few, one_by_one(engine, few), strict=True)
    ]
    found["mixed_alone_difference"] = max(gaps)
    return found


def main() -> None:
    """Print a table; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", type=Path, help="folder with a catalogue; default: data/")
    parser.add_argument("--quick", action="store_true", help="fewer pictures and repeats")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine(ModelStore.open(options.models))
    with torch.inference_mode():
        found = measure(engine, *((2, 128) if options.quick else (5, 512)))
    rounded = {name: float(f"{value:.3g}") for name, value in found.items()}
    for name, value in rounded.items():
        print(f"{name:28} {value:g}")
    if options.json:
        print(json.dumps(rounded))


if __name__ == "__main__":
    main()
