"""Profiles: which node classes a grammar writes, out of all that a server has.

A catalogue of a real server has hundreds of classes, most of them for video, sound and 3D. The
text-to-image profile names the core classes of such workflows in three bands.
"""

from __future__ import annotations

from collections.abc import Iterable

from flowloom.workflow.catalogue import Catalogue, CatalogueError

MUST = (
    "CheckpointLoaderSimple", "UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader",
    "LoraLoader", "LoraLoaderModelOnly", "CLIPTextEncode", "CLIPSetLastLayer",
    "ConditioningZeroOut", "EmptyLatentImage", "EmptySD3LatentImage", "KSampler",
    "LatentUpscaleBy", "VAEDecode", "UpscaleModelLoader", "ImageUpscaleWithModel", "ImageScaleBy",
    "SaveImage",
)  # fmt: skip
SHOULD = (
    "KSamplerAdvanced", "RandomNoise", "CFGGuider", "BasicGuider", "KSamplerSelect",
    "BasicScheduler", "SamplerCustomAdvanced", "ModelSamplingDiscrete", "ModelSamplingSD3",
    "ModelSamplingFlux", "ModelSamplingAuraFlow", "FluxGuidance", "ConditioningCombine",
    "ConditioningConcat", "ConditioningAverage", "ConditioningSetArea", "LatentUpscale",
    "VAEEncode", "VAEDecodeTiled", "ControlNetLoader", "ControlNetApplyAdvanced",
)  # fmt: skip
MAY = (
    "CLIPTextEncodeSDXL", "CLIPTextEncodeSDXLRefiner", "CLIPTextEncodeFlux",
    "ConditioningSetTimestepRange", "SamplerCustom", "KarrasScheduler", "ExponentialScheduler",
    "BetaSamplingScheduler", "AlignYourStepsScheduler", "SDTurboScheduler", "DualCFGGuider",
    "SplitSigmas", "RescaleCFG", "FreeU_V2", "PerturbedAttentionGuidance",
    "SelfAttentionGuidance", "PatchModelAddDownscale", "HyperTile", "TomePatchModel",
    "CFGZeroStar", "TCFG", "ModelMergeSimple", "ImageScale", "ImageScaleToTotalPixels",
    "ImageSharpen", "ImageBlur", "ImageBlend", "Canny", "LoadImage", "PreviewImage",
)  # fmt: skip
TEXT_TO_IMAGE = (*MUST, *SHOULD, *MAY)


def text_to_image(catalogue: Catalogue, classes: Iterable[str] = TEXT_TO_IMAGE) -> tuple[str, ...]:
    """Classes of a profile that a catalogue can run: it has them, and their files are installed.

    Args:
        catalogue: Node facts and installed files.
        classes: The profile; a class that the catalogue lacks or calls deprecated is left out.

    Returns:
        Their names in the order of the profile.

    Raises:
        CatalogueError: none of them is there.
    """
    wanted = list(dict.fromkeys(classes))
    found = tuple(
        name
        for name in wanted
        if name in catalogue.nodes
        and not catalogue.nodes[name].deprecated
        and catalogue.available(name)
    )
    if not found:
        raise CatalogueError(
            f"profile: got {len(wanted)} classes ({', '.join(wanted)[:60]}), expected at least one "
            f"that catalogue {catalogue.name or catalogue.hash[:12]} has with its files installed"
        )
    return found
