"""Train the shipped models of the shapes world: a base, specialists by concept, LoRAs, an upscaler.

One trunk learns all kinds of prompts. Its early snapshot is the base; its end is the parent of
every specialist, which then sees one concept only and forgets the rest. No good generalist is
shipped: with one in the catalogue the same checkpoint would be best for every prompt.

Recipe: predict x0, loss on velocity, a parse loss on the text encoder (`shapes.parse_loss`),
    float32 Muon on block and text matrices, AdamW elsewhere, averaged weights.

    python -m flowloom.shapes.train_world --out data/models --work .flowloom/world [--only NAME ...]

The same command resumes: a job saves every `checkpoint_every` steps and its randomness depends on
(seed, step) only.

Shapes: B pictures, C = 3 channels, H x W pixels, O objects, A attributes, L text tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flowloom.runs import Run, write_state
from flowloom.shapes import drawing, prompts
from flowloom.shapes.config import Concept, Job, WorldConfig
from flowloom.shapes.model import T_FLOOR, Conditioning, ShapesModel, save
from flowloom.shapes.muon import Muon
from flowloom.shapes.parse_loss import ParseHeads, parse_labels
from flowloom.shapes.train_upscaler import train_upscaler
from flowloom.shapes.upscaler import save_upscaler

LICENCE = "Apache-2.0"
FAMILY = "shapes"


class Batch(NamedTuple):
    """What one step learns from."""

    x0_BCHW: Tensor
    """Drawn pictures."""
    ids_BL: Tensor
    """Token ids, int64."""
    t_B: Tensor
    """Times."""
    noise_BCHW: Tensor
    """Standard normal."""
    kept_B1: Tensor
    """0 where the conditioning is zeroed, else 1."""
    nouns_BO: Tensor
    """See `parse_loss.parse_labels`, int64."""
    labels_BOA: Tensor
    """The same; nothing where the prompt was replaced by the empty one."""


def sample_batch(config: WorldConfig, concept: Concept, seed: int, step: int) -> Batch:
    """Draw the batch of one step, a function of (seed, step)."""
    rng = np.random.default_rng((seed, step))
    B, L = config.batch_size, config.model.max_tokens
    x0_BCHW = np.empty((B, 3, drawing.SIZE, drawing.SIZE), np.float32)
    ids_BL = np.full((B, L), prompts.PAD_ID, np.int64)
    read = []
    fate_B = rng.random(B)
    for row in range(B):
        spec = prompts.sample_prompt(
            rng,
            kinds=concept.kinds,
            shapes=concept.shapes,
            colors=concept.colors,
            counts=concept.counts,
            color_frac=concept.color_frac,
        )
        x0_BCHW[row] = drawing.render(spec, rng, colors=concept.colors)
        if fate_B[row] < config.empty_frac:
            ids, spec = prompts.tokenize(""), dataclasses.replace(spec, objects=())
        else:
            ids = prompts.tokenize(spec.text)
            opening = 1 + np.arange(len(prompts.opening_of(spec.text)))
            for place in opening[rng.random(len(opening)) < config.unknown_frac]:
                ids[place] = prompts.UNK_ID
        ids_BL[row, : len(ids)] = ids
        read.append(parse_labels(spec))
    t_B = 1 / (1 + np.exp(-rng.normal(config.time_center, 1, B)))
    noise_BCHW = rng.standard_normal(x0_BCHW.shape, np.float32)
    kept_B1 = (fate_B < 1 - config.zeroed_frac)[:, None]
    nouns, labels = (np.stack(arrays) for arrays in zip(*read, strict=True))
    floats = (t_B.astype(np.float32), noise_BCHW, kept_B1.astype(np.float32))
    return Batch(*map(torch.from_numpy, (x0_BCHW, ids_BL, *floats, nouns, labels)))


def training_loss(model: ShapesModel, heads: ParseHeads, parse_coef: float, batch: Batch) -> Tensor:
    """Flow loss plus `parse_coef` times the parse loss.

    The flow loss is the mean squared velocity error of an x0 prediction: mean ((x0_hat - x0) /
    max(t, T_FLOOR))^2.
    """
    cond = model.text(batch.ids_BL)
    parse = heads.loss(cond.tokens_BLD, batch.nouns_BO, batch.labels_BOA)
    tokens_BLD = cond.tokens_BLD * batch.kept_B1[..., None]
    cond = Conditioning(tokens_BLD, cond.mask_BL, cond.pooled_BD * batch.kept_B1)
    t = batch.t_B[:, None, None, None]
    x_t_BCHW = torch.lerp(batch.x0_BCHW, batch.noise_BCHW, t)
    error_BCHW = (model(x_t_BCHW, batch.t_B, cond) - batch.x0_BCHW) / t.clamp(min=T_FLOOR)
    return error_BCHW.square().mean() + parse_coef * parse


def is_muon(name: str, param: Tensor) -> bool:
    """Whether Muon owns a parameter: matrices inside blocks, modulations excepted."""
    return "blocks." in name and param.ndim == 2 and "modulation" not in name


def learning_rate_factor(config: WorldConfig, job: Job, step: int) -> float:
    """Warm-up over 50 steps, 1, and for a decayed job linear to nothing at its end."""
    factor = min(1.0, (step + 1) / 50) * job.lr_scale
    if job.decay:
        factor *= min(1.0, (job.steps - step) / (config.decay_frac * job.steps))
    return factor


class Weights(NamedTuple):
    """What a job starts from."""

    model: dict[str, Tensor]
    """State of the model."""
    heads: dict[str, Tensor]
    """State of the parse heads."""


class LowRank(nn.Module):
    """A weight plus B @ A, as a parametrization of a frozen linear module."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The patched weight."""
        return weight + self.lora_B @ self.lora_A


