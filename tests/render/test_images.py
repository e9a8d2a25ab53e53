"""Pins: blur and sharpen against numpy by hand, mirrored edges; resizing keeps constants; a PNG
gives its pixels and its workflow back, in both formats."""

import json

import numpy as np
import pytest
import torch

from flowloom.render import images, png
from flowloom.workflow import Catalogue, Workflow, from_ui, read_chunks
from tests.render.tiny import flow

TOLERANCE = 1e-5


def blur_by_hand(x_CHW, radius, sigma):
    d = np.arange(-radius, radius + 1)
    weights = np.exp(-(d[:, None] ** 2 + d[None, :] ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    padded = np.pad(x_CHW, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
    out = np.zeros_like(x_CHW)
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            window = padded[:, dy : dy + x_CHW.shape[1], dx : dx + x_CHW.shape[2]]
            out += weights[dy, dx] * window
    return out


@pytest.mark.parametrize(("radius", "sigma", "side"), [(1, 1.0, 8), (3, 0.5, 5), (9, 2.0, 6)])
def test_blur_by_hand(radius, sigma, side):
    x = np.random.default_rng(0).uniform(-1, 1, (3, side, side + 1)).astype(np.float32)
    expected = blur_by_hand(x, radius, sigma)
    got = images.blur(torch.from_numpy(x)[None], radius, sigma)[0].numpy()
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)


def test_sharpen_by_hand():
    x = np.random.default_rng(0).uniform(-0.1, 0.1, (3, 8, 8)).astype(np.float32)
    expected = np.clip(x + 10 * 0.3 * (x - blur_by_hand(x, 1, 0.8)), -1, 1)
    got = images.sharpen(torch.from_numpy(x)[None], 1, 0.8, 0.3)[0].numpy()
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)


@pytest.mark.parametrize("method", images.RESIZE_METHODS)
def test_resizing_keeps_a_flat_picture(method):
    x = torch.full((1, 3, 8, 12), 0.25)
    for height, width in [(16, 24), (4, 6), (12, 12)]:
        out = images.resize(x, height, width, method)
        assert out.shape == (1, 3, height, width)
        np.testing.assert_allclose(out.numpy(), 0.25, atol=TOLERANCE)


def test_unknown_resize_method_is_named():
    with pytest.raises(ValueError, match="upscale_method: got 'bislerp', expected nearest-exact"):
        images.resize(torch.zeros(1, 3, 8, 8), 4, 4, "bislerp")


def test_png_carries_pixels_and_workflow(tmp_path):
    image = np.random.default_rng(0).uniform(-1.2, 1.2, (3, 8, 12)).astype(np.float32)
    workflow = flow().fill("a red circle", seed=5)
    png.write(tmp_path / "sub" / "one.png", image, workflow)
    pixels, found = png.read(tmp_path / "sub" / "one.png")
    np.testing.assert_allclose(pixels, image.clip(-1, 1), atol=0.5 / 127.5 + TOLERANCE)
    assert found.to_api() == workflow.to_api()
    # The editor opens the other chunk: the same workflow, laid out.
    texts = read_chunks(tmp_path / "sub" / "one.png")
    assert set(texts) == {"prompt", "workflow"}
    drawn = json.loads(texts["workflow"])
    back = from_ui(drawn, Catalogue.load("embedded")).workflow
    assert back.fingerprint() == workflow.fingerprint()
    places = {tuple(node["pos"]) for node in drawn["nodes"]}
    assert len(places) == len(workflow.nodes)
    first = (tmp_path / "sub" / "one.png").read_bytes()
    png.write(tmp_path / "sub" / "one.png", image, workflow)
    assert (tmp_path / "sub" / "one.png").read_bytes() == first


def test_pictures_without_or_with_a_broken_workflow(tmp_path):
    png.write(tmp_path / "plain.png", np.zeros((3, 4, 4), np.float32))
    assert png.read(tmp_path / "plain.png")[1] is None
    foreign = Workflow.from_api({"1": {"class_type": "KSamplerOfOthers", "inputs": {}}})
    with pytest.raises(ValueError, match="KSamplerOfOthers"):
        png.write(tmp_path / "foreign.png", np.zeros((3, 4, 4), np.float32), foreign)
    assert not (tmp_path / "foreign.png").exists()
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="expected a picture"):
        png.read(tmp_path / "cut.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="expected a picture"):
        png.read(tmp_path / "text.png")
