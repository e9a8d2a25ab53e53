"""The image model: its equations, sizes, text handling, files and LoRAs.

Pinned: velocity = (x - x0) / max(t, .05), padding and batch mates change nothing, counted
FLOPs equal those that torch counts, an MLP has autograd's gradients to the bit, float16 files
round-trip, LoRA merging is W + s alpha / r B A.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flowloom.shapes import model as shapes_model
from flowloom.shapes import prompts
from flowloom.shapes.model import Conditioning, ShapesConfig, ShapesModel, apply_lora

TINY = ShapesConfig(width=16, depth=2, text_depth=1, num_heads=2)


@pytest.fixture
def model():
    torch.manual_seed(1)
    net = ShapesModel(TINY)
    with torch.no_grad():
        # Zero-initialised parts would hide what they do.
        for param in net.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return net.eval().requires_grad_(False)


def texts(*lines):
    return [prompts.tokenize(line) for line in lines]


def test_velocity_of_the_convention(model):
    x, cond = torch.randn(2, 3, 32, 32), model.encode_text(texts("a star", "two red discs"))
    t = torch.tensor([0.8, 0.01])
    x0 = model(x, t, cond)
    v = model.velocity(x, t, cond)
    torch.testing.assert_close(x[0] - 0.8 * v[0], x0[0], rtol=0, atol=1e-5)
    # Below the floor of .05 the velocity is damped.
    torch.testing.assert_close(x[1] - 0.05 * v[1], x0[1], rtol=0, atol=1e-5)


def test_rows_do_not_mix(model):
    x, t = torch.randn(3, 3, 32, 32), torch.tensor([0.9, 0.5, 0.1])
    cond = model.encode_text(texts("a star", "six green boxes", ""))
    together = model(x, t, cond)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], cond[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_padding_is_not_seen(model):
    ids = shapes_model.pad_tokens(texts("a star"), TINY.max_tokens)
    first = model.text(ids)
    with torch.no_grad():
        model.text.words.weight[prompts.PAD_ID] += 5.0 * torch.randn(TINY.width)
    second = model.text(ids)
    torch.testing.assert_close(first.pooled_BD, second.pooled_BD)
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([0.5])
    torch.testing.assert_close(model(x, t, first), model(x, t, second))


def test_words_and_zeroing_change_the_picture(model):
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([0.5])
    star, box = (model.encode_text(texts(text)) for text in ("a star", "a box"))
    assert (model(x, t, star) - model(x, t, box)).abs().max() > 1e-3
    zeroed = star.zeroed()
    assert not zeroed.tokens_BLD.any()
    assert not zeroed.pooled_BD.any()
    out = model(x, t, zeroed)
    assert out.isfinite().all()
    assert (out - model(x, t, star)).abs().max() > 1e-3


def test_other_sizes(model):
    cond = model.encode_text(texts("a star"))
    for height, width in ((16, 48), (64, 64)):
        out = model(torch.randn(1, 3, height, width), torch.tensor([0.5]), cond)
        assert out.shape == (1, 3, height, width)
    with pytest.raises(ValueError, match="30 x 32, expected multiples of 4"):
        model(torch.randn(1, 3, 32, 30), torch.tensor([0.5]), cond)


def test_conditioning_rows_and_cat(model):
    cond = model.encode_text(texts("a star", "a box", "a disc"))
    again = Conditioning.cat([cond[:1], cond[1:]])
    torch.testing.assert_close(again.tokens_BLD, cond.tokens_BLD)
    assert again.mask_BL.equal(cond.mask_BL)
    torch.testing.assert_close(cond[torch.tensor([2])].pooled_BD, cond.pooled_BD[2:])


@pytest.mark.parametrize("config", [TINY, ShapesConfig()])
@pytest.mark.parametrize("size", [32, 48])
def test_counted_flops_are_those_torch_counts(config, size):
    net = ShapesModel(config).eval()
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        cond = net.encode_text(texts(*["a star"] * 8))
        with FlopCounterMode(display=False) as counter:
            net(torch.randn(8, 3, size, size), torch.full((8,), 0.5), cond)
    counted = shapes_model.flops_per_call(config, size, config.max_tokens)
    assert 8 * counted == counter.get_total_flops()


def test_an_mlp_has_the_gradients_that_autograd_finds(model):
    mlp = model.blocks[0].mlp.requires_grad_(True)
    x = torch.randn(5, 7, TINY.width, requires_grad=True)
    inputs, grad = [x, mlp.up.weight, mlp.down.weight], torch.randn(5, 7, TINY.width)
    plain = mlp.down(torch.relu(mlp.up(x)).square())
    expected = torch.autograd.grad(plain, inputs, grad)
    out = mlp(x)
    assert out.equal(plain)
    for got, want in zip(torch.autograd.grad(out, inputs, grad), expected, strict=True):
        assert got.equal(want)
    with torch.no_grad():
        assert mlp(x).equal(plain)


def test_files_round_trip_in_half_precision(model, tmp_path):
    path = tmp_path / "net.safetensors"
    shapes_model.save(path, model, {"note": "kept"})
    loaded = shapes_model.load(path)
    assert loaded.config == TINY
    again = tmp_path / "again.safetensors"
    for _ in range(8):
        shapes_model.save(again, model, {"note": "kept"})
        assert again.read_bytes() == path.read_bytes()
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].equal(value.half().float()), name
    other = tmp_path / "other.safetensors"
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="expected an entry 'flowloom-shapes-1'"):
        shapes_model.load(other)


def test_lora_merges_by_its_equation(model):
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    tensors = {}
    for path in ("blocks.1.to_q", "text.blocks.0.to_v"):
        tensors[f"{path}.lora_A.weight"] = down
        tensors[f"{path}.lora_B.weight"] = up
        tensors[f"{path}.alpha"] = torch.tensor(4.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    patched = apply_lora(model, tensors, 0.5, -1.0).state_dict()
    changed = {name for name in before if not patched[name].equal(before[name])}
    assert changed == {"blocks.1.to_q.weight", "text.blocks.0.to_v.weight"}
    image, text = before["blocks.1.to_q.weight"], before["text.blocks.0.to_v.weight"]
    # alpha / rank = 2, so strengths .5 and -1 give +1 and -2 times B A.
    torch.testing.assert_close(patched["blocks.1.to_q.weight"], image + up @ down)
    torch.testing.assert_close(patched["text.blocks.0.to_v.weight"], text - 2 * up @ down)
    assert all(model.state_dict()[name].equal(value) for name, value in before.items())


def test_lora_without_alpha_uses_its_rank(model):
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    key = "blocks.0.to_out"
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    patched = apply_lora(model, tensors, 1.0, 1.0)
    expected = model.blocks[0].to_out.weight + up @ down
    torch.testing.assert_close(patched.blocks[0].to_out.weight, expected)


@pytest.mark.parametrize(
    ("key", "shape", "named"),
    [
        ("blocks.9.to_q.lora_A.weight", (2, 16), "no linear module"),
        ("blocks.0.to_q.lora_A.weight", (2, 8), "expected"),
        ("blocks.0.to_q.weight", (16, 16), "expected lora_A"),
    ],
)
def test_lora_that_does_not_fit_is_refused(model, key, shape, named):
    tensors = {key: torch.zeros(shape)}
    tensors[key.replace("lora_A", "lora_B")] = torch.zeros(16, 2)
    with pytest.raises(ValueError, match=named):
        apply_lora(model, tensors, 1.0, 1.0)
