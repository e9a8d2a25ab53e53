"""The card of a tuned generator: what it is, how it was made, what it does better, how to use it.

A card is a function of configuration, records and figures alone: no time, no path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from flowloom.generator.config import TuneGeneratorConfig
from flowloom.generator.exported import CHECKPOINT, LORA, Exported
from flowloom.workflow import ModelFile

CARD = "README.md"
IMAGES = "generator/images"
"""Figure that a card needs: pictures rendered for tuning."""
_COMFYUI = """\
ComfyUI: put `{lora}` into `models/loras`. In the workflow, load {base}, send its model through the
node *LoraLoaderModelOnly* with `lora_name` `{lora}` and `strength_model` 1.0, and sample as before.
Lower strengths lie between the base (0) and the tuned model (1)."""
_DIFFUSERS = """\
diffusers:

    pipeline = StableDiffusion3Pipeline.from_pretrained("{base}")
    pipeline.load_lora_weights("{lora}")"""
_EMBEDDED = """\
flowloom: load `{base}` and send model and clip through *LoraLoader* with `lora_name` `{lora}`; both
strengths 1.0 give the tuned model, 0 the base."""
_CHECKPOINT = """\
flowloom: load `{checkpoint}` with *CheckpointLoaderSimple*, in place of `{base}`."""


def write_card(
    path: Path,
    config: TuneGeneratorConfig,
    exported: Exported,
    metrics: Mapping[str, float],
    comparisons: Sequence[str] = (),
) -> None:
    """Write the card.

    Args:
        path: File to write, in Markdown.
        config: Of the run.
        exported: The tuned files.
        metrics: Final figures: `IMAGES`, and those called `<name>_before` and `<name>_after`.
        comparisons: More of what was found, one line each.
    """
    files, base = exported.files, exported.base
    parts = [
        _front(files, base),
        f"# {files[0].name.removesuffix('.safetensors')}\n\n{_sentence(config.card)}",
        "## How it was made\n\n" + _table(("", ""), _facts(config, base, metrics)),
        "## Before and after\n\n" + _figures(metrics, comparisons),
        "## Use\n\n" + "\n\n".join(_usage(files, base)),
        "## Files\n\n" + _table(("file", "sha256"), [(f.name, f.sha256) for f in files]),
        f"## Licence\n\n{base.licence or 'that of the base'}, as {base.name}.",
    ]
    path.write_text("\n\n".join(parts) + "\n")


def _front(files: Sequence[ModelFile], base: ModelFile) -> str:
    """The block that model hubs read."""
    lines = [f"base_model: {base.name}", "pipeline_tag: text-to-image"]
    if base.licence:
        lines.insert(0, f"license: {base.licence.lower()}")
    if any(file.role == LORA for file in files):
        lines.append("tags: [lora]")
    return "\n".join(["---", *lines, "---"])


def _facts(
    config: TuneGeneratorConfig, base: ModelFile, metrics: Mapping[str, float]
) -> list[tuple[str, str]]:
    method = dataclasses.asdict(config.method)
    lora, images = config.lora, int(metrics[IMAGES])
    steps = images // config.images_per_epoch * config.num_minibatches
    tuned = "all weights"
    if lora is not None:
        tuned = f"LoRA of rank {lora.rank}, alpha {lora.alpha}, on {', '.join(lora.target_modules)}"
    return [
        ("base", base.name + (f" ({base.family})" if base.family else "")),
        ("method", _first_line(config.method)),
        ("its settings", ", ".join(f"{k} {v}" for k, v in method.items() if v is not None)),
        ("tuned", tuned),
        ("reward", config.rubric if isinstance(config.rubric, str) else config.rubric.name),
        ("optimiser steps", f"{steps}, peak learning rate {config.lr}"),
        ("pictures rendered", f"{images:,}"),
        ("sampling while tuned", f"{config.num_steps} steps, guidance {config.guidance or 'none'}"),
        ("seed", str(config.seed)),
    ]


def _figures(metrics: Mapping[str, float], comparisons: Sequence[str]) -> str:
    rows = []
    for key in metrics:
        name = key.removesuffix("_before")
        # Standard errors stand beside what they belong to.
        if name != key and not name.endswith("_se") and f"{name}_after" in metrics:
            cells = [_with_error(metrics, name, side) for side in ("before", "after")]
            rows.append([name.removeprefix("generator/"), *cells])
    said = ["\n".join(f"- {line}" for line in comparisons)] if comparisons else []
    said += [_table(("on held-out prompts", "before", "after"), rows)] if rows else []
    return "\n\n".join(said) or "Not measured."


def _with_error(metrics: Mapping[str, float], name: str, side: str) -> str:
    error = metrics.get(f"{name}_se_{side}")
    value = f"{metrics[f'{name}_{side}']:.3f}"
    return value if error is None else f"{value} +- {error:.3f}"


def _usage(files: Sequence[ModelFile], base: ModelFile) -> list[str]:
    names = {file.role: file.name for file in files}
    known = {"base": base.name, "lora": names.get(LORA), "checkpoint": names.get(CHECKPOINT)}
    if CHECKPOINT not in names:
        forms = [_COMFYUI, _DIFFUSERS]
    else:
        forms = [_CHECKPOINT] + ([_EMBEDDED] if LORA in names else [])
    return [form.format(**known) for form in forms]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _first_line(value: object) -> str:
    return (type(value).__doc__ or type(value).__name__).partition("\n")[0].rstrip(".")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
