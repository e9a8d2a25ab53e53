"""Facts pinned: both forms hold the tuned update and read back; equal content has equal bytes; each
key is checked, and layers that ComfyUI would leave out are refused; the diffusers form has the keys
that diffusers itself writes for an SD3 transformer, and its own loader gives the tuned outputs."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from flowloom.generator.adapters import Adapter
from flowloom.generator.lora_config import LoRAConfig
from flowloom.generator.lora_file import check_sd3_paths, read_lora, write_lora
from flowloom.render.files import read_lora as read_as_renderer
from flowloom.shapes.model import ShapesConfig, ShapesModel, apply_lora

CONFIG = LoRAConfig(rank=4, alpha=6.0, target_modules=("to_q", "mlp.up"))
SD3_CONFIG = LoRAConfig(
    rank=3, alpha=5.0,
    target_modules=(
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj",
        "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "attn2.to_q", "attn2.to_out.0",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "norm1.linear",
        "norm1_context.linear", "context_embedder", "norm_out.linear", "proj_out",
        "timestep_embedder.linear_1", "text_embedder.linear_2",
    ),
)  # fmt: skip
FLOAT16 = 2e-3


def tuned(model, config=CONFIG, seed=0):
    """An adapter as tuning leaves it: B is not 0."""
    adapter = Adapter(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter.layers.values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    return adapter


def shapes_model():
    torch.manual_seed(0)
    model = ShapesModel(ShapesConfig(width=16, depth=2, text_depth=1, num_heads=2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def sd3():
    """A tiny SD3.5: two blocks, the first with a second attention, random weights."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
        pooled_projection_dim=10, out_channels=4, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return model.eval()


@torch.no_grad()
def see(transformer):
    generator = torch.Generator().manual_seed(1)
    x, context, pooled = (
        torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (5, 12), (10,))
    )
    return transformer(x, context, pooled, torch.tensor([100.0, 900.0])).sample


def test_the_shapes_form_is_what_the_renderer_applies(tmp_path):
    model = shapes_model()
    plain = copy.deepcopy(model)
    adapter = tuned(model)
    write_lora(tmp_path / "l.safetensors", adapter, "shapes")
    patched = apply_lora(plain, read_as_renderer(tmp_path / "l.safetensors"), 1.0, 1.0)
    for name, weight in adapter.merged().items():
        torch.testing.assert_close(patched.state_dict()[name], weight, atol=FLOAT16, rtol=0)
    key = "blocks.0.to_q.weight"
    assert (patched.state_dict()[key] - plain.state_dict()[key]).abs().max() > 0.1


@pytest.mark.parametrize("form", ["shapes", "diffusers"])
def test_a_file_reads_back_whatever_alpha_the_reader_has(tmp_path, form):
    model, path = (shapes_model, "a") if form == "shapes" else (sd3, "b")
    config = CONFIG if form == "shapes" else SD3_CONFIG
    adapter = tuned(model(), config)
    write_lora(tmp_path / path, adapter, form, torch.float32)
    with safe_open(tmp_path / path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    write_lora(tmp_path / "again", adapter, form, torch.float32)
    assert (tmp_path / "again").read_bytes() == (tmp_path / path).read_bytes()

    other = Adapter(model(), LoRAConfig(**{**vars(config), "alpha": 1.5}), seed=5)
    read_lora(tmp_path / path, other, form)
    for layer, want in adapter.layers.items():
        torch.testing.assert_close(other.layers[layer].delta(), want.delta())


def test_every_key_is_checked(tmp_path):
    adapter = tuned(shapes_model())
    path = tmp_path / "l.safetensors"
    write_lora(path, adapter, "shapes")
    tensors = load_file(path)
    key = "blocks.0.to_q.lora_A.weight"
    for change, said in (
        ({key: None}, f"1 missing \\({key}, ...\\), expected 18 tensors"),
        ({"proj.lora_A.weight": torch.zeros(4, 4)}, "1 unexpected \\(proj.lora_A.weight"),
        ({key: torch.zeros(3, 16)}, "1 of another shape \\(blocks.0.to_q.lora_A.weight \\(3, 16"),
    ):
        save_file({k: v for k, v in {**tensors, **change}.items() if v is not None}, path)
        with pytest.raises(ValueError, match=said):
            read_lora(path, adapter, "shapes")
    with pytest.raises(ValueError, match=r"62 missing .* 18 unexpected"):
        read_lora(path, Adapter(sd3(), SD3_CONFIG, seed=0), "diffusers")
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged file"):
        read_lora(path, adapter, "shapes")


def test_what_the_file_cannot_hold_is_refused_and_the_old_file_stays(tmp_path):
    adapter, path = tuned(shapes_model()), tmp_path / "l.safetensors"
    write_lora(path, adapter, "shapes")
    before = path.read_bytes()
    for value in (1e-8, 1e6, float("nan")):
        for layer in adapter.layers.values():
            layer.lora_B.data.fill_(value)
        with pytest.raises(ValueError, match=r"text\.blocks\.0\.to_q: got an update that differs"):
            write_lora(path, adapter, "shapes")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    for layer in adapter.layers.values():
        layer.lora_B.data.fill_(1e-8)
    write_lora(path, adapter, "shapes", torch.float32)


def test_a_layer_that_hardly_moved_may_be_rounded_away(tmp_path):
    adapter = tuned(shapes_model())
    adapter.layers["blocks.0.to_q"].lora_B.data.fill_(1e-8)
    write_lora(tmp_path / "l.safetensors", adapter, "shapes")


def test_layers_that_comfyui_would_leave_out_are_refused(tmp_path):
    check_sd3_paths(Adapter(sd3(), SD3_CONFIG, seed=0))
    other = Adapter(shapes_model(), LoRAConfig(target_modules=("to_q",)), seed=0)
    with pytest.raises(ValueError, match=r"3 of 3 layers .* \(text\.blocks\.0\.to_q, \.\.\.\)"):
        write_lora(tmp_path / "l", other, "diffusers")


def test_the_diffusers_form_is_what_diffusers_writes_and_loads(tmp_path):
    from diffusers.loaders import SD3LoraLoaderMixin
    from peft import LoraConfig, get_peft_model_state_dict

    ours = sd3()
    adapter = tuned(ours, SD3_CONFIG)
    path = tmp_path / "ours.safetensors"
    write_lora(path, adapter, "diffusers", torch.float32)

    theirs = sd3()
    targets = list(SD3_CONFIG.target_modules)
    theirs.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    layers = get_peft_model_state_dict(theirs)
    SD3LoraLoaderMixin.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    written = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {k: v.shape for k, v in load_file(path).items()} == {
        k: v.shape for k, v in written.items()
    }

    # The scale, 5 / 3, is in B.
    for key, value in adapter.state_dict().items():
        factor = 5 / 3 if key.endswith("lora_B.weight") else 1
        torch.testing.assert_close(load_file(path)[f"transformer.{key}"], factor * value)

    fresh = sd3()
    before = see(fresh)
    state, metadata = SD3LoraLoaderMixin.lora_state_dict(path, return_lora_metadata=True)
    SD3LoraLoaderMixin.load_lora_into_transformer(state, fresh, metadata=metadata)
    after = see(fresh)
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(after, see(ours), atol=1e-5, rtol=1e-4)
    with adapter.off():
        assert torch.equal(see(ours), before)
