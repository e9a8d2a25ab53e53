"""Facts about the memory that is known before a run.

Weights, adapters, gradients and AdamW's state are counted exactly. What a forward pass keeps for
backward is within 5 % of the bytes that autograd is really given to save, and the peak of a
training pass, with and without checkpoints, within 5 % of what the same pass allocates on a CPU.
A run's passes are those of its rows, positions and guidance. Published layouts have their published
numbers of weights. What does not fit is refused in one line with the parts and a cure; the
single-GPU recipes fit.
"""

import dataclasses
import types

import pytest
import torch
from diffusers import SD3Transformer2DModel

from flowloom.generator import memory, pairs, sd3_layout, source
from flowloom.generator.adapters import Adapter
from flowloom.generator.config import FDFOConfig, FlowGRPOConfig, TuneGeneratorConfig
from flowloom.generator.lora_config import LoRAConfig
from flowloom.generator.memory import Estimate, check_fits, estimate
from flowloom.generator.sd3_config import SD3Config
from flowloom.generator.sd3_layout import SD35_LARGE, SD35_MEDIUM, SD3Layout, read_layout
from flowloom.processes import Processes
from flowloom.recipes import generators, resolve
from flowloom.score.config import (
    PickScoreConfig,
    RubricConfig,
    ShapesConfig,
    TermConfig,
    VLMConfig,
)
from tests.generator import tiny_sd3

ACTIVATIONS = {"rel": 0.05}
"""Input conversions and what attention's kernel keeps beside its output."""
PUBLISHED = {"rel": 0.02}
"""Numbers in model cards are rounded."""
POSITIONS = 40
SHAPE = (4, 16, 16)
LORA = LoRAConfig(rank=2, alpha=4.0, target_modules=("attn.to_q", "attn.to_out.0"))
SIZES = {**tiny_sd3.TRANSFORMER, "pos_embed_max_size": 16}
LAYOUT = SD3Layout(SIZES, tiny_sd3.VAE, ())
SMALL = SD3Layout(SIZES | {"num_layers": 2}, tiny_sd3.VAE, ())


def run_config(**changes):
    fields = {
        "sd3": SD3Config(size=64, dtype="float32", device="cpu", num_t5_tokens=24),
        "lora": LORA, "images_per_epoch": 8, "num_steps": 4, "units_per_pass": 1, "sample_rows": 4,
    }  # fmt: skip
    return TuneGeneratorConfig(**(fields | changes))


@pytest.fixture
def real():
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**SIZES).eval()
    return model, Adapter(model, LORA, 0)


def test_weights_adapters_and_optimiser_are_exact(real):
    model, adapter = real
    parts = estimate(run_config(), LAYOUT).phases["train"]
    adapters = {id(weight) for weight in adapter.parameters()}
    stored = [v for v in model.state_dict(keep_vars=True).values() if id(v) not in adapters]
    assert parts["transformer"] == sum(v.numel() * 4 for v in stored)
    assert parts["adapters"] == sum(w.numel() * 4 for w in adapter.parameters())
    optimizer = torch.optim.AdamW(adapter.parameters())
    for weight in adapter.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    moments = [v for s in optimizer.state.values() for v in s.values() if v.ndim]
    assert parts["optimiser"] == sum(v.numel() * 4 for v in moments)
    assert parts["gradients"] == sum(w.grad.numel() * 4 for w in adapter.parameters())


