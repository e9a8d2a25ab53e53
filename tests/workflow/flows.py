"""Hand-written workflows and catalogues that the tests of this folder share."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np

from flowloom.workflow import Catalogue, Grammar, ModelFile, Workflow

# Classes of the embedded catalogue that draw with KSampler alone.
SMALL = (
    "CheckpointLoaderSimple", "LoraLoader", "CLIPTextEncode", "ConditioningZeroOut",
    "EmptyLatentImage", "KSampler", "LatentUpscaleBy", "VAEDecode", "ImageScaleBy",
    "ImageSharpen", "ImageBlur", "SaveImage",
)  # fmt: skip

FILES = {
    "checkpoints": ("base", "circle-star", "square-triangle", "warm", "cool", "counting", "pairs"),
    "loras": ("two-objects", "binding"),
    "upscale_models": ("x2",),
}

# The plain text-to-image flow in the form ComfyUI saves it, every value on the embedded grids.
PLAIN: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["4", 0],
            "seed": 0,
            "steps": 8,
            "cfg": 2.5,
            "sampler_name": "euler",
            "scheduler": "karras",
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
            "denoise": 1.0,
        },
        "_meta": {"title": "KSampler"},
    },
    "4": {
        "class_type": "CheckpointLoaderSimple",
        "inputs": {"ckpt_name": "shapes-warm.safetensors"},
    },
    "5": {
        "class_type": "EmptyLatentImage",
        "inputs": {"width": 32, "height": 32, "batch_size": 1},
    },
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "{prompt}", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "{negative}", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "flowloom"}},
}

# Its code, written down by hand from the rules in `codec`.
PLAIN_CODE = [
    "SaveImage",
    "VAEDecode",
    "KSampler",
    "CheckpointLoaderSimple",
    "checkpoints/shapes-warm.safetensors",
    "steps=8",
    "cfg=2.5",
    "sampler=euler",
    "scheduler=karras",
    "CLIPTextEncode",
    "<prompt>",
    "<ref0>",
    "CLIPTextEncode",
    "<negative>",
    "<ref0>",
    "EmptyLatentImage",
    "px=32",
    "px=32",
    "batch=1",
    "denoise=1.0",
    "<ref0>",
    "prefix=flowloom",
    "<eos>",
]


def plain_api(**changes: Any) -> dict[str, Any]:
    """`PLAIN` with inputs replaced: n3_cfg=7.0 changes "cfg" of node 3; None removes it."""
    api = copy.deepcopy(PLAIN)
    for key, value in changes.items():
        node, _, name = key[1:].partition("_")
        if value is None:
            del api[node]["inputs"][name]
        else:
            api[node]["inputs"][name] = value
    return api


def plain(**changes: Any) -> Workflow:
    return Workflow.from_api(plain_api(**changes))


def two_pass() -> Workflow:
    """A second sampler at 48 pixels, and a LoRA before both."""
    api = copy.deepcopy(PLAIN)
    api["10"] = {
        "class_type": "LoraLoader",
        "inputs": {
            "model": ["4", 0],
            "clip": ["4", 1],
            "lora_name": "shapes-two-objects.safetensors",
            "strength_model": 0.75,
            "strength_clip": 1.0,
        },
    }
    api["11"] = {
        "class_type": "LatentUpscaleBy",
        "inputs": {"samples": ["3", 0], "upscale_method": "bilinear", "scale_by": 1.5},
    }
    api["12"] = copy.deepcopy(api["3"])
    api["12"]["inputs"].update(latent_image=["11", 0], denoise=0.5, steps=6)
    for node in ("3", "12"):
        api[node]["inputs"]["model"] = ["10", 0]
    for node in ("6", "7"):
        api[node]["inputs"]["clip"] = ["10", 1]
    api["8"]["inputs"]["samples"] = ["12", 0]
    return Workflow.from_api(api)


def _file(folder: str, name: str, family: str) -> dict[str, str]:
    sha256 = (name.encode().hex() * 64)[:64]
    return {"folder": folder, "name": name, "sha256": sha256, "family": family}


def world_catalogue() -> Catalogue:
    """The embedded node facts with files of a fixed list, which training does not change."""
    files = [
        ModelFile(**_file(folder, f"shapes-{name}.safetensors", "shapes"))
        for folder, names in FILES.items()
        for name in sorted(names)
    ]
    return replace(Catalogue.load("embedded"), files=tuple(files))


def split_catalogue() -> Catalogue:
    """Two families: one in a single checkpoint, the other as three files, where LoRAs exist too.

    A text encoder with two outputs of one type, an optional input and a switch are there as well.
    """
    data = Catalogue.load("embedded").to_json()
    nodes = {
        name: node
        for name, node in data["nodes"].items()
        if name in SMALL and name not in ("ImageBlur", "ConditioningZeroOut", "LatentUpscaleBy")
    }
    nodes["UNETLoader"] = {
        "inputs": [
            {"name": "unet_name", "type": "COMBO", "folder": "diffusion_models"},
            {"name": "weight_dtype", "type": "COMBO", "options": ["default", "fp8_e4m3fn"]},
        ],
        "outputs": ["MODEL"],
    }
    nodes["CLIPLoader"] = {
        "inputs": [
            {"name": "clip_name", "type": "COMBO", "folder": "text_encoders"},
            {"name": "device", "type": "COMBO", "required": False, "options": ["default", "cpu"]},
        ],
        "outputs": ["CLIP"],
    }
    nodes["VAELoader"] = {
        "inputs": [
            {"name": "vae_name", "type": "COMBO", "folder": "vae"},
            {"name": "device", "type": "COMBO", "required": False, "options": ["default", "cpu"]},
        ],
        "outputs": ["VAE"],
    }
    nodes["VAEEncode"] = {
        "inputs": [{"name": "pixels", "type": "IMAGE"}, {"name": "vae", "type": "VAE"}],
        "outputs": ["LATENT"],
    }
    nodes["Pair"] = {
        "inputs": [
            {"name": "text", "type": "STRING", "multiline": True},
            {"name": "clip", "type": "CLIP"},
            {"name": "swap", "type": "BOOLEAN", "default": False},
        ],
        "outputs": ["CONDITIONING", "CONDITIONING"],
    }
    files = [
        _file("checkpoints", "one.safetensors", "one"),
        _file("checkpoints", "one-more.safetensors", "one"),
        _file("diffusion_models", "three.safetensors", "three"),
        _file("text_encoders", "three-text.safetensors", "three"),
        _file("vae", "three-vae.safetensors", "three"),
        _file("loras", "three-lora.safetensors", "three"),
    ]
    limits = {"pixels": 2048 * 2048, "batch": 1, "work": 1e12}
    return Catalogue.from_json({"name": "split", "nodes": nodes, "files": files, "limits": limits})


def every_code(grammar: Grammar) -> list[list[int]]:
    """All token sequences of a grammar, by walking its masks."""
    found, state, prefixes = [], grammar.start(1), [[]]
    while prefixes:
        rows, tokens = np.nonzero(state.mask())
        state = state.select(rows)
        prefixes = [[*prefixes[r], t] for r, t in zip(rows.tolist(), tokens.tolist(), strict=True)]
        state.advance(tokens)
        found += [p for p, done in zip(prefixes, state.done, strict=True) if done]
        prefixes = [p for p, done in zip(prefixes, state.done, strict=True) if not done]
        state = state.select(~state.done)
    return found
