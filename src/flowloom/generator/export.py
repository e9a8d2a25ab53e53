"""What a tuned run leaves for others: model files, their catalogue records, a card."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from flowloom.generator.adapters import Adapter
from flowloom.generator.exported import CHECKPOINT, FILES, FOLDERS, LORA, Exported
from flowloom.generator.lora_file import write_lora
from flowloom.render.files import check_name
from flowloom.render.model_records import file_record
from flowloom.runs import write_json
from flowloom.shapes.model import ShapesModel, save
from flowloom.workflow import ModelFile

# ComfyUI's names for SD3 models, by layers and whether some have a second attention.
_SD3_FAMILIES = {(24, False): "sd3-medium", (24, True): "sd35-medium", (38, False): "sd35-large"}
_SD3_LICENCE = "stabilityai-ai-community"


def export(
    out: Path, *, model: nn.Module, adapter: Adapter | None, base: ModelFile, name: str, card: str
) -> Exported:
    """Write what was tuned below `out`, and the records of it.

    Of a shapes model that is a checkpoint, with the adapter merged in, and the adapter as a LoRA if
    there is one; of an SD3 transformer the LoRA in diffusers' form.

    Args:
        out: Folder of the artifact; files go to `models/<folder>/<name>`, records to `files.json`.
        model: The tuned network.
        adapter: Its LoRA; None where all weights were tuned.
        base: Record of what was tuned: the files are of its family and under its licence.
        name: File name of the checkpoint; the LoRA's is `lora_name` of it.
        card: What the tuned generator is good for, in words.

    Raises:
        ValueError: There is nothing to write, or the LoRA does not fit its form.
    """
    check_name(name)
    is_shapes = isinstance(model, ShapesModel)
    if adapter is None and not is_shapes:
        raise ValueError(
            f"export: got a {type(model).__name__} without a LoRA, expected one: whole checkpoints "
            "are written of shapes models only"
        )
    files = []
    if isinstance(model, ShapesModel):
        path = out / "models" / FOLDERS[CHECKPOINT] / name
        save(path, model if adapter is None else merged(model, adapter))
        files.append(_record(path, CHECKPOINT, base, card))
    if adapter is not None:
        path = out / "models" / FOLDERS[LORA] / lora_name(name)
        write_lora(path, adapter, "shapes" if is_shapes else "diffusers")
        files.append(_record(path, LORA, base, f"LoRA for {base.name}: {card}"))
    write_json(out / FILES, [dataclasses.asdict(file) for file in files])
    return Exported(tuple(files), base)


def merged(model: ShapesModel, adapter: Adapter) -> ShapesModel:
    """A plain model that computes what the adapted one does; no gradients."""
    plain = ShapesModel(model.config)
    plain.load_state_dict(adapter.merged())
    return plain.eval().requires_grad_(False)


def lora_name(name: str) -> str:
    """File name of the LoRA of a tuned checkpoint: `<stem>-lora.safetensors`."""
    return f"{name.removesuffix('.safetensors')}-lora.safetensors"


def sd3_record(name: str, num_layers: int, dual_attention_layers: Sequence[int]) -> ModelFile:
    """A record of an SD3 transformer that is tuned, from its diffusers config.

    Args:
        name: Folder or hub name.
        num_layers: Its blocks.
        dual_attention_layers: Those with a second attention.
    """
    family = _SD3_FAMILIES.get((num_layers, bool(dual_attention_layers)), "")
    return ModelFile("", name, "", family, CHECKPOINT, _SD3_LICENCE)


def _record(path: Path, role: str, base: ModelFile, card: str) -> ModelFile:
    facts = {"family": base.family, "role": role, "licence": base.licence, "card": card}
    return file_record(path, FOLDERS[role], **facts)
