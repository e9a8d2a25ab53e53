"""A designer for the catalogue of a real server, trained without a renderer.

    python -m benchmarks.server_designer [--quick] [--json] [--catalogue FILE] [--workflows PATH]
        [--steps N]

Runs the recipe `server` on the shipped catalogue `example` (ComfyUI 0.33 with common model files as
if installed) and the hundred prompts of `server_prompts.txt`: pairs, training, 500 designs, each
validated against the whole catalogue. Their structure stands beside that of the pairs and that of
people's text-to-image workflows: 64 templates for the shares of classes, 128 workflows for sizes,
157 templates for samplers. `--quick` trains for 40 steps on 2,000 pairs: it shows that all designs
are valid, not that they are alike. `--workflows` are a person's own, which pairs then follow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from flowloom import stages
from flowloom.dataset.pairs import read_pairs
from flowloom.designer.loading import load_policy
from flowloom.designer.rollout import rollout
from flowloom.designer.sft import is_valid
from flowloom.recipes import stage_config
from flowloom.render.model_records import save_catalogue
from flowloom.workflow import Catalogue, Grammar, Workflow, decode, encode
from flowloom.workflow.profile import text_to_image

CATALOGUE = "data/catalogues/example.json.gz"
PROMPTS = Path(__file__).parent / "server_prompts.txt"
NUM_DESIGNS, NUM_QUICK = 500, 100
REAL_SHARES = {
    "VAEDecode": 1.0, "CLIPTextEncode": 0.94, "SaveImage": 0.94, "KSampler": 0.75,
    "VAELoader": 0.72, "UNETLoader": 0.69, "CLIPLoader": 0.52, "EmptySD3LatentImage": 0.52,
    "EmptyLatentImage": 0.33, "CheckpointLoaderSimple": 0.31, "ModelSamplingAuraFlow": 0.30,
    "KSamplerSelect": 0.22, "ConditioningZeroOut": 0.20, "SamplerCustomAdvanced": 0.17,
    "LoraLoaderModelOnly": 0.14, "DualCLIPLoader": 0.13,
}  # fmt: skip
"""Share of template workflows that hold a class."""
REAL_SIZES = {"nodes_median": 10.5, "nodes_p90": 19, "tokens_median": 50, "tokens_p90": 90}
REAL_VALUES = {"sampler_name": {"euler": 0.75}, "scheduler": {"simple": 0.62, "normal": 0.29}}
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
LORAS = ("LoraLoader", "LoraLoaderModelOnly")
UPSCALERS = (
    "ImageUpscaleWithModel", "LatentUpscale", "LatentUpscaleBy", "ImageScale", "ImageScaleBy",
    "ImageScaleToTotalPixels",
)  # fmt: skip
FIELDS = ("sampler_name", "scheduler", "steps", "cfg", "width")
SHOWN_VALUES = 5
LOW_TEMPERATURE = 0.7


def structure(flows: list[Workflow], lengths: list[int]) -> dict:
    """Sizes, shares of classes and of values, and counts of samplers of some workflows."""
    classes = [[node.class_type for node in flow.nodes.values()] for flow in flows]
    nodes = [len(names) for names in classes]
    sizes = {
        "nodes_median": float(np.median(nodes)),
        "nodes_p90": float(np.percentile(nodes, 90)),
        "tokens_median": float(np.median(lengths)),
        "tokens_p90": float(np.percentile(lengths, 90)),
    }
    holding = Counter(name for names in classes for name in set(names))

    def share_with(group) -> float:
        return float(np.mean([any(name in group for name in names) for names in classes]))

    parts = {
        "any LoRA": share_with(LORAS),
        "any upscaling": share_with(UPSCALERS),
        "two passes or more": float(
            np.mean([sum(name in SAMPLERS for name in names) > 1 for names in classes])
        ),
    }
    values = {field: Counter() for field in FIELDS}
    for flow in flows:
        for node in flow.nodes.values():
            for field in FIELDS:
                value = node.inputs.get(field)
                if isinstance(value, (str, int, float)):
                    values[field][str(value)] += 1
    return {
        "sizes": sizes,
        "classes": {name: num / len(flows) for name, num in holding.most_common()},
        "parts": parts,
        "values": {
            field: {value: num / counts.total() for value, num in counts.most_common()}
            for field, counts in values.items()
        },
    }


def distance(first: dict[str, float], second: dict[str, float]) -> float:
    """Total variation between two distributions."""
    return sum(abs(first.get(n, 0) - second.get(n, 0)) for n in {*first, *second}) / 2


def train(home: Path, catalogue: Catalogue, workflows: str | None, quick: bool, steps: int | None):
    """The recipe's two stages; folders of both, seconds and final metrics."""
    folder = home / "server"
    folder.mkdir()
    save_catalogue(folder / "catalogue.json.gz", catalogue)
    given = {"prompts": {"prompts_file": str(PROMPTS)}}
    given |= {"workflows_file": workflows} if workflows else {}
    few_pairs = {"num_pairs": 2000} if quick else {}
    few_steps = {"prior_steps": 40, "num_samples": 20} if quick else {}
    few_steps |= {} if steps is None else {"prior_steps": steps}
    began = time.perf_counter()
    pairs = stages.run(
        "build_pairs",
        stage_config("server", "build_pairs", {**given, **few_pairs}),
        {"catalogue": folder},
    ).out_dir
    drawn = time.perf_counter()
    designer = stages.run(
        "train_sft",
        stage_config("server", "train_sft", few_steps),
        {"catalogue": folder, "pairs": pairs},
    )
    seconds = {"pairs_s": drawn - began, "train_s": time.perf_counter() - drawn}
    return pairs, designer, seconds


