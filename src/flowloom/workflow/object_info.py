"""What a ComfyUI server answers to `GET /object_info`, read as node classes and model files."""

from __future__ import annotations

import http.client
import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from flowloom.workflow.graph import json_fault
from flowloom.workflow.inputs import (
    CHOICE,
    GROWING,
    LITERAL_TYPES,
    InputSpec,
    NodeSpec,
    spec_fault,
)

# Literals that the editor edits in its own way and whose facts do not say so.
_EDITOR_TYPES = frozenset(
    {"AUDIO_RECORD", "COLOR", "CURVE", "IMAGECOMPARE", "LOAD_3D", "LOAD_3D_ANIMATION", "WEBCAM"}
)

# Which folder of the server feeds an input: by class and input, then by input name.
_FOLDER_OF = {
    "CLIPVisionLoader.clip_name": "clip_vision",
    "CustomCombo.choice": None,
    "DiffusersLoader.model_path": "diffusers",
    "FrameInterpolationModelLoader.model_name": "frame_interpolation",
    "LTXAVTextEncoderLoader.text_encoder": "text_encoders",
    "LatentUpscaleModelLoader.model_name": "latent_upscale_models",
    "LoadDA3Model.model_name": "geometry_estimation",
    "LoadMediaPipeFaceLandmarker.model_name": "mediapipe",
    "LoadMoGeModel.model_name": "geometry_estimation",
    "LoadTrainingDataset.folder_name": "datasets",
    "ModelPatchLoader.name": "model_patches",
    "OpticalFlowLoader.model_name": "optical_flow",
    "UpscaleModelLoader.model_name": "upscale_models",
    "audio_encoder_name": "audio_encoders",
    "bg_removal_name": "background_removal",
    "ckpt_name": "checkpoints",
    "clip_name": "text_encoders",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "clip_name3": "text_encoders",
    "clip_name4": "text_encoders",
    "config_name": "configs",
    "control_net_name": "controlnet",
    "gligen_name": "gligen",
    "hypernetwork_name": "hypernetworks",
    "lora_name": "loras",
    "photomaker_model_name": "photomaker",
    "style_model_name": "style_models",
    "unet_name": "diffusion_models",
    "vae_name": "vae",
}
# Options that people write in the editor: the server takes any.
_FREE_OPTIONS = {"CustomCombo.choice"}
# What lies in the server's input folder is listed by kind: a sound is no choice for a picture.
INPUT_FOLDER = "input"
_INPUT_KINDS = {
    "image_upload": INPUT_FOLDER,
    "audio_upload": f"{INPUT_FOLDER}/audio",
    "video_upload": f"{INPUT_FOLDER}/video",
    "file_upload": f"{INPUT_FOLDER}/files",
}
_INPUT_FILES = {
    "LoadImage.image": INPUT_FOLDER,
    "LoadImageMask.image": INPUT_FOLDER,
    "LoadImageOutput.image": INPUT_FOLDER,
    "LoadLatent.latent": f"{INPUT_FOLDER}/latents",
}
_MALFORMED = (TypeError, KeyError, AttributeError, IndexError, ValueError, OverflowError)
# What a proxy answers to someone who does not say who they are.
_REFUSED = (401, 403, 407)
# More inputs than a growing one has in any server.
_MAX_GROWN = 1_000


def read_nodes(info: Mapping[str, Any]) -> tuple[dict[str, NodeSpec], list[tuple[str, str]]]:
    """Node classes by name, and every (folder, file name) that their lists name.

    Raises:
        ValueError: an entry does not look like one of `object_info`; the message names the class.
    """
    nodes: dict[str, NodeSpec] = {}
    files: dict[tuple[str, str], None] = {}
    for class_type, raw in info.items():
        try:
            inputs = tuple(_inputs(class_type, raw["input"], raw.get("input_order"), files))
            outputs = tuple("COMBO" if isinstance(o, list) else str(o) for o in raw["output"])
            names = tuple(map(str, raw.get("output_name") or ()))
            nodes[class_type] = NodeSpec(
                class_type,
                inputs,
                outputs,
                bool(raw.get("output_node", False)),
                () if names == outputs or len(names) != len(outputs) else names,
                bool(raw.get("deprecated", False)),
            )
            fault = spec_fault(nodes[class_type])
            if fault:
                raise ValueError(fault)
        except (*_MALFORMED, RecursionError) as error:
            raise ValueError(
                f"class {str(class_type)[:60]}: got {type(error).__name__} {str(error)[:200]}, "
                "expected input and output as in object_info"
            ) from error
    return nodes, list(files)


def _inputs(
    class_type: str,
    sections: Mapping[str, Any],
    order: Mapping[str, Any] | None,
    files: dict[tuple[str, str], None],
) -> Iterator[InputSpec]:
    for section in ("required", "optional"):
        entries = sections.get(section) or {}
        for name in (order or {}).get(section, entries):
            yield _input(class_type, name, entries[name], section == "required", files)


