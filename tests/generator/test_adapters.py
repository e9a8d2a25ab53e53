"""Facts pinned: a fresh LoRA changes nothing to the bit; on, it computes W x + (alpha / rank) B A x
in either form; off, the base to the bit; A and B are float32 over bfloat16 weights and alone have
gradients; merged weights and PEFT give the same outputs; state goes out and in with every key
checked."""

import copy

import pytest
import torch
from torch import nn

from flowloom.generator.adapters import AdaptedLinear, Adapter
from flowloom.generator.lora_config import LoRAConfig
from flowloom.shapes.model import ShapesConfig, ShapesModel

SMALL = ShapesConfig(width=16, depth=2, text_depth=1, num_heads=2)
CONFIG = LoRAConfig(rank=4, alpha=6.0, target_modules=("to_q", "mlp.up"))
TOLERANCE = 1e-5


def _model():
    torch.manual_seed(0)
    model = ShapesModel(SMALL)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def _see(model):
    generator = torch.Generator().manual_seed(1)
    x_BCHW = torch.randn(3, 3, 32, 32, generator=generator)
    cond = model.encode_text([[1, 2], [3], [4, 5, 6]])
    return model.velocity(x_BCHW, torch.tensor([0.2, 0.5, 1.0]), cond)


def _trained(model, config=CONFIG):
    """An adapter whose B is not 0 any more."""
    adapter = Adapter(model, config, seed=3)
    generator = torch.Generator().manual_seed(2)
    for layer in adapter.layers.values():
        layer.lora_B.data.normal_(std=0.3, generator=generator)
    return adapter


def test_a_fresh_adapter_changes_nothing_and_its_seed_decides_a():
    model = _model()
    before, names = _see(model), set(model.state_dict())
    adapter = Adapter(model, CONFIG, seed=3)
    assert torch.equal(_see(model), before)
    assert names < set(model.state_dict())
    same, other = (Adapter(_model(), CONFIG, seed).state_dict() for seed in (3, 4))
    key = "blocks.0.to_q.lora_A.weight"
    assert torch.equal(adapter.state_dict()[key], same[key])
    assert not torch.equal(adapter.state_dict()[key], other[key])


def test_on_it_adds_the_update_and_off_it_is_the_base_to_the_bit():
    model = _model()
    before = _see(model)
    adapter = _trained(model)
    tuned = _see(model)
    assert (tuned - before).abs().max() > 0.1
    with adapter.off():
        assert torch.equal(_see(model), before)
        with adapter.off():
            pass
        assert torch.equal(_see(model), before)
    assert torch.equal(_see(model), tuned)
    with pytest.raises(RuntimeError), adapter.off():
        raise RuntimeError
    assert torch.equal(_see(model), tuned)


@pytest.mark.parametrize("width", [16, 256], ids=["added to W", "beside W"])
def test_a_layer_computes_its_equation_with_its_gradients(width):
    layer = nn.Linear(width, width, dtype=torch.float32)
    adapter = _trained(nn.Sequential(layer), LoRAConfig(rank=4, alpha=6.0, target_modules=("0",)))
    down, up = adapter.parameters()
    x = torch.randn(5, width, requires_grad=True)
    want = x @ layer.weight.T + layer.bias + 1.5 * x @ down.T @ up.T
    torch.testing.assert_close(layer(x), want, atol=TOLERANCE, rtol=TOLERANCE)
    got, expected = (torch.autograd.grad(y.square().sum(), [x, down, up]) for y in (layer(x), want))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)
    assert layer.weight.grad is None


def test_it_equals_peft():
    import peft

    ours, theirs = _model(), _model()
    adapter = _trained(ours)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "up"])
    peft.inject_adapter_in_model(config, theirs, "oracle")
    for path, layer in adapter.layers.items():
        for part in ("lora_A", "lora_B"):
            getattr(theirs.get_submodule(path), part)["oracle"].weight.data = getattr(layer, part)
    torch.testing.assert_close(_see(ours), _see(theirs), atol=1e-4, rtol=1e-4)


def test_factors_are_float32_over_bfloat16_weights_and_alone_are_trained():
    model = _model().bfloat16()
    adapter = _trained(model)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    layer = adapter.layers["blocks.0.to_q"]
    x = torch.randn(3, 16).bfloat16()
    got = layer(x)
    want = x.float() @ (layer.weight.float() + layer.delta()).T
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.05, rtol=0.02)
    got.float().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.{part}" for path in adapter.layers for part in ("lora_A", "lora_B")}
    assert layer.lora_A.grad.dtype == torch.float32


def test_merged_weights_are_the_tuned_model():
    model = _model()
    names = list(model.state_dict())
    adapter = _trained(model)
    merged = adapter.merged()
    assert list(merged) == names
    plain = _model()
    plain.load_state_dict(merged)
    torch.testing.assert_close(_see(plain), _see(model), atol=1e-4, rtol=1e-4)


def test_state_goes_out_and_in_with_every_key_checked():
    model = _model()
    state = copy.deepcopy(_trained(model).state_dict())
    other = Adapter(_model(), CONFIG, seed=9)
    other.load_state_dict(state)
    assert torch.equal(_see(other.model), _see(model))
    key = "blocks.0.to_q.lora_A.weight"
    for change, said in (
        ({key: None}, f"1 missing \\({key}"),
        ({"x.lora_A.weight": torch.zeros(1)}, "1 unexpected \\(x.lora_A"),
        ({key: torch.zeros(3, 16)}, "1 of another shape"),
    ):
        wrong = {k: v for k, v in {**state, **change}.items() if v is not None}
        with pytest.raises(ValueError, match=said):
            other.load_state_dict(wrong)


def test_layers_are_chosen_by_the_end_of_their_path_and_left_by_its_beginning():
    chosen = Adapter(_model(), CONFIG, seed=0).layers
    assert list(chosen) == [
        "text.blocks.0.to_q", "text.blocks.0.mlp.up", "blocks.0.to_q", "blocks.0.mlp.up",
        "blocks.1.to_q", "blocks.1.mlp.up",
    ]  # fmt: skip
    skipping = LoRAConfig(target_modules=("to_q",), skip_modules=("text", "blocks.1"))
    model = _model()
    assert list(Adapter(model, skipping, seed=0).layers) == ["blocks.0.to_q"]
    assert isinstance(copy.deepcopy(model).blocks[0].to_q, AdaptedLinear)
    with pytest.raises(ValueError, match=r"a model with a LoRA at blocks\.0\.to_q"):
        Adapter(model, skipping, seed=0)
    with pytest.raises(ValueError, match="target_modules: got 'o_q', expected the end"):
        Adapter(_model(), LoRAConfig(target_modules=("o_q",)), seed=0)