def test_kept_activations_are_those_that_autograd_saves(real):
    model, _ = real
    own = {v.untyped_storage().data_ptr() for v in model.state_dict(keep_vars=True).values()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        v_BCHW = memory.run_transformer(model, 3, SHAPE, POSITIONS)
    assert v_BCHW.requires_grad
    measured = sum(storage.nbytes() for storage in saved.values())

    meta = memory.build_transformer(LAYOUT, torch.float32)
    Adapter(meta, LORA, 0)
    with memory.counting() as live:
        kept = memory.run_transformer(meta, 3, SHAPE, POSITIONS)
        assert live.live == pytest.approx(measured, **ACTIVATIONS)
    del kept


@pytest.mark.parametrize("recompute", [False, True])
def test_the_peak_is_what_a_cpu_allocates(real, recompute):
    model, adapter = real
    meta = memory.build_transformer(LAYOUT, torch.float32)
    expected = Adapter(meta, LORA, 0)
    for each in (model, meta):
        if recompute:
            each.enable_gradient_checkpointing()
    counted = memory.training_bytes(meta, expected, 3, SHAPE, POSITIONS, wants_base=False)
    assert counted == pytest.approx(allocated_peak(model, adapter), **ACTIVATIONS)


def allocated_peak(model, adapter):
    """By torch's profiler of its CPU allocator: the highest sum of allocations and frees."""
    for weight in adapter.parameters():
        weight.grad = torch.zeros_like(weight)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        memory.run_transformer(model, 3, SHAPE, POSITIONS).sum().backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def test_rows_guidance_checkpoints_and_types():
    def phases(**changes):
        found = estimate(run_config(**changes), SMALL).phases
        return found["sample and score"] | found["train"]

    small, large = phases(), phases(units_per_pass=2, sample_rows=8)
    for part in ("sampling pass", "training pass"):
        assert 1.8 * small[part] < large[part] < 2.1 * small[part]
    # Guidance is twice the rows.
    assert phases(guidance=4.5) == large
    stored = phases(sd3=SD3Config(size=64, dtype="bfloat16", gradient_checkpointing=False))
    assert stored["training pass"] > 0.7 * small["training pass"]
    assert stored["transformer"] * 2 == small["transformer"]
    assert stored["adapters"] == small["adapters"]


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_passes_are_of_the_configured_rows_and_positions(kl_coef):
    sd3 = dataclasses.replace(run_config().sd3, gradient_checkpointing=False, decode_batch_size=3)
    config = run_config(sd3=sd3, guidance=2.0, method=FDFOConfig(kl_coef=kl_coef))
    parts = estimate(config, SMALL).phases
    meta = memory.build_transformer(SMALL, torch.float32)
    adapter, shape, positions = Adapter(meta, LORA, 0), (4, 8, 8), 77 + 24
    sampled, trained = parts["sample and score"], parts["train"]
    # Guidance doubles the rows: four of a draw, the two branches of one unit.
    assert sampled["sampling pass"] == memory.sampling_bytes(meta, 8, shape, positions)
    passes = [memory.training_bytes(meta, adapter, 4, shape, positions, b) for b in (False, True)]
    assert passes[0] < passes[1]
    assert trained["training pass"] == passes[kl_coef > 0]
    vae = memory.build_vae(SMALL)
    assert sampled["decoding pass"] == memory.decoding_bytes(vae, 3, shape)


def test_rows_of_a_pass_and_states_of_the_host():
    assert memory.rows_per_pass(run_config(units_per_pass=3)) == 6
    grpo = FlowGRPOConfig(group_size=4)
    assert memory.rows_per_pass(run_config(units_per_pass=3, method=grpo)) == 3
    assert memory.rows_per_pass(run_config(units_per_pass=None)) == 8 * 4 // 4
    assert memory.rows_per_pass(run_config(units_per_pass=None, num_minibatches=3)) == 11
    # Three noises over two processes: one of them has two, which are four pictures.
    config = run_config(images_per_epoch=6)
    found = estimate(config, SMALL, rewards={"a": 30, "b": 12}, num_processes=2)
    assert found.host["paths"] == 4 * 4 * 2 * (4 * 8 * 8) * 4
    assert found.host["latents"] == 2 * 4 * (4 * 8 * 8) * 4
    assert found.host["pictures"] == 2 * 4 * (3 * 64 * 64) * 4
    assert found.phases["sample and score"]["rewards"] == 42


def test_published_layouts_have_their_published_weights(tmp_path):
    for layout, published in ((SD35_MEDIUM, 2.47e9), (SD35_LARGE, 8.06e9)):
        model = memory.build_transformer(layout, torch.bfloat16)
        assert memory.tensor_bytes(model) / 2 == pytest.approx(published, **PUBLISHED)
    assert memory.tensor_bytes(memory.build_vae(SD35_MEDIUM)) / 4 == pytest.approx(
        83.8e6, **PUBLISHED
    )
    for config, published in ((sd3_layout.CLIP_L, 123.7e6), (sd3_layout.CLIP_BIG_G, 694.7e6)):
        layout = SD3Layout({}, {}, (config,))
        counted = memory.text_bytes(layout, torch.bfloat16, use_t5=True) / 2
        assert counted == pytest.approx(published, **PUBLISHED)
    layout = SD3Layout({}, {}, (sd3_layout.T5_XXL,))
    counted = memory.text_bytes(layout, torch.bfloat16, use_t5=True) / 2
    assert counted == pytest.approx(4.76e9, **PUBLISHED)
    assert memory.text_bytes(layout, torch.bfloat16, use_t5=False) == 0
    with pytest.raises(ValueError, match=r"got no transformer/config\.json"):
        read_layout(tmp_path)


def test_a_layout_is_read_from_a_pipelines_folder(tmp_path):
    tiny_sd3.build().save_pretrained(tmp_path)
    layout = read_layout(tmp_path)
    assert [config["model_type"] for config in layout.text_encoders] == [
        "clip_text_model", "clip_text_model", "t5",
    ]  # fmt: skip
    assert memory.text_bytes(layout, torch.float32, use_t5=True) > 0


def test_what_does_not_fit_is_refused_with_its_parts():
    found = Estimate(
        {"encode prompts": {"text encoders": 11 * 10**9},
         "train": {"transformer": 5 * 10**9, "training pass": 9 * 10**9, "rewards": 2 * 10**9}},
        {},
    )  # fmt: skip
    check_fits(found, 18 * 10**9)
    expected = (
        r"memory: got 16\.0 GB while it will train \(training pass 9\.0, transformer 5\.0, "
        r"rewards 2\.0\), expected at most 11\.0 of the device's 12\.0 GB; lower units_per_pass"
    )
    with pytest.raises(ValueError, match=expected):
        check_fits(found, 12 * 10**9)
    assert found.lines()[0] == "encode prompts: 11.00 GB (text encoders 11.00)"


def test_trust_gives_the_papers_clip_at_its_size():
    method = resolve("sd35_medium_fdfo").tune_generator.method
    assert method.trust == pytest.approx(7.68 * generators.PAIR_RMS)
    rms_B = torch.tensor([generators.PAIR_RMS, generators.PAIR_RMS / 2])
    clip_B = pairs.trust_clip(rms_B, generators.PAPER_ELEMENTS, method.trust)
    # `trust_clip` keeps 1e-6 from 0.
    assert clip_B.tolist() == pytest.approx([0.03, 0.06], rel=1e-4)


def test_the_papers_numbers():
    config = resolve("sd35_medium_fdfo").tune_generator
    assert config.images_per_epoch // config.method.num_branches == 432
    assert (config.num_minibatches, config.num_steps, config.lr) == (4, 40, 3e-5)
    assert (config.lora.rank, config.lora.alpha, config.method.churn) == (32, 64.0, 0.0025)
    assert config.method.num_branches == 2
    assert [term.weight for term in config.rubric.terms] == [1.0, 0.1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "device_gb"), [("sd35_medium_24gb", 24), ("sd35_medium_80gb", 80)]
)
def test_single_gpu_recipes_fit(recipe, device_gb):
    config = resolve(recipe).tune_generator
    rewards = memory.reward_bytes(config.rubric)
    assert len(rewards) == 2
    check_fits(estimate(config, SD35_MEDIUM, rewards=rewards), device_gb * 10**9)


def test_reward_models_are_counted_by_their_files_or_their_names(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    terms = [
        TermConfig(scorer=PickScoreConfig(model=str(tmp_path)), name="a", weight=1.0),
        TermConfig(scorer=PickScoreConfig(dtype="bfloat16"), name="b", weight=1.0),
        TermConfig(scorer=VLMConfig(model="somebody/else"), weight=1.0),
        TermConfig(scorer=ShapesConfig(), weight=1.0),
    ]
    found = memory.reward_bytes(RubricConfig(terms=tuple(terms)))
    assert found == {str(tmp_path): 100, "yuvalkirstain/PickScore_v1": 2 * 986_000_000}
    assert memory.reward_bytes("shapes") == {}


def test_a_gpu_that_is_too_small_is_noticed_before_anything_is_loaded(tmp_path, monkeypatch):
    tiny_sd3.build().save_pretrained(tmp_path)
    sd3 = SD3Config(name_or_path=str(tmp_path), size=64, num_t5_tokens=24, device="cuda:0")
    config = run_config(sd3=sd3)
    properties = types.SimpleNamespace(total_memory=10**5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with pytest.raises(ValueError, match=r"memory: got 0\.0 GB while it will"):
        source.load_source(config, [], Processes())
