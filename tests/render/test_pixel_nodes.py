"""Pins: what nodes do to pixels and sizes, by hand: crops, zero sides, six blend modes, the learned
upscaler, encoding back to a latent; limits on pixels."""

import numpy as np
import pytest
import torch

from flowloom.render import images, sizes
from flowloom.render.engine import Engine, RenderJob
from flowloom.render.models import ModelStore
from flowloom.shapes.upscaler import flops_per_picture
from tests.render.tiny import UPSCALER, Sheet, write_world

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(ModelStore.open(write_world(tmp_path_factory.mktemp("world"), contrast=0.1)))


def base(sheet, size=32, seed=3):
    """IMAGE of a sampled picture, and its latent."""
    model, clip, vae = sheet.loader()
    text = sheet.text(clip, "a star")
    latent = sheet(
        "KSampler",
        model=model,
        positive=text,
        negative=text,
        latent_image=sheet.latent(size),
        seed=seed,
        steps=2,
        cfg=1.0,
    )[0]
    return sheet("VAEDecode", samples=latent, vae=vae)[0], latent, vae


def rendered(engine, write):
    """What `write(sheet, image, latent, vae) -> image` makes, and the picture it starts from."""
    sheet = Sheet()
    image, latent, vae = base(sheet)
    plain = sheet.saved(image)
    made = sheet.saved(write(sheet, image, latent, vae))
    results = engine.render([RenderJob(plain, "plain"), RenderJob(made, "made")])
    return results[0].image, results[1].image


def test_image_scale_crops_the_middle(engine):
    plain, made = rendered(
        engine,
        lambda sheet, image, latent, vae: sheet(
            "ImageScale",
            image=image,
            width=32,
            height=16,
            upscale_method="nearest-exact",
            crop="center",
        )[0],
    )
    np.testing.assert_array_equal(made, plain[:, 8:24])


@pytest.mark.parametrize(("width", "height", "sides"), [(0, 16, (16, 16)), (48, 0, (48, 48))])
def test_a_side_of_zero_keeps_the_shape(engine, width, height, sides):
    def write(sheet, image, latent, vae):
        return sheet("ImageScale", image=image, width=width, height=height)[0]

    assert rendered(engine, write)[1].shape[1:] == sides


def test_two_zeros_keep_the_size(engine):
    def write(sheet, image, latent, vae):
        return sheet("ImageScale", image=image, width=0, height=0)[0]

    plain, made = rendered(engine, write)
    np.testing.assert_array_equal(made, plain)


def test_latent_upscale_rounds_to_patches_and_crops(engine):
    def write(sheet, image, latent, vae):
        larger = sheet(
            "LatentUpscale",
            samples=latent,
            width=64,
            height=35,
            upscale_method="nearest-exact",
            crop="center",
        )[0]
        return sheet("VAEDecode", samples=larger, vae=vae)[0]

    plain, made = rendered(engine, write)
    assert made.shape == (3, 32, 64)
    np.testing.assert_array_equal(made, plain[:, 8:24].repeat(2, 1).repeat(2, 2))


def test_upscaling_with_a_model(engine):
    def write(sheet, image, latent, vae):
        upscaler = sheet("UpscaleModelLoader", model_name=UPSCALER)[0]
        return sheet("ImageUpscaleWithModel", upscale_model=upscaler, image=image)[0]

    plain, made = rendered(engine, write)
    upscaler = engine.store.upscaler(UPSCALER)
    expected = upscaler(torch.from_numpy(plain)[None])[0].clamp(-1, 1).numpy()
    assert made.shape == (3, 64, 64)
    np.testing.assert_allclose(made, expected, atol=TOLERANCE)
    assert np.abs(made - plain.repeat(2, 1).repeat(2, 2)).max() > 1e-3
    sheet = Sheet()
    image, latent, vae = base(sheet)
    one, two = engine.render(
        [
            RenderJob(sheet.saved(image), "a"),
            RenderJob(sheet.saved(write(sheet, image, latent, vae)), "b"),
        ]
    )
    assert two.flops - one.flops == flops_per_picture(upscaler, 32, 32)