def _input(
    class_type: str, name: str, entry: Any, required: bool, files: dict[tuple[str, str], None]
) -> InputSpec:
    kind, facts = entry[0], (entry[1] if len(entry) > 1 and entry[1] else {})
    if kind == CHOICE:
        branches = tuple(
            (option["key"], tuple(_inputs(class_type, option["inputs"], None, files)))
            for option in facts["options"]
        )
        keys = tuple(key for key, _ in branches)
        return InputSpec(
            name, CHOICE, required, facts.get("default"), options=keys, branches=branches
        )
    if kind == GROWING:
        return _growing(class_type, name, facts["template"], required, files)
    options = tuple(kind) if isinstance(kind, list) else None
    if options is None and kind == "COMBO":
        options = tuple(facts.get("options") or ())
    folder = None if options is None else _folder(class_type, name, facts, options)
    if folder is not None:
        files.update(dict.fromkeys((folder, str(file)) for file in options or ()))
        options = None
    type_ = "COMBO" if isinstance(kind, list) else str(kind)
    force = bool(facts.get("forceInput", False))
    return InputSpec(
        name,
        type_,
        required,
        facts.get("default"),
        _number(facts.get("min")),
        _number(facts.get("max")),
        _number(facts.get("step")),
        options,
        folder,
        bool(facts.get("multiline", False)),
        not force and _is_editor_type(f"{class_type}.{name}", type_, facts),
        force,
        bool(facts.get("control_after_generate", False)),
        any(facts.get(key) for key in _INPUT_KINDS),
        bool(facts.get("multiselect", False)),
        dynamic_prompt=bool(facts.get("dynamicPrompts", False)),
    )


def _growing(
    class_type: str,
    name: str,
    template: Mapping[str, Any],
    required: bool,
    files: dict[tuple[str, str], None],
) -> InputSpec:
    (element,) = _inputs(class_type, template["input"], None, files)
    names = template.get("names")
    if names is None:
        most = int(template["max"])
        if most > _MAX_GROWN:
            raise ValueError(f"{name[:40]}: up to {most} inputs, expected at most {_MAX_GROWN}")
        names = [f"{template['prefix']}{k}" for k in range(most)]
    return InputSpec(
        name,
        GROWING,
        required,
        element=element,
        names=tuple(map(str, names)),
        min_count=int(template.get("min", 0)),
    )


def _number(bound: Any) -> float | None:
    """A bound or a step; what is no finite number says nothing, as some packs of nodes have it."""
    is_number = type(bound) in (int, float) and abs(bound) < math.inf and not json_fault(bound)
    return bound if is_number else None


def _is_editor_type(address: str, type_: str, facts: Mapping[str, Any]) -> bool:
    if type_ in LITERAL_TYPES:
        return address in _FREE_OPTIONS
    known = "default" in facts or "widgetType" in facts or facts.get("socketless")
    return bool(known) or type_ in _EDITOR_TYPES


def _folder(
    class_type: str, name: str, facts: Mapping[str, Any], options: tuple[Any, ...]
) -> str | None:
    """Folder of the files that a COMBO lists; None where its options are no files."""
    address = f"{class_type}.{name}"
    uploaded = next((kind for key, kind in _INPUT_KINDS.items() if facts.get(key)), None)
    if address in _INPUT_FILES or uploaded is not None:
        return str(facts.get("image_folder", _INPUT_FILES.get(address, uploaded)))
    if address in _FOLDER_OF:
        return _FOLDER_OF[address]
    return _FOLDER_OF.get(name)


def fetch(url: str, headers: Mapping[str, str] | None = None, timeout_s: float = 30.0) -> Any:
    """The parsed answer of a server's `GET /object_info`.

    Args:
        url: Address of the server, with a path prefix where a proxy adds one; the route itself may
            be left out.
        headers: Further headers, such as a proxy's authorisation.
        timeout_s: Seconds until an unreachable server is given up.

    Raises:
        ValueError: no such answer; the message names the address and the cause.
    """
    return get_json(f"{server_address(url)}/object_info", headers, timeout_s)


def server_address(url: str) -> str:
    """Address of the server itself: `url` without a last slash and without the route."""
    return url.rstrip("/").removesuffix("/object_info")


def get_json(address: str, headers: Mapping[str, str] | None, timeout_s: float) -> Any:
    """The parsed JSON that a server answers to one GET.

    Raises:
        ValueError: no such answer; the message names the address and the cause.
    """
    try:
        request = urllib.request.Request(address)
        for name, value in (headers or {}).items():
            # A sign-in page that a proxy sends one to must not learn what opens the server.
            request.add_unredirected_header(name, value)
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            kind, body = answer.headers.get_content_type(), answer.read()
    except urllib.error.HTTPError as error:
        asks = ", or a header that lets one in" if error.code in _REFUSED else ""
        raise ValueError(
            f"{address}: got HTTP {error.code}, expected a ComfyUI server{asks}"
        ) from error
    except http.client.IncompleteRead as error:
        raise ValueError(f"{address}: the answer broke off, expected a ComfyUI server") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)
        raise ValueError(f"{address}: {cause}; expected a ComfyUI server") from error
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        if kind != "application/json":
            got = f"{kind}, expected JSON of a ComfyUI server"
        else:
            got = f"JSON that cannot be read ({error}), expected a whole answer"
        raise ValueError(f"{address}: got {got}") from error
