"""A workflow in a few words, for tables and reports."""

from __future__ import annotations

import dataclasses

from flowloom.workflow import Link, Workflow

_IGNORED = frozenset(
    {"CLIPTextEncode", "ConditioningZeroOut", "EmptyLatentImage", "VAEDecode", "SaveImage"}
)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a person wants to know of a workflow."""

    models: tuple[str, ...]
    """Checkpoint files, in order of use, without folder and suffix."""
    loras: tuple[str, ...]
    """LoRA files with their strength on the model, such as `two-objects 0.8`."""
    sampling: tuple[str, ...]
    """One entry per sampler, such as `16 steps, cfg 4, euler karras`."""
    extras: tuple[str, ...]
    """Any other node, such as `ImageSharpen alpha 0.5`."""
    size: str
    """Size of the first latent, such as `32x32`, or nothing."""

    @property
    def steps(self) -> str:
        """Sampling steps, `8 + 4` for two samplers."""
        return " + ".join(text.split(" ")[0] for text in self.sampling)

    @property
    def text(self) -> str:
        """All on one line."""
        parts = [*self.models, *(f"+ {lora}" for lora in self.loras), *self.sampling, *self.extras]
        return "; ".join(parts)


def describe(workflow: Workflow) -> Description:
    """Say in a few words what the part of a workflow that its outputs reach does."""
    models: dict[str, None] = {}
    loras: list[str] = []
    sampling: list[str] = []
    extras: list[str] = []
    size = ""
    for node_id in workflow.order():
        node = workflow.nodes[node_id]
        values = {k: v for k, v in node.inputs.items() if not isinstance(v, Link)}
        if "ckpt_name" in values:
            models[stem(str(values["ckpt_name"]))] = None
        elif "lora_name" in values:
            strength = values.get("strength_model", 1.0)
            loras.append(f"{stem(str(values['lora_name']))} {_number(strength)}")
        elif "steps" in values:
            said = [f"{values['steps']} steps"]
            if "cfg" in values:
                said.append(f"cfg {_number(values['cfg'])}")
            names = [str(values[name]) for name in ("sampler_name", "scheduler") if name in values]
            text = ", ".join([*said, " ".join(names)] if names else said)
            denoise = values.get("denoise", 1.0)
            sampling.append(text if denoise == 1.0 else f"{text}, denoise {_number(denoise)}")
        elif node.class_type not in _IGNORED:
            inputs = [f"{k} {_number(v)}" for k, v in values.items() if not isinstance(v, str)]
            extras.append(" ".join([node.class_type, *inputs]))
        elif "width" in values and not size:
            size = f"{values['width']}x{values.get('height')}"
    return Description(tuple(models), tuple(loras), tuple(sampling), tuple(extras), size)


def stem(name: str) -> str:
    """A model file's name without folder and suffix."""
    return name.rpartition("/")[2].removesuffix(".safetensors")


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