class Trainer:
    """Weights, optimisers and averaged weights of one job; saved and restored as one state."""

    def __init__(self, config: WorldConfig, job: Job, parent: Weights | None):
        self.config, self.job, self.step = config, job, 0
        torch.manual_seed(config.seed)
        self.model = ShapesModel(config.model)
        self.heads = ParseHeads(config.model.width)
        if parent is not None:
            self.model.load_state_dict(parent.model)
            self.heads.load_state_dict(parent.heads)
        if job.role == "lora":
            self.model.requires_grad_(False)
            for name, param in list(self.model.named_parameters()):
                if is_muon(name, param):
                    module = self.model.get_submodule(name.removesuffix(".weight"))
                    adapter = LowRank(param, config.lora_rank)
                    parametrize.register_parametrization(module, "weight", adapter)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.params: list[Tensor] = list(self.trained.values())
        self.ema = [p.detach().clone() for p in self.params]
        matrices = [n for n, p in self.trained.items() if job.role != "lora" and is_muon(n, p)]
        self.muon = Muon([self.trained[n] for n in matrices], config.muon_momentum)
        rest = [p for n, p in self.trained.items() if n not in matrices]
        rest += self.heads.parameters()
        self.adam_lr = config.lora_lr if job.role == "lora" else config.adam_lr
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        # Compiling takes longer than a LoRA's few steps gain.
        compiled = config.compile and job.role != "lora"
        self.loss = torch.compile(training_loss) if compiled else training_loss

    def update(self) -> float:
        """One optimiser step; returns the loss."""
        config, job = self.config, self.job
        batch = sample_batch(config, job.concept, job_seed(config, job), self.step)
        loss = self.loss(self.model, self.heads, config.parse_coef, batch)
        loss.backward()
        value = loss.item()
        if not np.isfinite(value):
            raise FloatingPointError(f"{job.name}: loss is {value} at step {self.step}")
        nn.utils.clip_grad_norm_(self.params, config.clip_norm)
        factor = learning_rate_factor(config, job, self.step)
        self.muon.step(config.muon_lr * factor)
        self.adam.param_groups[0]["lr"] = self.adam_lr * factor
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        self.heads.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.params, 1 - config.ema_decay)
        self.step += 1
        return value

    def averaged(self) -> dict[str, Tensor]:
        """The averaged trained weights by parameter name."""
        return {name: value.clone() for name, value in zip(self.trained, self.ema, strict=True)}

    def weights(self) -> Weights:
        """What a job that starts from this one needs."""
        return Weights(self.model.state_dict(), self.heads.state_dict())

    def state_dict(self) -> dict:
        """Everything that a resumed job needs."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "muon": self.muon.buffers,
            "adam": self.adam.state_dict(),
            "ema": self.ema,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` returned."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for mine, theirs in zip(self.muon.buffers, state["muon"], strict=True):
            mine.copy_(theirs)
        self.adam.load_state_dict(state["adam"])
        self.ema = state["ema"]


def job_seed(config: WorldConfig, job: Job) -> int:
    """A seed that differs between jobs and does not depend on their order."""
    digest = hashlib.sha256(f"{config.seed}/{job.name}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def train_job(
    config: WorldConfig,
    job: Job,
    *,
    work: Path,
    parent: Weights | None = None,
    snapshot_step: int | None = None,
) -> Trainer:
    """Train one job to its last step, from where its work folder stands.

    Args:
        config: World.
        job: What to train.
        work: Folder of this job: `state.pt`, `metrics.jsonl`, `snapshot-<step>.pt`.
        parent: Weights to start from; None starts from random ones.
        snapshot_step: Step whose averaged weights are kept.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, job, parent)
    state_path = work / "state.pt"
    if state_path.exists():
        trainer.load_state_dict(torch.load(state_path, weights_only=True))
    losses, started = [], time.process_time()
    while trainer.step < job.steps:
        losses.append(trainer.update())
        if trainer.step == snapshot_step:
            snapshot = Weights(trainer.averaged(), trainer.heads.state_dict())
            write_state(work / f"snapshot-{trainer.step}.pt", snapshot._asdict())
        if trainer.step % config.checkpoint_every == 0 or trainer.step == job.steps:
            write_state(state_path, trainer.state_dict())
            row = {"step": trainer.step, "train/loss": float(np.mean(losses))}
            row["time/cpu_s"] = round(time.process_time() - started, 1)
            with (work / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            losses = []
    return trainer


def lora_tensors(averaged: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA's file content from the names that parametrized modules give their parameters."""
    tensors = {}
    for name, value in averaged.items():
        path, _, matrix = name.replace(".parametrizations.weight.0", "").rpartition(".")
        tensors[f"{path}.{matrix}.weight"] = value.half().contiguous()
        if matrix == "lora_A":
            tensors[f"{path}.alpha"] = torch.tensor(float(len(value)))
    return tensors


def build_world(
    config: WorldConfig, *, out: Path, work: Path, only: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Train what is missing and write the model folders and `files.json`.

    Args:
        config: World.
        out: Folder of the shipped models.
        work: Folder of training states; the same folder resumes.
        only: Names of jobs to train, for processes side by side; empty means all. The trunk is
            trained first anyway.

    Returns:
        The content of `files.json`: folder, name, sha256, family, role, licence, card of each file
        present.

    Raises:
        ValueError: `only` names no job.
    """
    known = [job.name for job in config.jobs] + [config.upscaler.name]
    for name in only:
        if name not in known:
            raise ValueError(f"only: got {name!r}, expected one of {', '.join(known)}")
    wanted = set(only or known)
    if config.upscaler.name in wanted:
        upscaler = train_upscaler(config, work / config.upscaler.name)
        save_upscaler(out / "upscale_models" / f"{config.upscaler.name}.safetensors", upscaler)
    if wanted <= {config.upscaler.name}:
        return write_file_list(config, out)
    trunk = config.trunk
    end = train_job(config, trunk, work=work / trunk.name, snapshot_step=config.base_steps)
    path = work / trunk.name / f"snapshot-{config.base_steps}.pt"
    base = Weights(**torch.load(path, weights_only=True))
    model = ShapesModel(config.model)
    model.load_state_dict(base.model)
    save(out / "checkpoints" / f"{config.base_name}.safetensors", model)
    for job in (*config.specialists, *config.loras):
        if job.name not in wanted:
            continue
        start = base if job.role == "lora" else end.weights()
        averaged = train_job(config, job, work=work / job.name, parent=start).averaged()
        path = out / _folder(job) / f"{job.name}.safetensors"
        if job.role == "lora":
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(lora_tensors(averaged), str(path), metadata={"format": "pt"})
        else:
            model.load_state_dict(averaged)
            save(path, model)
    return write_file_list(config, out)


def _folder(job: Job) -> str:
    return "loras" if job.role == "lora" else "checkpoints"


def write_file_list(config: WorldConfig, out: Path) -> list[dict[str, str]]:
    """Write `files.json`: one record per model file that is there, in the order of the jobs."""
    cards = [("checkpoints", config.base_name, config.base_card)]
    cards += [(_folder(job), job.name, job.card) for job in (*config.specialists, *config.loras)]
    cards.append(("upscale_models", config.upscaler.name, config.upscaler.card))
    records = []
    for folder, name, card in cards:
        path = out / folder / f"{name}.safetensors"
        if not path.exists():
            continue
        path.chmod(0o644)
        records.append(
            {
                "folder": folder,
                "name": path.name,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "family": FAMILY,
                "role": folder.removesuffix("s"),
                "licence": LICENCE,
                "card": card,
            }
        )
    (out / "files.json").write_text(json.dumps(records, indent=1) + "\n")
    return records


def train_world(config: WorldConfig, run: Run) -> dict[str, float]:
    """Train the shipped models as a stage: they lie in its artifact, `data/` stays as it is."""
    records = build_world(config, out=run.out, work=run.work)
    return {"world/num_files": float(len(records))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `build_world`."""
    parser = argparse.ArgumentParser(
        prog="python -m flowloom.shapes.train_world", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the shipped models")
    parser.add_argument("--work", type=Path, required=True, help="folder of training states")
    parser.add_argument("--only", nargs="+", default=(), help="names of jobs; all without it")
    options = parser.parse_args(arguments)
    # One thread is fastest at this size; run two processes with --only instead.
    torch.set_num_threads(1)
    for record in build_world(WorldConfig(), **vars(options)):
        print(f"{record['folder']}/{record['name']}  {record['sha256'][:12]}  {record['card']}")


if __name__ == "__main__":
    main()
