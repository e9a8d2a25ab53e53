"""`design`: prompts to workflows with a registered model, rendered and scored if asked."""

from __future__ import annotations

import dataclasses
import json
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowloom.cli import OK, one_line
from flowloom.cli.catalogues import open_catalogue
from flowloom.cli.output import print_json, print_table, progress, warn
from flowloom.cli.parser import GUIDANCE
from flowloom.cli.sources import API
from flowloom.evaluation.describe import describe
from flowloom.runs import data_dir, write_json
from flowloom.workflow import Catalogue, Workflow
from flowloom.workflow.canvas import is_ui, to_ui

if TYPE_CHECKING:
    from flowloom.designer.design import Design

CHUNK_SIZE = 64


@dataclasses.dataclass
class Made:
    """One design on its way to the answer."""

    prompt: str
    """What it is for."""
    design: Design
    """The design, a template."""
    workflow: Workflow
    """The workflow with prompt and seed filled in."""
    name: str
    """Stem of its files."""
    value: Any
    """The workflow in the format that was asked for."""
    image: Any = None
    """Its picture, if rendered."""
    rendered_score: float | None = None
    """Score of that picture, if the rubric can judge the prompt."""
    images: list[str] = dataclasses.field(default_factory=list)
    """Where the picture was written."""

    def record(self) -> dict[str, Any]:
        """The design as `--json` prints it."""
        return {
            "workflow": self.value,
            "score": self.design.score,
            "interval": list(self.design.interval),
            "tokens": [int(token) for token in self.design.tokens],
            "fingerprint": self.design.fingerprint,
            "images": self.images,
            "rendered_score": self.rendered_score,
        }


def design(parsed: Namespace) -> int:
    """Design, then render and write what was asked for."""
    from flowloom.dataset.prompt_files import check_prompt
    from flowloom.lifecycle import registry

    for number, prompt in enumerate(parsed.prompts, start=1):
        check_prompt(prompt, f"prompt {number}")
    folder = registry.champion_dir(parsed.model or registry.CHAMPION_URI)

    from flowloom.designer.design import Designer

    designer = Designer.load(folder)
    catalogue = (
        None if parsed.catalogue is None else open_catalogue(parsed.catalogue, parsed.header)
    )
    found = designer.design(
        parsed.prompts,
        n=parsed.n,
        guidance=_guidance(parsed, folder),
        seed=parsed.seed,
        policy=parsed.policy,
        catalogue=catalogue,
        require=parsed.require,
        forbid=parsed.forbid,
    )
    nodes = catalogue or designer.catalogue
    made = [
        [
            _made(prompt, item, f"{stem}-{rank}", parsed, nodes)
            for rank, item in enumerate(items, start=1)
        ]
        for prompt, stem, items in zip(parsed.prompts, _stems(parsed.prompts), found, strict=True)
    ]
    flat = [item for items in made for item in items]
    if parsed.render:
        _render(flat, folder, catalogue)
    if parsed.out is not None:
        _write(flat, Path(parsed.out))
    if parsed.json:
        results = [
            {"prompt": prompt, "designs": [item.record() for item in items]}
            for prompt, items in zip(parsed.prompts, made, strict=True)
        ]
        print_json({"results": results})
        return OK
    for items in made:
        _print(items, designer.vocabulary if parsed.explain else None)
    if parsed.out is not None:
        print(f"written to {parsed.out}: {', '.join(item.name for item in flat)}")
    else:
        warn(f"--out DIR writes the workflows{' and pictures' if parsed.render else ''}")
    return OK


def _made(prompt: str, item: Design, name: str, parsed: Namespace, catalogue: Catalogue) -> Made:
    workflow = item.workflow.fill(prompt, seed=parsed.seed)
    value = workflow.to_api() if parsed.format == API else to_ui(workflow, catalogue)
    return Made(prompt, item, workflow, name, value)


def _guidance(parsed: Namespace, folder: Path) -> float:
    """What was asked for, else what the model was evaluated with."""
    if parsed.guidance is not None:
        return parsed.guidance
    return float(json.loads((folder / "config.json").read_text()).get("guidance", GUIDANCE))


def _render(items: Sequence[Made], folder: Path, catalogue: Catalogue | None) -> None:
    """Render every design once and score the picture against its prompt."""
    from flowloom.render.engine import Engine, RenderJob
    from flowloom.render.models import ModelStore
    from flowloom.score.rubric import shapes_rubric

    if catalogue is None:
        store = ModelStore.open(folder)
    else:
        store = ModelStore(catalogue, [folder / "models", data_dir() / "models"])
    engine, rubric = Engine(store), shapes_rubric()
    chunks = [items[first : first + CHUNK_SIZE] for first in range(0, len(items), CHUNK_SIZE)]
    strange: dict[str, str] = {}
    for chunk in progress(chunks, "rendering", len(chunks)):
        pictures = engine.render([RenderJob(item.workflow, item.name) for item in chunk])
        for item, picture in zip(chunk, pictures, strict=True):
            item.image = picture.image
            try:
                (row,) = rubric.score([item.prompt], [picture.image])
                item.rendered_score = row["score"]
            except ValueError as error:  # a prompt that the rubric cannot judge
                strange[item.prompt] = one_line(error)
    for message in strange.values():
        warn(f"not scored: {message}")


def _write(items: Sequence[Made], out: Path) -> None:
    """Write workflows, and the pictures that there are."""
    out.mkdir(parents=True, exist_ok=True)
    for item in items:
        write_json(out / f"{item.name}.json", item.value)
        if item.image is not None:
            from flowloom.render import png
            from flowloom.workflow.png import write_chunks

            path = out / f"{item.name}.png"
            png.write(path, item.image, item.workflow)
            if is_ui(item.value):
                write_chunks(path, {"workflow": json.dumps(item.value)})
            item.images = [str(path)]


def _print(items: Sequence[Made], vocabulary: Any) -> None:
    rows = []
    for rank, item in enumerate(items, start=1):
        said, (low, high) = describe(item.workflow), item.design.interval
        rendered = "" if item.rendered_score is None else f"{item.rendered_score:.3f}"
        rows.append(
            [
                rank,
                f"{item.design.score:.3f}",
                f"{low:.2f} to {high:.2f}",
                rendered,
                ", ".join(said.models),
                ", ".join(said.loras),
                "; ".join(said.sampling),
                "; ".join(said.extras),
            ]
        )
    columns = ["", "predicted", "one picture", "rendered", "model", "lora", "sampling", "more"]
    kept = [k for k in range(len(columns)) if k < 3 or any(row[k] for row in rows)]
    cells = [[row[k] for k in kept] for row in rows]
    print_table(items[0].prompt, [columns[k] for k in kept], cells)
    if vocabulary is not None:
        from flowloom.cli.encode import token_words

        for rank, item in enumerate(items, start=1):
            print(f"{rank}: {' '.join(token_words(vocabulary, item.design.tokens))}")


def _stems(prompts: Sequence[str]) -> list[str]:
    """A distinct file name stem for each prompt."""
    stems: list[str] = []
    for prompt in prompts:
        base = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "prompt"
        stem, number = base, 1
        while stem in stems:
            number += 1
            stem = f"{base}_{number}"
        stems.append(stem)
    return stems
