"""`score`: how well pictures show a prompt."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowloom.cli import OK, USAGE
from flowloom.cli.output import print_json, print_table, progress, warn

if TYPE_CHECKING:
    import numpy as np

MAX_PIXELS = 1 << 24
"""Of a picture: 4096 x 4096, far beyond the 32 x 32 at which all are judged."""


def score(parsed: Namespace) -> int:
    """Score pictures against one prompt; status 2 where a file is no picture."""
    from flowloom.score.rubric import get_rubric

    rubric = get_rubric(parsed.rubric)
    if rubric.needs_cost:
        raise ValueError(
            f"--rubric: got {rubric.name!r}, which needs counted costs, expected one that judges a "
            "picture alone"
        )
    files = list(_files(parsed.images))
    results: list[dict[str, Any]] = []
    # In batches, so that only a few pictures are held at once.
    starts = range(0, len(files), rubric.batch_size)
    for start in progress(starts, "scoring", len(starts)):
        part = files[start : start + rubric.batch_size]
        read = [_read(path) for path in part]
        images = [image for image in read if not isinstance(image, str)]
        rows = iter(rubric.score([parsed.prompt] * len(images), images))
        for path, image in zip(part, read, strict=True):
            if isinstance(image, str):
                warn(f"flowloom score: {path}: {image}")
                empty = {"path": str(path), "score": None, "breakdown": None, "error": image}
                results.append(empty)
                continue
            row = next(rows)
            # What a picture cost cannot be read off it.
            breakdown = {term.name: row[term.name] for term in rubric.terms}
            results.append({"path": str(path), "score": row["score"], "breakdown": breakdown})
    good = [result for result in results if result["score"] is not None]
    if parsed.json:
        print_json({"results": results})
    elif good:
        terms = [term.name for term in rubric.terms]
        cells = [
            [r["path"], f"{r['score']:.3f}", *(f"{r['breakdown'][t]:.3f}" for t in terms)]
            for r in good
        ]
        print_table(f"{parsed.prompt!r}, rubric {rubric.name}", ["picture", "score", *terms], cells)
    return OK if len(good) == len(results) else USAGE


def _files(texts: list[str]) -> Iterator[Path]:
    """The files named, and the .png files of the folders named."""
    for text in texts:
        path = Path(text)
        if not path.is_dir():
            yield path
            continue
        inside = sorted(path.rglob("*.png"))
        if not inside:
            raise ValueError(f"{path}: got a folder without .png files")
        yield from inside


def _read(path: Path) -> np.ndarray | str:
    """A picture `[3, 32, 32]` in [-1, 1], or why it cannot be read."""
    import numpy as np
    import torch
    from PIL import Image

    from flowloom.render.png import from_uint8
    from flowloom.shapes.detector import to_native

    try:
        with warnings.catch_warnings():
            # Of size, which is looked at below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = Image.open(path)
        with file:
            width, height = file.size
            if width * height > MAX_PIXELS:
                return f"got {width} x {height} pixels, expected at most {MAX_PIXELS} in all"
            image_CHW = from_uint8(np.asarray(file.convert("RGB")))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        # What a decoder raises depends on where the damage is.
        missing = isinstance(error, OSError) and error.strerror
        return missing or "got a file that cannot be read, expected a picture"
    return to_native(torch.from_numpy(image_CHW)[None])[0].numpy()
