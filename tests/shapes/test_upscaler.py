"""The x2 upscaler: plain repetition before training, exact after a round trip, named errors.

Pinned: an untrained upscaler repeats pixels, some steps lower the loss, a resumed run ends with
the same weights, the bytes of its file are stable.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from flowloom.shapes import drawing, upscaler
from flowloom.shapes.config import UpscalerConfig, WorldConfig
from flowloom.shapes.prompts import parse
from flowloom.shapes.train_upscaler import train_upscaler

CONFIG = WorldConfig(
    batch_size=8, upscaler=UpscalerConfig(width=8, steps=60, lr=1e-2), checkpoint_every=20
)


def scene(text="a red disc and a blue box"):
    return torch.from_numpy(drawing.render(parse(text), np.random.default_rng(0)))[None]


def test_an_untrained_one_repeats_pixels():
    x = scene()
    assert upscaler.Upscaler()(x).equal(F.interpolate(x, scale_factor=2, mode="nearest"))


def test_training_removes_damage_and_resumes(tmp_path, monkeypatch):
    x = scene()
    hurt = upscaler.damage(x.repeat(16, 1, 1, 1), torch.Generator().manual_seed(0))
    target = F.interpolate(x, scale_factor=2, mode="nearest")
    repeated = F.interpolate(hurt, scale_factor=2, mode="nearest")
    trained = train_upscaler(CONFIG, tmp_path / "a")
    with torch.no_grad():
        error = (trained(hurt) - target).abs().mean()
    assert error < 0.9 * (repeated - target).abs().mean()

    class StoppedError(Exception):
        pass

    steps = []

    def interrupted(x, generator):
        steps.append(len(steps))
        if len(steps) == 31:
            raise StoppedError
        return upscaler.damage(x, generator)

    monkeypatch.setattr("flowloom.shapes.train_upscaler.damage", interrupted)
    with pytest.raises(StoppedError):
        train_upscaler(CONFIG, tmp_path / "b")
    again = train_upscaler(CONFIG, tmp_path / "b")
    assert len(steps) == 31 + 40
    for one, other in zip(trained.parameters(), again.parameters(), strict=True):
        assert one.equal(other)


def test_files_round_trip_and_foreign_ones_are_named(tmp_path):
    model = upscaler.Upscaler(8)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    upscaler.save_upscaler(tmp_path / "a.safetensors", model)
    upscaler.save_upscaler(tmp_path / "b.safetensors", model)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    torch.testing.assert_close(
        upscaler.load(tmp_path / "a.safetensors")(scene()), model(scene()), atol=2e-3, rtol=0
    )
    save_file({"x": torch.zeros(1)}, str(tmp_path / "c.safetensors"))
    with pytest.raises(ValueError, match="expected an entry 'flowloom-upscaler-1'"):
        upscaler.load(tmp_path / "c.safetensors")


def test_cost_by_hand():
    # Per input pixel: 9 * (3 * 4 + 4 * 4 + 4 * 4 + 4 * 12) weights, two operations each.
    assert upscaler.flops_per_picture(upscaler.Upscaler(4), 2, 5) == 2 * 10 * 9 * 92
