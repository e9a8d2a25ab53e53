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
from flowloom.cli.explanation import Explainer, lines
from flowloom.cli.output import print_json, print_table, printable, progress, warn
from flowloom.cli.parser import GUIDANCE
from flowloom.cli.sources import API
from flowloom.evaluation.describe import describe
from flowloom.runs import data_dir, write_json
from flowloom.workflow import Catalogue, Vocabulary, Workflow
from flowloom.workflow.canvas import is_ui, to_ui

if TYPE_CHECKING:
    from flowloom.designer.design import Budget, Design, Designer
    from flowloom.render.models import ModelStore

CHUNK_SIZE = 64
NUM_TIMED = 8
"""Random designs that are rendered to find out how fast this machine is."""


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
    explanation: dict[str, Any] | None = None
    """How it differs from known workflows, if asked for."""

    def record(self) -> dict[str, Any]:
        """The design as `--json` prints it."""
        interval = self.design.interval
        record = {
            "workflow": self.value,
            "score": self.design.score,
            "interval": None if interval is None else list(interval),
            "tokens": [int(token) for token in self.design.tokens],
            "fingerprint": self.design.fingerprint,
            "images": self.images,
            "rendered_score": self.rendered_score,
            "unfamiliar": self.design.unfamiliar,
        }
        if self.design.seconds is not None:
            record["seconds"] = self.design.seconds
        if self.explanation is not None:
            record["explanation"] = self.explanation
        return record


def design(parsed: Namespace) -> int:
    """Design, then render and write what was asked for."""
    from flowloom.dataset.prompt_files import check_prompt

    for number, prompt in enumerate(parsed.prompts, start=1):
        check_prompt(prompt, f"prompt {number}")
    folder = _folder(parsed.model)

    from flowloom.designer.design import Designer

    catalogue = (
        None if parsed.catalogue is None else open_catalogue(parsed.catalogue, parsed.header)
    )
    designer = Designer.load(folder, catalogue)
    found = designer.design(
        parsed.prompts,
        n=parsed.n,
        guidance=_guidance(parsed, folder),
        temperature=parsed.temperature,
        seed=parsed.seed,
        policy=parsed.policy,
        catalogue=catalogue,
        require=parsed.require,
        forbid=parsed.forbid,
        top_p=parsed.top_p,
        candidates=parsed.candidates,
        budget=_budget(parsed, designer, folder, catalogue),
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
    if parsed.explain:
        explainer = Explainer(designer.policies, nodes)
        for item in flat:
            item.explanation = explainer.explain(item.design.workflow)
    if parsed.render:
        _render(flat, _store(folder, catalogue))
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
        _print(items, designer.vocabulary if parsed.tokens else None)
    if any(item.design.unfamiliar for item in flat):
        warn("? after a score: the reward ensemble hardly knows such designs; --render shows more")
    if parsed.out is not None:
        print(f"written to {parsed.out}: {', '.join(item.name for item in flat)}")
    else:
        warn(f"--out DIR writes the workflows{' and pictures' if parsed.render else ''}")
    return OK


def _folder(model: str | None) -> Path:
    """Folder of what `--model` names, or of the champion."""
    if model is not None and (Path(model) / "vocabulary.json").is_file():
        return Path(model)
    from flowloom.lifecycle import registry

    return registry.champion_dir(model or registry.CHAMPION_URI)


def _made(prompt: str, item: Design, name: str, parsed: Namespace, catalogue: Catalogue) -> Made:
    workflow = item.workflow.fill(prompt, seed=parsed.seed)
    value = workflow.to_api() if parsed.format == API else to_ui(workflow, catalogue)
    return Made(prompt, item, workflow, name, value)


def _guidance(parsed: Namespace, folder: Path) -> float:
    """What was asked for, else what the model was evaluated with."""
    if parsed.guidance is not None:
        return parsed.guidance
    record = folder / "config.json"
    known = json.loads(record.read_text()) if record.is_file() else {}
    return float(known.get("guidance", GUIDANCE))


def _store(folder: Path, catalogue: Catalogue | None) -> ModelStore:
    """The model files to render with."""
    from flowloom.render.models import ModelStore

    if catalogue is None:
        return ModelStore.open(folder)
    return ModelStore(catalogue, [folder / "models", data_dir() / "models"])


def _budget(
    parsed: Namespace, designer: Designer, folder: Path, catalogue: Catalogue | None
) -> Budget | None:
    """What a render may take, with this machine's speed."""
    if parsed.budget_seconds is None:
        return None
    from flowloom.designer.design import Budget
    from flowloom.render.cost import CostMeter
    from flowloom.render.engine import FUNCTIONS

    limit = Budget(parsed.budget_seconds, lambda workflow: 0.0)  # checked before anything is timed
    strange = sorted((catalogue or designer.catalogue).nodes.keys() - FUNCTIONS.keys())
    if strange:
        raise ValueError(
            f"budget_seconds: got a catalogue with {strange[0]}, expected one that the embedded "
            "engine renders: only there is the cost of a workflow known"
        )
    meter, prompt = CostMeter(_store(folder, catalogue)), parsed.prompts[0]
    (timed,) = designer.design([prompt], n=NUM_TIMED, policy="random", catalogue=catalogue)
    speed = meter.measure([item.workflow.fill(prompt, seed=k) for k, item in enumerate(timed)])
    return dataclasses.replace(
        limit, seconds_of=lambda workflow: speed.seconds(meter.count(workflow))
    )


def _render(items: Sequence[Made], store: ModelStore) -> None:
    """Render every design once and score the picture against its prompt."""
    from flowloom.render.engine import Engine, RenderJob
    from flowloom.score.rubric import shapes_rubric

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


def _print(items: Sequence[Made], vocabulary: Vocabulary | None) -> None:
    rows = []
    for rank, item in enumerate(items, start=1):
        said = describe(item.workflow)
        rows.append(
            [
                rank,
                *_said(item),
                ", ".join(said.models),
                ", ".join(said.loras),
                "; ".join(said.sampling),
                "; ".join(said.extras),
            ]
        )
    scored = ["predicted", "one picture", "log p", "rendered", "seconds"]
    columns = ["", *scored, "model", "lora", "sampling", "more"]
    kept = [k for k in range(len(columns)) if any(row[k] for row in rows)]
    cells = [[row[k] for k in kept] for row in rows]
    print_table(items[0].prompt, [columns[k] for k in kept], cells)
    for rank, item in enumerate(items, start=1):
        if item.explanation is not None:
            print(f"design {rank}")
            for line in lines(item.explanation):
                print(printable(line))
        if vocabulary is not None:
            from flowloom.cli.encode import token_words

            print(f"{rank}: {' '.join(token_words(vocabulary, item.design.tokens))}")


def _said(item: Made) -> list[str]:
    """What is known of how good and how dear a design is; the log-probability without a score."""
    made = item.design
    shown = ["", "", "" if made.logprob is None else f"{made.logprob:.1f}"]
    if made.score is not None and made.interval is not None:
        low, high = made.interval
        shown = [
            f"{made.score:.3f}{'?' if made.unfamiliar else ''}",
            f"{low:.2f} to {high:.2f}",
            "",
        ]
    rendered = "" if item.rendered_score is None else f"{item.rendered_score:.3f}"
    return [*shown, rendered, "" if made.seconds is None else f"{made.seconds:.3f}"]


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
