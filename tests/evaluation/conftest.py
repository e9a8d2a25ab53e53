"""A made-up evaluation folder, generator folder and decision, in the shapes the stages write."""

import json
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.parts import write_parts

KINDS = ("colors", "counting", "single", "two")
MEANS = {
    "grpo": 0.512,
    "grpo_unguided": 0.486,
    "sft": 0.391,
    "sft_cold": 0.433,
    "best_fixed": 0.402,
    "retrieval": 0.447,
    "random": 0.171,
    "grpo_one": 0.478,
    "sft_one": 0.352,
}
PROMPTS = (
    ("three red circles", "counting"),
    ("a photo of a large star", "single"),
    ("please draw a cyan square", "colors"),
    ("a circle and a triangle", "two"),
)


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Artifacts of every stage before `evaluate`; read only."""
    return write_parts(tmp_path_factory.mktemp("parts"))


def _picture(path, seed):
    rng = np.random.default_rng(seed)
    pixels = np.full((32, 32, 3), 38, np.uint8)
    for _ in range(int(rng.integers(1, 4))):
        y, x = rng.integers(2, 20, 2)
        pixels[y : y + 9, x : x + 9] = rng.integers(60, 255, 3)
    Image.fromarray(pixels).save(path)


def _grid(path, seed):
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (200, 300, 3), dtype=np.uint8)).save(path)


def _policy(name, mean):
    offsets = zip(KINDS, (0.12, -0.1, 0.06, -0.08), strict=True)
    by_kind = {kind: round(mean + offset, 4) for kind, offset in offsets}
    return {
        "mean": mean,
        "se": 0.014,
        "by_kind": by_kind,
        "flops_mean": 2.1e8 + len(name) * 1e7,
        "predicted": mean + 0.03,
        "coverage": 0.875,
        "num_workflows": 131,
        "num_collapsed": 104,
        "similarity": 0.9634,
        "num_tokens": 31.2,
    }


@pytest.fixture
def evaluation_dir(tmp_path):
    folder = tmp_path / "evaluation"
    (folder / "pictures").mkdir(parents=True)
    ours = MEANS["grpo"]
    paired = {
        f"vs_{name}": {
            "mean": round(ours - mean, 4),
            "low": round(ours - mean - 0.03, 4),
            "high": round(ours - mean + 0.032, 4),
            "n": 160,
        }
        for name, mean in MEANS.items()
        if name != "grpo"
    }
    record = {
        "candidate": "grpo",
        "opponent": "best_fixed",
        "level": 0.95,
        "num_prompts": 160,
        "num_seeds": 2,
        "num_designs": 4,
        "guidance": 1.5,
        "paired": paired,
        "paired_by_kind": {
            "vs_best_fixed": {
                kind: {"mean": 0.1, "low": 0.1 - 0.05 * k, "high": 0.2, "n": 40}
                for k, kind in enumerate(KINDS)
            }
        },
        "policies": {name: _policy(name, mean) for name, mean in MEANS.items()},
        "designs": {"n": 5000, "valid": 5000, "decodable": 5000, "unique_frac": 0.21},
        "random_designs": {"n": 5000, "valid": 5000, "decodable": 5000, "unique_frac": 1.0},
        "predicted_vs_true": {"spearman": 0.62, "gap": 0.041},
        "coverage_level": 0.9,
        "num_known": 5120,
        "diversity": {"grpo": {"n": 500, "raw": 361, "collapsed": 243}},
        "choices": {
            "models": ["shapes-circle-star.safetensors", "shapes-warm.safetensors"],
            "rows": [
                {"word": "circle", "n": 41, "shares": [0.83, 0.17]},
                {"word": "red", "n": 18, "shares": [0.22, 0.78]},
            ],
        },
        "catalogue": {
            "hash": "5744926fb07b5bac56406eb1bfaeb34064c074a2",
            "files": [
                {
                    "folder": "checkpoints",
                    "name": "shapes-warm.safetensors",
                    "sha256": "3d9297d2c9e024",
                    "card": "red, orange <warm>",
                }
            ],
        },
    }
    (folder / "evaluation.json").write_text(json.dumps(record))
    examples = []
    for number, (prompt, kind) in enumerate(PROMPTS):
        designs = {}
        for name in ("grpo", "best_fixed"):
            renders = []
            for seed in range(2):
                file = f"pictures/{number}-{name}-{seed}.png"
                _picture(folder / file, zlib.crc32(file.encode()))
                renders.append({"seed": seed, "score": 0.4 + 0.1 * seed, "picture": file})
            designs[name] = {
                "models": ["shapes-circle-star"],
                "loras": ["shapes-two-objects 0.8"] if name == "grpo" else [],
                "sampling": ["16 steps, cfg 4, euler karras"],
                "extras": ["ImageSharpen sharpen_radius 1 sigma 0.5 alpha 0.2"],
                "renders": renders,
                "score": 0.5,
                "predicted": 0.55,
            }
        examples.append({"prompt": prompt, "kind": kind, "designs": designs})
    (folder / "examples.json").write_text(json.dumps({"examples": examples}))
    return folder


@pytest.fixture
def generator_dir(tmp_path):
    folder = tmp_path / "generator"
    folder.mkdir()
    _grid(folder / "grid.png", 0)
    (folder / "files.json").write_text(json.dumps([{"name": "shapes-base-fdfo.safetensors"}]))
    before = {"serve/score": 0.31, "serve/single": 0.4, "serve/out_of_range": 0.01}
    after = {"serve/score": 0.55, "serve/single": 0.7, "serve/out_of_range": 0.02}
    epochs = [{"images": 64 * (k + 1), "train/reward": 0.3 + 0.02 * k**0.7} for k in range(30)]
    curve = {"before": before, "after": after, "epochs": epochs}
    (folder / "curve.json").write_text(json.dumps(curve))
    return folder


@pytest.fixture
def decision_path(tmp_path):
    check = {"name": "paired difference, lower end", "value": 0.081, "bound": 0.0, "rule": ">"}
    designs = {"name": "valid designs", "value": 5000, "bound": 5000, "rule": "="}
    checks = [{**check, "holds": True}, {**designs, "holds": True}]
    path = tmp_path / "decision.json"
    path.write_text(json.dumps({"promoted": True, "opponent": "best_fixed", "checks": checks}))
    return path