def measure(
    catalogue_file: str, workflows: str | None, quick: bool = False, steps: int | None = None
) -> dict:
    """All figures."""
    whole = Catalogue.load(catalogue_file)
    names = set(text_to_image(whole))
    nodes = {name: spec for name, spec in whole.nodes.items() if name in names}
    narrow = dataclasses.replace(whole, nodes=nodes)
    num = NUM_QUICK if quick else NUM_DESIGNS
    with tempfile.TemporaryDirectory() as home:
        os.environ["FLOWLOOM_HOME"] = home
        pairs, designer, seconds = train(Path(home), narrow, workflows, quick, steps)
        policy = load_policy(designer.out_dir)
        grammar = Grammar(narrow, budget=policy.config.num_workflow_tokens)
        lines = PROMPTS.read_text().splitlines()
        prompts = [line for line in lines if not line.startswith("#")]
        asked = [prompts[k % len(prompts)] for k in range(num)]
        began = time.perf_counter()
        tokens = rollout(policy, grammar, asked).tokens
        seconds["design_s"] = time.perf_counter() - began
        flows = [decode(row, grammar) for row in tokens]
        sharper = rollout(policy, grammar, asked, temperature=LOW_TEMPERATURE).tokens
        sharp_flows = [decode(row, grammar) for row in sharper]
        rows = read_pairs(pairs, columns=("workflow",))["workflow"][:2000]
        of_pairs = [Workflow.from_api(json.loads(row)) for row in rows]
        pair_lengths = [len(encode(flow, grammar).tokens) for flow in of_pairs]
    return {
        "classes_of_server": len(whole.nodes),
        "classes_written": len(narrow.nodes),
        "vocabulary": grammar.vocabulary.size,
        **seconds,
        "sft": designer.metrics,
        "designs": num,
        "valid": sum(is_valid(flow, whole) for flow in flows),
        "valid_sharper": sum(is_valid(flow, whole) for flow in sharp_flows),
        "distinct": len({flow.template_fingerprint() for flow in flows}),
        "structure": structure(flows, [len(row) for row in tokens]),
        "structure_sharper": structure(sharp_flows, [len(row) for row in sharper]),
        "structure_of_pairs": structure(of_pairs, pair_lengths),
    }


def show(result: dict) -> None:
    """Print a table: designs, sharper ones, pairs, people's workflows."""
    sides = [result[f"structure{name}"] for name in ("", "_sharper", "_of_pairs")]

    def row(name: str, values, real: float | None = None, digits: int = 2) -> None:
        known = [*values] if real is None else [*values, real]
        print(f"{name:32s}" + "".join(f"{value:10.{digits}f}" for value in known))

    for name in ("classes_of_server", "classes_written", "vocabulary", "designs", "distinct"):
        print(f"{name:32s}{result[name]:10d}")
    for name in ("pairs_s", "train_s", "design_s"):
        row(name, [result[name]], digits=1)
    for name, value in result["sft"].items():
        row(name, [value], digits=3)
    for name in ("valid", "valid_sharper"):
        print(f"{name:32s}{result[name]:10d} of {result['designs']}")
    print(
        f"\n{'':32s}{'designs':>10s}{f'at T {LOW_TEMPERATURE}':>10s}{'pairs':>10s}{'people':>10s}"
    )
    for name, real in REAL_SIZES.items():
        row(name, [side["sizes"][name] for side in sides], real, 1)
    for name, real in REAL_SHARES.items():
        row(name, [side["classes"].get(name, 0.0) for side in sides], real)
    off = [
        np.mean([abs(side["classes"].get(name, 0.0) - real) for name, real in REAL_SHARES.items()])
        for side in sides
    ]
    row("mean |share - people's|", off)
    for name in sides[0]["parts"]:
        row(name, [side["parts"][name] for side in sides])
    for field in FIELDS:
        values = [side["values"][field] for side in sides]
        known = REAL_VALUES.get(field, {})
        for value in list(values[-1])[:SHOWN_VALUES]:
            row(f"{field} {value}", [side.get(value, 0.0) for side in values], known.get(value))
        apart = [distance(side, values[-1]) for side in values[:-1]]
        row(f"{field}: total variation to pairs", apart)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server_designer")
    parser.add_argument("--quick", action="store_true", help="within a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    parser.add_argument("--catalogue", default=CATALOGUE, help="a catalogue with model files")
    parser.add_argument("--workflows", metavar="PATH", help="a person's workflows")
    parser.add_argument("--steps", type=int, help="training steps in place of the recipe's")
    options = parser.parse_args()
    result = measure(options.catalogue, options.workflows, options.quick, options.steps)
    show(result)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
