"""Where a generator comes from, and what it is once it was written and read again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from flowloom.generator.adapters import Adapter
from flowloom.generator.config import TuneGeneratorConfig
from flowloom.generator.export import export, sd3_record
from flowloom.generator.exported import CHECKPOINT, FOLDERS, Exported
from flowloom.generator.velocity import Generator, ShapesFlow
from flowloom.processes import Processes
from flowloom.render.models import ModelStore
from flowloom.shapes.model import load
from flowloom.workflow import ModelFile


@dataclasses.dataclass(frozen=True)
class Source:
    """A generator and the record of the file or pipeline it comes from."""

    flow: Generator
    """What is to be tuned, as it is before."""
    record: ModelFile
    """What its base is called, its family and licence."""


def load_source(
    config: TuneGeneratorConfig, prompts: Sequence[str], processes: Processes
) -> Source:
    """Read what is to be tuned.

    Args:
        config: Says which one.
        prompts: All prompts it will be asked for.
        processes: Those that tune it together.

    Raises:
        ValueError: The base is not in the catalogue or not on disk, its configuration is wrong, or
            this process's GPU will not hold the run.
    """
    if config.sd3 is not None:
        return _load_sd3(config, prompts, processes)
    store = ModelStore.open(None)
    base = store.checkpoint(config.base)
    record = store.catalogue.file(FOLDERS[CHECKPOINT], config.base)
    assert record is not None, "the store has just loaded it"
    model = copy.deepcopy(base)
    if config.lora is None:
        flow = ShapesFlow(model.requires_grad_(True), config.guidance, base=base)
        return Source(flow, record)
    adapter = Adapter(model, config.lora, config.seed)
    return Source(ShapesFlow(model, config.guidance, base=base, adapter=adapter), record)


def write_source(config: TuneGeneratorConfig, source: Source, out: Path) -> tuple[Exported, Source]:
    """Write the tuned files and their records; return these, and the generator they load as."""
    flow = source.flow
    if isinstance(flow, ShapesFlow):
        model, adapter = flow.model, flow.adapter
    else:
        model, adapter = flow.transformer, flow.adapter  # type: ignore[attr-defined]
    exported = export(
        out, model=model, adapter=adapter, base=source.record, name=config.name, card=config.card
    )
    if not isinstance(flow, ShapesFlow):
        return exported, source
    loaded = load(out / "models" / FOLDERS[CHECKPOINT] / config.name)
    return exported, Source(ShapesFlow(loaded, config.guidance, base=flow.base), source.record)


def _load_sd3(config: TuneGeneratorConfig, prompts: Sequence[str], processes: Processes) -> Source:
    from flowloom.generator.memory import check_device
    from flowloom.generator.sd3 import load_sd3

    assert config.sd3 is not None, "asked by the caller"
    assert config.lora is not None, "checked by the configuration"
    check_device(config)
    flow = load_sd3(
        config.sd3,
        config.lora,
        prompts,
        guidance=config.guidance,
        seed=config.seed,
        processes=processes,
    )
    facts = flow.transformer.config
    dual = facts.get("dual_attention_layers", ())
    return Source(flow, sd3_record(config.sd3.name_or_path, facts["num_layers"], dual))
