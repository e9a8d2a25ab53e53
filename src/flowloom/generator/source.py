"""Where a generator comes from, and the files that it becomes once tuned."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from flowloom.generator.adapters import Adapter
from flowloom.generator.config import TuneGeneratorConfig
from flowloom.generator.lora_file import write_lora
from flowloom.generator.velocity import Generator, ShapesFlow
from flowloom.render.models import ModelStore, file_record
from flowloom.runs import write_json
from flowloom.shapes.model import ShapesModel, load, save

FOLDER = "checkpoints"
LORA_FOLDER = "loras"


def load_generator(config: TuneGeneratorConfig, prompts: Sequence[str]) -> Generator:
    """What is to be tuned, as it is before.

    Args:
        config: Says which one.
        prompts: All prompts it will be asked for.

    Raises:
        ValueError: The base is not in the catalogue or not on disk, or its configuration is wrong.
    """
    if config.sd3 is not None:
        from flowloom.generator.sd3 import load_sd3

        assert config.lora is not None, "checked by the configuration"
        return load_sd3(
            config.sd3, config.lora, prompts, guidance=config.guidance, seed=config.seed
        )
    base = ModelStore.open(None).checkpoint(config.base)
    model = copy.deepcopy(base)
    if config.lora is None:
        return ShapesFlow(model.requires_grad_(True), config.guidance, base=base)
    adapter = Adapter(model, config.lora, config.seed)
    return ShapesFlow(model, config.guidance, base=base, adapter=adapter)


def write_generator(config: TuneGeneratorConfig, flow: Generator, out: Path) -> Generator:
    """Write the tuned files and `file.json`, their catalogue record; return what they load as.

    A shapes checkpoint is written whole, and its LoRA beside it where it has one; of a pipeline
    only the LoRA.
    """
    if isinstance(flow, ShapesFlow):
        path = out / "models" / FOLDER / config.name
        save(path, _merged(flow))
        if flow.adapter is not None:
            write_lora(out / "models" / LORA_FOLDER / config.name, flow.adapter, "shapes")
        file = ModelStore.open(None).catalogue.file(FOLDER, config.base)
        assert file is not None, "the base was loaded from there"
        record = file_record(
            path,
            FOLDER,
            family=file.family,
            role=file.role,
            licence=file.licence,
            card=config.card,
        )
        write_json(out / "file.json", dataclasses.asdict(record))
        return ShapesFlow(load(path), config.guidance, base=flow.base)
    from flowloom.generator.sd3 import SD3Flow

    assert isinstance(flow, SD3Flow)
    path = out / "models" / LORA_FOLDER / config.name
    write_lora(path, flow.adapter, "diffusers")
    record = file_record(path, LORA_FOLDER, family="sd35", licence="", card=config.card)
    write_json(out / "file.json", dataclasses.asdict(record))
    return flow


def _merged(flow: ShapesFlow) -> ShapesModel:
    """The tuned model as one without an adapter."""
    if flow.adapter is None:
        return flow.model
    model = ShapesModel(flow.model.config)
    model.load_state_dict(flow.adapter.merged())
    return model
