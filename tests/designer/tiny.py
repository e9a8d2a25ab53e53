"""What the tests of the designer share: a small catalogue's classes, prompts, a small policy."""

from flowloom.designer.config import PolicyConfig
from flowloom.workflow import decode

CLASSES = (
    "CheckpointLoaderSimple",
    "CLIPTextEncode",
    "EmptyLatentImage",
    "KSampler",
    "VAEDecode",
    "ImageSharpen",
    "SaveImage",
)
PROMPTS = ("a red circle", "two blue squares", "a circle", "draw a large green square")
TINY = PolicyConfig(width=16, num_layers=2, num_heads=2, mlp_width=32, num_prompt_tokens=6)


def files_of(tokens, grammar):
    """Checkpoint names of a design."""
    return [
        node.inputs["ckpt_name"]
        for node in decode(tokens, grammar).nodes.values()
        if node.class_type == "CheckpointLoaderSimple"
    ]
