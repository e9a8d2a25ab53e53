"""Memory of tuning Stable Diffusion 3.5 medium, counted before anything is loaded.

For each recipe its phases and parts on torch's meta device (`flowloom.generator.memory`), from the
published sizes of the model (`flowloom.generator.sd3_layout`), with the reward models' weights. No
weights are needed. With `--gpu` also measured: sampling, a training pass and decoding on random
weights of the true shapes, peak of CUDA's allocator against what was counted; where there is no GPU
it says so.

    python -m benchmarks.sd3_memory [--recipe NAME ...] [--gpu] [--json]
"""

import argparse
import json
import sys

import torch

from flowloom.generator import memory, sd3_layout
from flowloom.generator.adapters import Adapter
from flowloom.generator.memory import GB, check_fits, estimate, reward_bytes
from flowloom.generator.sd3 import latent_shape
from flowloom.recipes import resolve

DEVICE_GB = {"sd35_medium_24gb": 24, "sd35_medium_80gb": 80, "sd35_medium_fdfo": 80}


def counted(name):
    """The estimate of a recipe, and whether it fits its device."""
    config = resolve(name).tune_generator
    found = estimate(config, sd3_layout.SD35_MEDIUM, rewards=reward_bytes(config.rubric))
    try:
        check_fits(found, DEVICE_GB[name] * 10**9)
        verdict = f"fits {DEVICE_GB[name]} GB"
    except ValueError as error:
        verdict = str(error)
    return found, verdict


def measured(name):
    """Peaks of CUDA's allocator on random weights of the true shapes, in bytes, by pass."""
    config = resolve(name).tune_generator
    layout, dtype = sd3_layout.SD35_MEDIUM, getattr(torch, config.sd3.dtype)
    transformer = memory.build_transformer(layout, dtype).to_empty(device="cuda")
    with torch.no_grad():
        for value in transformer.state_dict().values():
            value.normal_(std=0.02)
    adapter = Adapter(transformer, config.lora, seed=0)
    if config.sd3.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    vae = memory.build_vae(layout).to_empty(device="cuda")
    shape = latent_shape(config.sd3, transformer.config, vae.config)
    positions = memory.CLIP_POSITIONS + config.sd3.num_t5_tokens
    rows = memory.rows_per_pass(config)
    for weight in adapter.parameters():
        weight.grad = torch.zeros_like(weight)

    @torch.no_grad()
    def sample():
        memory.run_transformer(transformer, config.sample_rows, shape, positions)

    def train():
        memory.run_transformer(transformer, rows, shape, positions).sum().backward()

    @torch.no_grad()
    def decode():
        latents_BCHW = torch.zeros(config.sd3.decode_batch_size, *shape, device="cuda")
        vae.decode(latents_BCHW, return_dict=False)

    peaks = {}
    passes = {"sampling pass": sample, "training pass": train, "decoding pass": decode}
    for part, call in passes.items():
        call()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        peaks[part] = {
            "bytes": torch.cuda.max_memory_allocated() - before,
            "seconds": start.elapsed_time(end) / 1000,
        }
    peaks["transformer"] = {"bytes": memory.tensor_bytes(transformer)}
    return peaks


def main():
    """Count, and measure where that is wanted and possible."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", nargs="+", choices=DEVICE_GB, default=[*DEVICE_GB])
    parser.add_argument("--gpu", action="store_true", help="also measure on this machine's GPU")
    parser.add_argument("--json", action="store_true", help="print figures only, as JSON")
    parsed = parser.parse_args()
    figures = {}
    for name in parsed.recipe:
        found, verdict = counted(name)
        figures[name] = {"peak_gb": found.peak / GB, "verdict": verdict}
        figures[name]["phases"] = {phase: dict(parts) for phase, parts in found.phases.items()}
        figures[name]["host"] = dict(found.host)
        if not parsed.json:
            print(f"{name}: {found.peak / GB:.1f} GB at the peak, {verdict}")
            print("\n".join(f"  {line}" for line in found.lines()))
        if parsed.gpu and not torch.cuda.is_available():
            print(f"{name}: not measured, there is no GPU here", file=sys.stderr)
        elif parsed.gpu:
            figures[name]["measured"] = measured(name)
            both = found.phases["sample and score"] | found.phases["train"]
            for part, figure in figures[name]["measured"].items():
                if not parsed.json:
                    said = f"measured {figure['bytes'] / GB:.2f}, counted {both[part] / GB:.2f} GB"
                    print(f"  {part}: {said}, {figure.get('seconds', 0):.2f} s")
    if parsed.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