def test_encoding_a_picture_gives_its_latent_back(engine):
    def write(sheet, image, latent, vae):
        odd = sheet("ImageScale", image=image, width=30, height=21)[0]
        back = sheet("VAEEncode", pixels=odd, vae=vae)[0]
        return sheet("VAEDecode", samples=back, vae=vae)[0]

    _, made = rendered(engine, write)
    assert made.shape == (3, 20, 28)

    def same(sheet, image, latent, vae):
        back = sheet("VAEEncode", pixels=image, vae=vae)[0]
        return sheet("VAEDecode", samples=back, vae=vae)[0]

    plain, made = rendered(engine, same)
    np.testing.assert_array_equal(made, plain)


BLENDS = {
    "normal": lambda a, b: b,
    "multiply": lambda a, b: a * b,
    "screen": lambda a, b: 1 - (1 - a) * (1 - b),
    "overlay": lambda a, b: 2 * a * b if a <= 0.5 else 1 - 2 * (1 - a) * (1 - b),
    "soft_light": lambda a, b: (
        a - (1 - 2 * b) * a * (1 - a)
        if b <= 0.5
        else a + (2 * b - 1) * ((((16 * a - 12) * a + 4) * a if a <= 0.25 else a**0.5) - a)
    ),
    "difference": lambda a, b: a - b,
}


@pytest.mark.parametrize("mode", images.BLEND_MODES)
def test_blend_modes_by_hand(mode):
    values = [(0.1, 0.3), (0.1, 0.8), (0.4, 0.8), (0.6, 0.3), (0.9, 0.7), (0.0, 1.0), (1.0, 0.0)]
    a, b = (torch.tensor([row[k] for row in values]).view(1, 1, 1, -1) for k in (0, 1))
    got = (images.blend(2 * a - 1, 2 * b - 1, 0.7, mode).flatten() + 1) / 2
    expected = [min(max(0.3 * x + 0.7 * BLENDS[mode](x, y), 0), 1) for x, y in values]
    np.testing.assert_allclose(got.numpy(), expected, atol=TOLERANCE)


def test_unknown_blend_mode_is_named():
    with pytest.raises(ValueError, match="blend_mode: got 'burn', expected one of normal, mul"):
        images.blend(torch.zeros(1), torch.zeros(1), 0.5, "burn")


def test_blending_fits_the_second_picture_to_the_first(engine):
    def write(sheet, image, latent, vae):
        larger = sheet("ImageScaleBy", image=image, scale_by=1.5)[0]
        return sheet(
            "ImageBlend", image1=image, image2=larger, blend_factor=0.5, blend_mode="multiply"
        )[0]

    plain, made = rendered(engine, write)
    assert made.shape == plain.shape
    assert np.abs(made - plain).max() > 0.05


@pytest.mark.parametrize(("height", "width"), [(1, 1000), (1000, 1), (3, 7)])
def test_crops_never_take_all(height, width):
    cut = sizes.center_crop(torch.zeros(3, 4, 64), height, width)
    assert min(cut.shape) >= 1


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda sheet, image, latent, vae: sheet(
                "ImageScale", image=image, width=16384, height=16384
            )[0],
            r"\(ImageScale\): size: got 16384 x 16384 pixels, expected at most 4096 in all",
        ),
        (
            lambda sheet, image, latent, vae: sheet(
                "VAEDecode",
                samples=sheet("LatentUpscale", samples=latent, width=16384, height=0)[0],
                vae=vae,
            )[0],
            r"\(LatentUpscale\): size: got 16384 x 16384 pixels",
        ),
        (
            lambda sheet, image, latent, vae: sheet("ImageScaleBy", image=image, scale_by=8.0)[0],
            r"\(ImageScaleBy\): size: got 256 x 256 pixels",
        ),
    ],
)
def test_huge_pictures_are_refused(engine, write, message):
    with pytest.raises(ValueError, match=message):
        rendered(engine, write)


def test_pictures_too_small_to_encode_are_refused(engine):
    def write(sheet, image, latent, vae):
        small = sheet("ImageScale", image=image, width=2, height=2)[0]
        return sheet("VAEDecode", samples=sheet("VAEEncode", pixels=small, vae=vae)[0], vae=vae)[0]

    with pytest.raises(ValueError, match=r"size: got 2 x 2 pixels, expected sides of 4 and more"):
        rendered(engine, write)
