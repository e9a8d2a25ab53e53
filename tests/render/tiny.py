"""A world small enough for tests: random tiny models behind the embedded node classes."""

from pathlib import Path

import torch

from flowloom.render.model_records import file_record, save_catalogue
from flowloom.shapes.model import ShapesConfig, ShapesModel, save
from flowloom.shapes.upscaler import Upscaler, save_upscaler
from flowloom.workflow import Catalogue, Workflow

CHECKPOINTS = ("a.safetensors", "b.safetensors")
LORA = "l.safetensors"
UPSCALER = "u.safetensors"


def tiny_model(seed: int, contrast: float = 1.0, width: int = 16) -> ShapesModel:
    """A model whose output depends on everything: picture, time, place and words.

    Args:
        seed: Of its parameters.
        contrast: Factor of its output; below 0.3 pictures are seldom clamped.
        width: Channels.
    """
    torch.manual_seed(seed)
    model = ShapesModel(ShapesConfig(width=width, depth=2, text_depth=1, num_heads=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    for parameter in model.patch_out.parameters():
        parameter.data.mul_(contrast)
    return model.eval().requires_grad_(False)


def write_world(folder: Path, contrast: float = 1.0, width: int = 16) -> Path:
    """Write two checkpoints, a LoRA, an upscaler and their catalogue, as a stage does."""
    from safetensors.torch import save_file

    models, files = folder / "models", []
    for seed, name in enumerate(CHECKPOINTS):
        save(models / "checkpoints" / name, tiny_model(seed, contrast, width))
        files.append(
            file_record(
                models / "checkpoints" / name, "checkpoints", family="shapes", role="checkpoint"
            )
        )
    torch.manual_seed(7)
    paths = ["blocks.0.to_q", "blocks.1.mlp.up", "text.blocks.0.to_v"]
    modules = dict(tiny_model(0, width=width).named_modules())
    tensors = {}
    for path in paths:
        rows, columns = modules[path].weight.shape
        tensors[f"{path}.lora_A.weight"] = torch.randn(4, columns)
        tensors[f"{path}.lora_B.weight"] = torch.randn(rows, 4)
        tensors[f"{path}.alpha"] = torch.tensor(2.0)
    (models / "loras").mkdir()
    save_file(tensors, str(models / "loras" / LORA))
    files.append(file_record(models / "loras" / LORA, "loras", family="shapes", role="lora"))
    upscaler = Upscaler(4)
    for parameter in upscaler.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = models / "upscale_models" / UPSCALER
    save_upscaler(path, upscaler)
    files.append(file_record(path, "upscale_models", family="shapes", role="upscaler"))
    shipped = Catalogue.load("embedded")
    catalogue = Catalogue(shipped.nodes, (), "tiny", shipped.limits).with_files(files)
    save_catalogue(folder / "catalogue.json.gz", catalogue)
    return folder


def flow(
    checkpoint: str = CHECKPOINTS[0],
    *,
    steps: int = 3,
    cfg: float = 2.5,
    sampler: str = "euler",
    scheduler: str = "simple",
    denoise: float = 1.0,
    lora: tuple[float, float] | None = None,
    zero_negative: bool = False,
    second_pass: dict | None = None,
    image_nodes: tuple[tuple[str, dict], ...] = (),
    size: int = 32,
) -> Workflow:
    """A template: loader, LoRA, sampler, second pass, decode, image nodes, save."""
    nodes: dict[str, dict] = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}}
    }
    model, clip = ["1", 0], ["1", 1]
    if lora:
        inputs = {"model": model, "clip": clip, "lora_name": LORA}
        inputs |= {"strength_model": lora[0], "strength_clip": lora[1]}
        nodes["2"] = {"class_type": "LoraLoader", "inputs": inputs}
        model, clip = ["2", 0], ["2", 1]
    nodes["3"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "{prompt}", "clip": clip}}
    nodes["4"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "{negative}", "clip": clip}}
    if zero_negative:
        nodes["4"] = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["3", 0]}}
    inputs = {"width": size, "height": size, "batch_size": 1}
    nodes["5"] = {"class_type": "EmptyLatentImage", "inputs": inputs}
    common = {"model": model, "seed": 0, "positive": ["3", 0], "negative": ["4", 0]}
    inputs = common | {
        "steps": steps,
        "cfg": cfg,
        "sampler_name": sampler,
        "scheduler": scheduler,
        "latent_image": ["5", 0],
        "denoise": denoise,
    }
    nodes["6"] = {"class_type": "KSampler", "inputs": inputs}
    latent = ["6", 0]
    if second_pass:
        upscale = {"samples": latent, "upscale_method": "bilinear", "scale_by": 1.5}
        nodes["7"] = {"class_type": "LatentUpscaleBy", "inputs": upscale}
        nodes["8"] = {
            "class_type": "KSampler",
            "inputs": inputs | second_pass | {"latent_image": ["7", 0]},
        }
        latent = ["8", 0]
    nodes["9"] = {"class_type": "VAEDecode", "inputs": {"samples": latent, "vae": ["1", 2]}}
    image = ["9", 0]
    for number, (class_type, extra) in enumerate(image_nodes):
        node_id = str(20 + number)
        nodes[node_id] = {"class_type": class_type, "inputs": {"image": image, **extra}}
        image = [node_id, 0]
    nodes["99"] = {
        "class_type": "SaveImage",
        "inputs": {"images": image, "filename_prefix": "flowloom"},
    }
    return Workflow.from_api(nodes)


class Sheet:
    """Writes a workflow node by node; inputs that are left out have their defaults."""

    def __init__(self):
        self.nodes: dict[str, dict] = {}

    def __call__(self, class_type: str, **inputs) -> list:
        """Add a node; a link to each of its outputs."""
        spec = Catalogue.load("embedded").nodes[class_type]
        defaults = {}
        for item in spec.inputs:
            if not item.is_link and item.folder is None:
                first = item.options[0] if item.options else ""
                defaults[item.name] = first if item.default is None else item.default
        node_id = str(len(self.nodes) + 1)
        self.nodes[node_id] = {"class_type": class_type, "inputs": defaults | inputs}
        return [[node_id, slot] for slot in range(len(spec.outputs))]

    def loader(self, name: str = CHECKPOINTS[0]) -> list:
        """MODEL, CLIP, VAE of a checkpoint."""
        return self("CheckpointLoaderSimple", ckpt_name=name)

    def text(self, clip: list, text: str) -> list:
        """CONDITIONING of a text."""
        return self("CLIPTextEncode", clip=clip, text=text)[0]

    def latent(self, size: int = 32) -> list:
        """LATENT of a square picture."""
        return self("EmptyLatentImage", width=size, height=size)[0]

    def decoded(self, latent: list) -> Workflow:
        """The workflow that saves a latent as it is."""
        vae = self.loader()[2]
        return self.saved(self("VAEDecode", samples=latent, vae=vae)[0])

    def saved(self, image: list) -> Workflow:
        """The workflow that saves a picture."""
        return Workflow.from_api(
            self.nodes | {"99": {"class_type": "SaveImage", "inputs": {"images": image}}}
        )
