"""Where a generator comes from, and the files that it becomes once tuned."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from flowloom.generator.adapters import Adapter
from flowloom.generator.config import TuneGeneratorConfig
from flowloom.generator.export import CHECKPOINT, FOLDERS, Exported, export, sd3_record
from flowloom.generator.velocity import Generator, ShapesFlow
from flowloom.render.models import ModelStore
from flowloom.shapes.model import load


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


def write_generator(
    config: TuneGeneratorConfig, flow: Generator, out: Path
) -> tuple[Generator, Exported]:
    """Write what was tuned, with its catalogue records (`flowloom.generator.export`).

    Returns:
        What the files load as, and what was written.
    """
    facts = {"name": config.name, "card": config.card}
    if isinstance(flow, ShapesFlow):
        base = ModelStore.open(None).catalogue.file(FOLDERS[CHECKPOINT], config.base)
        assert base is not None, "the base was loaded from there"
        exported = export(out, model=flow.model, adapter=flow.adapter, base=base, **facts)
        tuned = load(out / "models" / FOLDERS[CHECKPOINT] / config.name)
        return ShapesFlow(tuned, config.guidance, base=flow.base), exported
    from flowloom.generator.sd3 import SD3Flow

    assert isinstance(flow, SD3Flow)
    assert config.sd3 is not None, "it was loaded from there"
    sizes = flow.transformer.config
    base = sd3_record(config.sd3.name_or_path, sizes.num_layers, sizes.dual_attention_layers)
    exported = export(out, model=flow.transformer, adapter=flow.adapter, base=base, **facts)
    return flow, exported
