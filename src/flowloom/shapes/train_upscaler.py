"""Train the x2 upscaler on damaged drawings.

Shapes: B pictures, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from flowloom.runs import write_state
from flowloom.shapes import drawing, prompts
from flowloom.shapes.config import WorldConfig
from flowloom.shapes.upscaler import SCALE, Upscaler, damage


def train_upscaler(config: WorldConfig, work: Path) -> Upscaler:
    """Train it to its last step, from where its work folder stands.

    Loss: mean absolute error against the drawing at twice the size, which keeps edges sharp.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    work.mkdir(parents=True, exist_ok=True)
    recipe = config.upscaler
    torch.manual_seed(config.seed)
    upscaler = Upscaler(recipe.width)
    optimizer = torch.optim.AdamW(upscaler.parameters(), lr=recipe.lr, weight_decay=0.0)
    path, first = work / "state.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        upscaler.load_state_dict(state["model"])
        optimizer.load_state_dict(state["adam"])
        first = state["step"]
    for step in range(first, recipe.steps):
        rng = np.random.default_rng((config.seed, step))
        specs = [prompts.sample_prompt(rng) for _ in range(config.batch_size)]
        x0_BCHW = torch.from_numpy(np.stack([drawing.render(spec, rng) for spec in specs]))
        target_BCHW = F.interpolate(x0_BCHW, scale_factor=SCALE, mode="nearest")
        damaged_BCHW = damage(x0_BCHW, torch.Generator().manual_seed(step))
        loss = (upscaler(damaged_BCHW) - target_BCHW).abs().mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{recipe.name}: loss is {loss.item()} at step {step}")
        optimizer.param_groups[0]["lr"] = recipe.lr * (1 - step / recipe.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        done = step + 1
        if done % config.checkpoint_every == 0 or done == recipe.steps:
            state = {"step": done, "model": upscaler.state_dict(), "adam": optimizer.state_dict()}
            write_state(path, state)
    return upscaler
