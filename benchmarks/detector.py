"""What the detector sees on drawn scenes, how it gives way under damage, and what it costs.

    python -m benchmarks.detector [--num N] [--quick] [--json]

Prints markdown. Scenes: half are what `sample_prompt` and `compose` give for all kinds; a quarter
`lattice`: 1 to 8 small shapes 8 px apart anywhere, of one colour or shape or of many; a quarter
`anywhere`: up to 8 shapes of both sizes on any pixel, boxes at least 1 px apart. An object counts
as seen if shape, colour, size and centre are all exactly right. Damage is measured on a fifth of
the drawn scenes. Milliseconds are CPU time of one thread per picture in batches of 32, the best of
interleaved repeats; `plain` is the detector as it was, every quantity at every place.

Shapes: B pictures, C channels, Y rows, X columns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from flowloom.score.rubric import get_rubric
from flowloom.shapes import detector, drawing
from flowloom.shapes.drawing import PIXELS, SIZE, Placed
from flowloom.shapes.prompts import COLORS, KINDS, SHAPES, SIZES, PromptSpec, sample_prompt
from tests.shapes import dense_detector

Scene = tuple[Placed, ...]
Damage = Callable[[np.ndarray, Scene, np.random.Generator], np.ndarray]
BATCH_SIZE = 32


def pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    """One value, uniformly."""
    return values[int(rng.integers(len(values)))]


def lattice(rng: np.random.Generator) -> Scene:
    """Small shapes 8 px apart: 1 px between their boxes."""
    cells = rng.permutation(9)[: rng.integers(1, detector.NUM_DETECTIONS + 1)]
    row, column = rng.integers(4, 13, 2)
    shapes = SHAPES if rng.random() < 0.5 else (pick(rng, SHAPES),)
    colors = COLORS if rng.random() < 0.5 else (pick(rng, COLORS),)
    return tuple(
        Placed(
            pick(rng, shapes), pick(rng, colors), "small", row + 8 * (c // 3), column + 8 * (c % 3)
        )
        for c in cells.tolist()
    )


def add(scene: Scene, rng: np.random.Generator, colors: Sequence[str], sizes=SIZES) -> Scene:
    """The scene and one more object where there is room; the scene alone where none was found."""
    size = pick(rng, sizes)
    half = PIXELS[size] // 2
    for row, column in rng.integers(half, SIZE - half, (200, 2)).tolist():
        apart = [
            max(abs(row - other.row), abs(column - other.column)) - half - PIXELS[other.size] // 2
            for other in scene
        ]
        if all(pixels > 1 for pixels in apart):
            return (*scene, Placed(pick(rng, SHAPES), pick(rng, colors), size, row, column))
    return scene


def anywhere(rng: np.random.Generator) -> Scene:
    """Shapes on any pixel, of one colour or of many."""
    colors = COLORS if rng.random() < 0.5 else (pick(rng, COLORS),)
    scene: Scene = ()
    for _ in range(int(rng.integers(1, detector.NUM_DETECTIONS + 1))):
        scene = add(scene, rng, colors)
    return scene


def judge(images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """Scenes and objects, how many were seen exactly, and extra objects."""
    found = detector.find(torch.from_numpy(images))
    exact, right, extra = 0, 0, 0
    for scene, seen in zip(scenes, found, strict=True):
        names = [item.placed for item in seen]
        hits = len(set(scene) & set(names))
        exact += hits == len(scene) == len(names)
        right += hits
        extra += len(names) - hits
    objects = sum(len(scene) for scene in scenes)
    return {
        "scenes": len(scenes),
        "exact scenes": exact,
        "objects": objects,
        "exact objects": right,
        "extra": extra,
    }


def noise(sd: float) -> Damage:
    """Normal noise on every value."""
    return lambda image, scene, rng: image + rng.normal(0, sd, image.shape)


def blur(weight: float) -> Damage:
    """A 3 x 3 box blur mixed in."""

    def apply(image: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        padded = F.pad(torch.from_numpy(image)[None], (1, 1, 1, 1), mode="replicate")
        return (1 - weight) * image + weight * F.avg_pool2d(padded, 3, 1)[0].numpy()

    return apply


def patches(count: int, sides: Sequence[int]) -> Damage:
    """Squares of a palette colour anywhere, also on the objects."""

    def apply(image: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        image = image.copy()
        for _ in range(count):
            side = sides[int(rng.integers(len(sides)))]
            y, x = rng.integers(0, SIZE - side + 1, 2)
            tint = np.array(drawing.PALETTE[pick(rng, COLORS)])
            image[:, y : y + side, x : x + side] = tint[:, None, None]
        return image

    return apply


def more_shapes(count: int) -> Damage:
    """Small shapes that nobody asked for, beside the objects."""

    def apply(image: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        for _ in range(count):
            scene = add(scene, rng, COLORS, ("small",))
        return drawing.draw(scene)

    return apply


DAMAGES: dict[str, Damage] = {
    "none": lambda image, scene, rng: image,
    **{f"noise, sd {sd}": noise(sd) for sd in (0.1, 0.2, 0.3, 0.5, 0.8)},
    **{f"blur 3 x 3, share {w}": blur(w) for w in (0.25, 0.5, 0.75, 1.0)},
    **{f"{k} specks of 1 px": patches(k, (1,)) for k in (4, 16, 64)},
    **{f"{k} patches of 2 to 4 px": patches(k, (2, 3, 4)) for k in (1, 2, 4, 8)},
    **{f"{k} more shapes": more_shapes(k) for k in (1, 2)},
    "noise alone": lambda image, scene, rng: rng.normal(0, 1, image.shape),
}


def degradation(
    images: np.ndarray, scenes: Sequence[Scene], specs: Sequence[PromptSpec]
) -> dict[str, dict[str, float]]:
    """Objects and scores by damage."""
    rows = {}
    texts = [spec.text for spec in specs]
    for name, damage in DAMAGES.items():
        rng = np.random.default_rng(1)
        damaged = np.stack(
            [damage(i, s, rng).astype(np.float32) for i, s in zip(images, scenes, strict=True)]
        )
        rows[name] = judge(damaged, scenes) | scores(texts, damaged, specs)
    order = np.random.default_rng(2).permutation(len(specs))
    shuffled = [specs[i] for i in order]
    rows["other prompts"] = scores([spec.text for spec in shuffled], images, shuffled)
    return rows


def scores(
    texts: Sequence[str], images: np.ndarray, specs: Sequence[PromptSpec]
) -> dict[str, float]:
    """Mean terms of the rubric `shapes`; faithfulness by kind."""
    rows = get_rubric("shapes").score(texts, list(images))
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("score", "crispness")}
    faithful = np.array([row["faithfulness"] for row in rows])
    kinds = np.array([spec.kind for spec in specs])
    means["faithfulness"] = float(faithful.mean())
    for kind in KINDS:
        means[kind] = float(faithful[kinds == kind].mean())
    return means


def clean(images: np.ndarray, specs: Sequence[PromptSpec]) -> dict[str, dict[str, float]]:
    """Mean and worst faithfulness of undamaged drawings by kind."""
    faithful = detector.score(torch.from_numpy(images), specs).numpy()
    kinds = np.array([spec.kind for spec in specs])
    parts = {kind: faithful[kinds == kind] for kind in KINDS}
    return {
        kind: {"n": len(part), "mean": float(part.mean()), "worst": float(part.min())}
        for kind, part in parts.items()
    }


def speed(
    images: np.ndarray, texts: Sequence[str], repeats: int
) -> dict[str, dict[str, float | bool]]:
    """CPU ms per picture in batches: the plain detector, the fast one, the whole rubric."""
    rubric = get_rubric("shapes")
    rng = np.random.default_rng(3)
    sets = {
        "drawn": images,
        "noise, sd 0.3": noise(0.3)(images, (), rng).astype(np.float32),
        "noise alone": rng.normal(0, 1, images.shape).astype(np.float32),
    }
    rows: dict[str, dict[str, float | bool]] = {}
    for name, pictures in sets.items():
        batches = [
            (torch.from_numpy(pictures[i : i + BATCH_SIZE]), texts[i : i + BATCH_SIZE])
            for i in range(0, len(pictures), BATCH_SIZE)
        ]
        ways: dict[str, Callable[[torch.Tensor, Sequence[str]], object]] = {
            "plain": lambda x, texts: dense_detector.detect(x),
            "fast": lambda x, texts: detector.detect(x),
            "rubric": lambda x, texts: rubric.score(texts, list(x.numpy())),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(repeats):
            for way, call in ways.items():
                began = time.process_time()
                for x, part in batches:
                    call(x, part)
                best[way] = min(best[way], (time.process_time() - began) / len(pictures) * 1e3)
        pairs = [(dense_detector.detect(x), detector.detect(x)) for x, _ in batches]
        rows[name] = {**best, "same": all(agree(plain, fast) for plain, fast in pairs)}
    return rows


def agree(plain: detector.Detections, fast: detector.Detections, tolerance: float = 1e-5) -> bool:
    """Whether both saw the same: equal centres, the rest within the tolerance."""
    seen_BO = plain.exists_BO > 0
    centers = bool((plain.centers_BO2 == fast.centers_BO2)[seen_BO].all())
    exists = bool(torch.allclose(plain.exists_BO, fast.exists_BO, atol=tolerance))
    odds = (plain.attributes_BOSZK - fast.attributes_BOSZK)[seen_BO]
    return centers and exists and bool((odds.abs() < tolerance).all())


def table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A markdown table; floats with three digits."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in line] for line in lines]
    rows = [list(header), ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def main() -> None:
    """Print the tables; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num", type=int, default=10_000, help="scenes (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="400 scenes: half a minute")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num = 400 if options.quick else options.num
    rng = np.random.default_rng(0)
    specs = [sample_prompt(rng, size_frac=0.5) for _ in range(num // 2)]
    families = {
        "drawn": [drawing.compose(spec, rng) for spec in specs],
        "lattice": [lattice(rng) for _ in range(num // 4)],
        "anywhere": [anywhere(rng) for _ in range(num - num // 2 - num // 4)],
    }
    images = {
        name: np.stack([drawing.draw(scene) for scene in scenes])
        for name, scenes in families.items()
    }
    seen = {name: judge(images[name], scenes) for name, scenes in families.items()}
    scenes = [scene for family in families.values() for scene in family]
    pictures = np.concatenate(list(images.values()))
    sizes = np.array([len(scene) for scene in scenes])
    for size in sorted(set(sizes.tolist())):
        rows = np.flatnonzero(sizes == size)
        seen[f"{size} objects"] = judge(pictures[rows], [scenes[row] for row in rows])
    seen["all"] = judge(pictures, scenes)
    print(table(("", *seen["all"]), [(name, *row.values()) for name, row in seen.items()]))

    by_kind = clean(images["drawn"], specs)
    lines = [(kind, *(row.values())) for kind, row in by_kind.items()]
    print(table(("faithfulness of clean drawings", "n", "mean", "worst"), lines))

    some = slice(0, max(num // 10, 200))
    damaged = degradation(images["drawn"][some], families["drawn"][some], specs[some])
    for row in damaged.values():
        if "objects" in row:
            row["objects seen"] = row["exact objects"] / row["objects"]
            row["extra"] = row["extra"] / row["scenes"]
    columns = ("objects seen", "extra", "faithfulness", "crispness", "score", *KINDS)
    lines = [(name, *(row.get(c, "-") for c in columns)) for name, row in damaged.items()]
    print(table(("damage", *columns), lines))

    texts = [spec.text for spec in specs]
    size = min(256, len(texts))
    costs = speed(images["drawn"][:size], texts[:size], 2 if options.quick else 6)
    lines = [(name, *row.values()) for name, row in costs.items()]
    print(table(("ms per picture", "plain", "fast", "rubric, fast", "same detections"), lines))
    if options.json:
        print(json.dumps({"seen": seen, "clean": by_kind, "damage": damaged, "ms": costs}))


if __name__ == "__main__":
    main()
