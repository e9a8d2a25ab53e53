"""Is the shapes world worth designing for? Forty workflows on held-out prompts, many seeds each.

    python -m benchmarks.world [--prompts N] [--seeds N] [--work DIR] [--grid PNG]
                               [--quick] [--json]

Every workflow draws every prompt with the same noises. On one half of the seeds the best workflow
for all prompts, for every kind and for every prompt is chosen, on the other half they are scored;
this is averaged over random halves, and the interval is a bootstrap over prompts in which the
choices are made anew. What luck adds is shown by choosing and scoring on the same half.

`--work` keeps the scores of every workflow, so that the same command goes on where it stopped.

Shapes: S workflows, P prompts, R seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from flowloom.dataset.prompts import draw_prompts
from flowloom.dataset.scoring import ScoredJob, Scorer
from flowloom.dataset.workflows import base_workflow
from flowloom.render.engine import Engine, RenderJob
from flowloom.render.models import ModelStore
from flowloom.render.png import to_uint8
from flowloom.render.pool import RenderPool
from flowloom.shapes.config import WorldConfig
from flowloom.shapes.prompts import KINDS, PromptSpec
from flowloom.workflow import Catalogue, Workflow

NUM_SPLITS = 40
NUM_RESAMPLES = 400
ROWS_PER_CHUNK = 64
SPECIALISTS = tuple(job.name.removeprefix("shapes-") for job in WorldConfig().specialists)


def _file(name: str) -> str:
    return f"shapes-{name}.safetensors"


def with_nodes(flow: Workflow, *chain: tuple[str, dict]) -> Workflow:
    """A copy with image nodes put before the output; each takes the one before as `image`."""
    api = flow.to_api()
    output = next(i for i, node in api.items() if node["class_type"] == "SaveImage")
    link = api[output]["inputs"]["images"]
    for number, (class_type, inputs) in enumerate(chain):
        takes_model = class_type == "ImageUpscaleWithModel"
        if takes_model:
            loader = {"class_type": "UpscaleModelLoader", "inputs": {"model_name": _file("x2")}}
            api[f"loader{number}"] = loader
            inputs = {"upscale_model": [f"loader{number}", 0]}
        api[f"image{number}"] = {"class_type": class_type, "inputs": {**inputs, "image": link}}
        link = [f"image{number}", 0]
    api[output]["inputs"]["images"] = link
    return Workflow.from_api(api)


def merged(flow: Workflow, other: str, ratio: float) -> Workflow:
    """A copy whose sampler uses a mixture of its checkpoint and another one."""
    api = flow.to_api()
    loader = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": _file(other)}}
    merge = {"model1": ["1", 0], "model2": ["other", 0], "ratio": ratio}
    api |= {"other": loader, "merge": {"class_type": "ModelMergeSimple", "inputs": merge}}
    sampler = next(node for node in api.values() if node["class_type"] == "KSampler")
    sampler["inputs"]["model"] = ["merge", 0]
    return Workflow.from_api(api)


def settings(catalogue: Catalogue) -> dict[str, list[tuple[str, Workflow]]]:
    """Forty named workflows by group; those of a group share their sampler runs."""

    def plain(name: str, steps: int, cfg: float, lora: str | None = None, **sampler) -> Workflow:
        lora_file = None if lora is None else _file(lora)
        return base_workflow(catalogue, _file(name), steps, cfg, lora=lora_file, **sampler)

    restore = (
        ("ImageUpscaleWithModel", {}),
        ("ImageScaleBy", {"upscale_method": "area", "scale_by": 0.5}),
    )
    sharpen = (("ImageSharpen", {"sharpen_radius": 1, "sigma": 0.5, "alpha": 0.25}),)
    flows: dict[str, list[tuple[str, Workflow]]] = {}
    for name in ("base", *SPECIALISTS):
        for cfg in (1.5, 3.0):
            flows[f"{name} 8/{cfg:g}"] = [(f"{name} 8/{cfg:g}", plain(name, 8, cfg))]
    for group in ("pairs 8/1.5", "counting 8/3", "base 8/3"):
        flow = flows[group][0][1]
        flows[group].append((f"{group} restored", with_nodes(flow, *restore)))
    for group in ("circle-star 8/1.5", "three 8/3"):
        flow = flows[group][0][1]
        flows[group].append((f"{group} sharpened", with_nodes(flow, *sharpen)))
    more = {
        "base + two-objects": plain("base", 8, 2.5, "two-objects"),
        "base + relations": plain("base", 8, 2.5, "relations"),
        "base + vivid": plain("base", 8, 2.5, "vivid"),
        "warm + vivid": plain("warm", 8, 2.0, "vivid"),
        "binding + relations": plain("binding", 8, 2.0, "relations"),
        "counting 16/2.5": plain("counting", 16, 2.5),
        "binding 16/2": plain("binding", 16, 2.0),
        "three 16/2.5": plain("three", 16, 2.5),
        "pairs 16/2.5": plain("pairs", 16, 2.5),
        "base 16/4": plain("base", 16, 4.0),
        "counting ancestral": plain("counting", 12, 2.5, sampler_name="euler_ancestral"),
        "three dpmpp_2m": plain("three", 8, 2.5, sampler_name="dpmpp_2m"),
        "square-triangle karras": plain("square-triangle", 8, 2.0, scheduler="karras"),
        "cool heun": plain("cool", 5, 2.0, sampler_name="heun"),
        "position x binding": merged(plain("position", 8, 2.0), "binding", 0.5),
    }
    return flows | {name: [(name, flow)] for name, flow in more.items()}


def jobs_of(
    flows: Sequence[tuple[str, Workflow]], specs: Sequence[PromptSpec], num_seeds: int
) -> Iterator[list[ScoredJob]]:
    """Chunks of jobs, each workflow of the group on the same rows."""
    rows = [(spec, seed) for spec in specs for seed in range(num_seeds)]
    for first in range(0, len(rows), ROWS_PER_CHUNK):
        yield [
            ScoredJob(workflow=flow.fill(spec.text, seed=seed), id=name, prompt=spec.text)
            for name, flow in flows
            for spec, seed in rows[first : first + ROWS_PER_CHUNK]
        ]


def score_all(specs: Sequence[PromptSpec], num_seeds: int, work: Path) -> dict[str, np.ndarray]:
    """Scores `[P, R]` of every workflow; groups already in `work` are read."""
    catalogue = Catalogue.load("embedded")
    scores = {}
    with RenderPool(None, 2, Scorer("shapes")) as pool:
        for group, flows in settings(catalogue).items():
            path = work / f"{group.replace('/', '-')}.npy"
            if not path.exists():
                began = time.perf_counter()
                parts = []
                for scored in pool.map(list(jobs_of(flows, specs, num_seeds))):
                    parts.append(np.reshape(scored.columns["score"], (len(flows), -1)))
                np.save(path, np.concatenate(parts, 1).reshape(len(flows), len(specs), num_seeds))
                print(f"{group}: {time.perf_counter() - began:.0f} s", flush=True)
            for (name, _), values in zip(flows, np.load(path), strict=True):
                scores[name] = values
    return scores


def choose(chosen_SP: np.ndarray, scored_SP: np.ndarray, kinds_P: np.ndarray) -> np.ndarray:
    """Means of what was chosen: `[fixed, per kind, per prompt]`."""
    prompts = np.arange(len(kinds_P))
    per_kind = np.empty(len(kinds_P))
    for kind in np.unique(kinds_P):
        inside = kinds_P == kind
        per_kind[inside] = scored_SP[chosen_SP[:, inside].mean(1).argmax(), inside]
    return np.array(
        [
            scored_SP[chosen_SP.mean(1).argmax()].mean(),
            per_kind.mean(),
            scored_SP[chosen_SP.argmax(0), prompts].mean(),
        ]
    )


def halves(scores_SPR: np.ndarray, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Means `[S, P]` over two random halves of the seeds, `NUM_SPLITS` times."""
    rng = np.random.default_rng(seed)
    num_seeds = scores_SPR.shape[2]
    for _ in range(NUM_SPLITS):
        order = rng.permutation(num_seeds)
        one, other = order[: num_seeds // 2], order[num_seeds // 2 :]
        yield scores_SPR[..., one].mean(2), scores_SPR[..., other].mean(2)


def analyse(scores_SPR: np.ndarray, kinds_P: np.ndarray) -> dict[str, float]:
    """What choosing per kind and per prompt gains over the best fixed workflow."""
    splits = list(halves(scores_SPR))
    fixed, per_kind, per_prompt = np.mean([choose(a, b, kinds_P) for a, b in splits], 0)
    same = np.mean([choose(a, a, kinds_P)[2] - choose(a, a, kinds_P)[0] for a, _ in splits])
    rng = np.random.default_rng(1)
    gains = []
    for number in range(NUM_RESAMPLES):
        sample = rng.integers(len(kinds_P), size=len(kinds_P))
        a, b = splits[number % NUM_SPLITS]
        means = choose(a[:, sample], b[:, sample], kinds_P[sample])
        gains.append(means[2] - means[0])
    low, high = np.quantile(gains, [0.025, 0.975])
    return {
        "best_fixed": float(fixed),
        "per_kind": float(per_kind),
        "oracle": float(per_prompt),
        "oracle_minus_fixed": float(per_prompt - fixed),
        "interval_low": float(low),
        "interval_high": float(high),
        "within_kinds": float(per_prompt - per_kind),
        "on_the_same_half": float(same),
    }


def winners(
    names: Sequence[str], scores_SPR: np.ndarray, kinds_P: np.ndarray
) -> list[dict[str, object]]:
    """Per kind: the best workflow, what choosing per prompt adds, and who wins how many prompts.

    A prompt's winner is chosen on the even seeds; winner and the kind's best are scored on the odd.
    """
    chosen, scored = scores_SPR[..., ::2].mean(2), scores_SPR[..., 1::2].mean(2)
    rows = []
    for kind in dict.fromkeys(kinds_P.tolist()):
        inside = np.flatnonzero(kinds_P == kind)
        best = chosen[:, inside].mean(1).argmax()
        top = chosen[:, inside].argmax(0)
        rows.append(
            {
                "kind": kind,
                "prompts": len(inside),
                "best": names[best],
                "best_mean": float(scored[best, inside].mean()),
                "per_prompt_mean": float(scored[top, inside].mean()),
                "fixed_overall": float(scored[chosen.mean(1).argmax(), inside].mean()),
                "winners": Counter(names[s] for s in top).most_common(4),
            }
        )
    return rows


def draw_grid(
    path: Path, names: Sequence[str], scores_SPR: np.ndarray, specs: Sequence[PromptSpec]
) -> None:
    """A picture: prompts down, workflows across, one seed each; the winner's frame is green."""
    flows = {n: f for group in settings(Catalogue.load("embedded")).values() for n, f in group}
    means_SP = scores_SPR.mean(2)
    rows = [p for kind in KINDS for p in [i for i, s in enumerate(specs) if s.kind == kind][:2]]
    columns = list(dict.fromkeys(["base 8/3", *(names[means_SP[:, p].argmax()] for p in rows)]))
    engine = Engine(ModelStore.open())
    jobs = [
        RenderJob(flows[c].fill(specs[p].text, seed=3), f"{c} {p}") for p in rows for c in columns
    ]
    pictures = iter(engine.render(jobs))
    cell, left, top = 84, 300, 60
    sheet = Image.new("RGB", (left + cell * len(columns), top + cell * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for x, name in enumerate(columns):
        for line, word in enumerate(name.split()):
            pen.text((left + x * cell + 4, 4 + 13 * line), word, fill="black")
    for y, p in enumerate(rows):
        pen.text((4, top + y * cell + 34), specs[p].text, fill="black")
        best = names[means_SP[:, p].argmax()]
        for x, name in enumerate(columns):
            image = Image.fromarray(to_uint8(next(pictures).image)).resize((64, 64), 0)
            corner = (left + x * cell + 6, top + y * cell + 2)
            sheet.paste(image, corner)
            score = means_SP[names.index(name), p]
            color = "green" if name == best else "lightgray"
            box = (corner[0] - 2, corner[1] - 2, corner[0] + 65, corner[1] + 65)
            pen.rectangle(box, outline=color, width=2)
            pen.text(
                (corner[0] + 20, corner[1] + 67),
                f"{score:.2f}",
                fill=color if name == best else "black",
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def report(names: Sequence[str], scores_SPR: np.ndarray, kinds_P: np.ndarray) -> dict[str, object]:
    """Print tables as markdown; returns the figures."""
    means_SP = scores_SPR.mean(2)
    kinds = list(dict.fromkeys(kinds_P.tolist()))
    print("| workflow | all | " + " | ".join(kinds) + " |\n|---" + "|---" * (len(kinds) + 1) + "|")
    tops = {kind: means_SP[:, kinds_P == kind].mean(1).max() for kind in kinds}
    for s in np.argsort(-means_SP.mean(1)):
        cells = []
        for kind in kinds:
            value = means_SP[s, kinds_P == kind].mean()
            cells.append(f"**{value:.2f}**" if value > tops[kind] - 1e-9 else f"{value:.2f}")
        print(f"| {names[s]} | {means_SP[s].mean():.3f} | " + " | ".join(cells) + " |")
    print("\n| kind | n | best fixed of all | best of the kind | | best per prompt | won by |")
    print("|---|---|---|---|---|---|---|")
    rows = winners(names, scores_SPR, kinds_P)
    for row in rows:
        won = ", ".join(f"{name} {count}" for name, count in row["winners"])
        means = (f"{row[name]:.2f}" for name in ("fixed_overall", "best_mean", "per_prompt_mean"))
        fixed, best, per_prompt = means
        print(
            f"| {row['kind']} | {row['prompts']} | {fixed} | {best} | {row['best']} "
            f"| {per_prompt} | {won} |"
        )
    figures = analyse(scores_SPR, kinds_P)
    print()
    print("  ".join(f"{key} {value:.3f}" for key, value in figures.items()))
    return {**{key: round(value, 4) for key, value in figures.items()}, "kinds": rows}


def main() -> None:
    """Print the tables and figures."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts, kinds in turn")
    parser.add_argument("--seeds", type=int, default=64, help="noises per prompt and workflow")
    parser.add_argument(
        "--work", type=Path, help="folder of finished scores; a temporary one without it"
    )
    parser.add_argument("--grid", type=Path, help="PNG of pictures to write")
    parser.add_argument("--quick", action="store_true", help="14 prompts, 4 seeds")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_prompts, num_seeds = (14, 4) if options.quick else (options.prompts, options.seeds)
    specs = draw_prompts("test", num_prompts, KINDS, seed=7)
    kinds = np.array([spec.kind for spec in specs])
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        scores = score_all(specs, num_seeds, work)
        seconds = time.perf_counter() - began
    names, scores_SPR = list(scores), np.stack(list(scores.values()))
    figures = report(names, scores_SPR, kinds)
    print(f"{scores_SPR.size} renders, {seconds:.0f} s")
    if options.grid:
        draw_grid(options.grid, names, scores_SPR, specs)
    if options.json:
        print(json.dumps({**figures, "renders": scores_SPR.size, "workflows": len(names)}))


if __name__ == "__main__":
    main()
