"""`render`: workflows to pictures."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowloom.cli import NO, OK, USAGE, one_line
from flowloom.cli.output import print_json, progress
from flowloom.cli.sources import Inputs, Source, report_unreadable
from flowloom.workflow import Catalogue, Workflow

CHUNK_SIZE = 64


def render(parsed: Namespace) -> int:
    """Render workflows to PNG files that carry them; status 1 where one cannot be rendered."""
    sources = list(Inputs(parsed.paths))
    num_unreadable = sum(report_unreadable("render", source) for source in sources)
    if num_unreadable == len(sources) and not parsed.json:
        return USAGE

    from flowloom.render import png
    from flowloom.render.engine import Engine, RenderJob
    from flowloom.render.models import ModelStore

    store = ModelStore.open(parsed.catalogue_dir)
    engine = Engine(store)
    filled = [_fill(source, parsed, store.catalogue) for source in sources]
    names = picture_names([source.path for source in sources])
    out = Path(parsed.out)
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = [
        {"path": source.path, "images": [], "seconds": None, "error": _error(workflow)}
        for source, workflow in zip(sources, filled, strict=True)
    ]
    ready = [index for index, result in enumerate(results) if result["error"] is None]
    chunks = [ready[first : first + CHUNK_SIZE] for first in range(0, len(ready), CHUNK_SIZE)]
    for chunk in progress(chunks, "rendering", len(chunks)):
        started_s = time.perf_counter()
        jobs = [RenderJob(_filled(filled, index), sources[index].path) for index in chunk]
        rendered = _render_each(engine, jobs)
        seconds = (time.perf_counter() - started_s) / len(chunk)
        for index, picture in zip(chunk, rendered, strict=True):
            if isinstance(picture, str):
                results[index]["error"] = picture
                continue
            path = out / f"{names[index]}.png"
            png.write(path, picture.image, _filled(filled, index))
            results[index].update(images=[str(path)], seconds=round(seconds, 4))
    if parsed.json:
        print_json({"results": results})
    else:
        for source, result in zip(sources, results, strict=True):
            if source.error is None:
                print(f"{result['path']}: {result['error'] or ', '.join(result['images'])}")
    if num_unreadable:
        return USAGE
    return OK if all(result["images"] for result in results) else NO


def _render_each(engine: Any, jobs: Sequence[Any]) -> list[Any]:
    """A picture of each job, or why there is none; what fails is done again in halves."""
    try:
        return engine.render(jobs)
    except (ValueError, FloatingPointError) as error:
        if len(jobs) == 1:
            return [one_line(error)]
    middle = len(jobs) // 2
    return _render_each(engine, jobs[:middle]) + _render_each(engine, jobs[middle:])


def picture_names(paths: list[str]) -> list[str]:
    """A distinct file name (without suffix) for the picture of each path or `FILE:LINE`."""
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        name = Path(path).name
        file, separator, line = name.rpartition(":")
        stem = (file if separator else name).split(".")[0] or "workflow"
        base = f"{stem}-{int(line):05d}" if separator and line.isdigit() else stem
        candidate, number = base, 1
        while candidate in taken:
            number += 1
            candidate = f"{base}_{number}"
        taken.add(candidate)
        names.append(candidate)
    return names


def _fill(source: Source, parsed: Namespace, catalogue: Catalogue) -> Workflow | str:
    """The workflow to render, or why there is none."""
    try:
        workflow = source.workflow(catalogue)
    except ValueError as error:
        return one_line(error)
    if not is_template(workflow):
        return workflow
    if parsed.prompt is None:
        return "got a template with '{prompt}', expected --prompt TEXT to fill it"
    return workflow.fill(parsed.prompt, parsed.negative, parsed.seed)


def is_template(workflow: Workflow) -> bool:
    """Whether a text of the workflow holds a slot."""
    texts = (v for node in workflow.nodes.values() for v in node.inputs.values())
    return any(isinstance(v, str) and ("{prompt}" in v or "{negative}" in v) for v in texts)


def _error(filled: Workflow | str) -> str | None:
    return filled if isinstance(filled, str) else None


def _filled(filled: list[Workflow | str], index: int) -> Workflow:
    workflow = filled[index]
    assert isinstance(workflow, Workflow)
    return workflow
