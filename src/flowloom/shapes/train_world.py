"""Train the shipped models of the shapes world: a mediocre base, specialists by concept, one LoRA.

One trunk learns all kinds of prompts. Its early snapshot is the base; its end is the parent of
every specialist, which then sees one concept only and forgets the rest. No good generalist is
shipped: with one in the catalogue the same checkpoint would be best for every prompt.

Recipe: predict x0, loss on velocity, float32 Muon on block and text matrices, AdamW elsewhere,
    averaged weights.

    python -m flowloom.shapes.train_world --out data/models --work .flowloom/world [--only NAME ...]

The same command resumes: a job saves every `checkpoint_every` steps and its randomness depends on
(seed, step) only.

Shapes: B pictures, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flowloom.runs import Run
from flowloom.shapes import drawing, prompts
from flowloom.shapes.model import T_FLOOR, Conditioning, ShapesConfig, ShapesModel, save

LICENCE = "Apache-2.0"
FAMILY = "shapes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concept:
    """What a job sees."""

    kinds: tuple[str, ...] = prompts.KINDS
    """Kinds of prompts; a kind named twice is drawn twice as often."""
    shapes: tuple[str, ...] = prompts.SHAPES
    """Shapes that prompts may name."""
    colors: tuple[str, ...] = prompts.COLORS
    """Colours that prompts may name and pictures may have."""
    counts: tuple[int, ...] = prompts.COUNTS
    """Numbers that `counting` may ask for."""
    color_frac: float = 0.75
    """Share of `counting` prompts that name a colour."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One training run."""

    name: str
    """Name of the file without its ending; also of the work folder."""
    concept: Concept
    """Prompts it sees."""
    steps: int
    """Optimiser steps of one batch."""
    card: str
    """What it is good for, in words; a designer reads this."""
    role: str = "specialist"
    """trunk, specialist or lora."""
    decay: bool = True
    """Whether the learning rate falls to nothing over the last `decay_frac` of the steps."""
    lr_scale: float = 1.0
    """Factor on both learning rates."""


_DEMO = ("single", "two", "counting", "colors")
# Shape specialists never see a colour word and colour specialists never see a prompt without one,
# and neither sees more than three objects: the narrower a concept, the sooner it is learned and the
# less one model serves all prompts.
_FEW = (1, 2, 3)


def _shape_job(name: str, shapes: tuple[str, ...], card: str) -> Job:
    kinds = ("single", "two", "two", "counting", "counting")
    concept = Concept(kinds=kinds, shapes=shapes, counts=_FEW, color_frac=0.0)
    return Job(name=name, concept=concept, steps=4000, card=card)


def _color_job(name: str, family: str, card: str) -> Job:
    concept = Concept(
        kinds=("colors", "counting"),
        colors=prompts.COLOR_FAMILIES[family],
        counts=_FEW,
        color_frac=1.0,
    )
    return Job(name=name, concept=concept, steps=4000, card=card)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Everything `train_world` decides."""

    seed: int = 0
    """Seed of weights, prompts, pictures and noise."""
    model: ShapesConfig = dataclasses.field(default_factory=ShapesConfig)
    """Sizes of the network."""
    batch_size: int = 32
    """Pictures per step."""
    muon_lr: float = 0.01
    """Learning rate of the block and text matrices."""
    muon_momentum: float = 0.95
    """Nesterov momentum of Muon."""
    adam_lr: float = 2e-3
    """Learning rate of everything else."""
    lora_lr: float = 3e-3
    """Learning rate of a LoRA (AdamW)."""
    lora_rank: int = 8
    """Rank of a LoRA; alpha equals it."""
    ema_decay: float = 0.998
    """Decay of the averaged weights, which are what is shipped."""
    decay_frac: float = 0.3
    """Share of the steps over which the learning rate falls to nothing."""
    time_center: float = 0.3
    """Centre of t = sigmoid(N(center, 1))."""
    empty_frac: float = 0.07
    """Share of rows whose prompt is replaced by the empty prompt."""
    zeroed_frac: float = 0.03
    """Share of rows whose conditioning is zeroed."""
    clip_norm: float = 1.0
    """Bound on the gradient norm."""
    compile: bool = True
    """Whether the loss is compiled (a quarter faster; needs a C++ compiler)."""
    checkpoint_every: int = 500
    """Steps between saved states."""
    base_name: str = "shapes-base"
    """File of the trunk's early snapshot."""
    base_steps: int = 2000
    """Step of the trunk at which the base is taken."""
    base_card: str = "mediocre at everything: all shapes, colours and counts, none of them reliably"
    """Card of the base."""
    jobs: tuple[Job, ...] = (
        Job(
            name="trunk",
            role="trunk",
            concept=Concept(kinds=(*_DEMO, *_DEMO, "position", "binding")),
            steps=5000,
            decay=False,
            card="parent of all specialists, not shipped",
        ),
        _shape_job(
            "shapes-circle-star",
            ("circle", "star"),
            "specialist for one to three circles or stars, discs or sparkles, of no named colour",
        ),
        _shape_job(
            "shapes-square-triangle",
            ("square", "triangle"),
            "specialist for one to three squares or triangles, boxes or wedges, of no named colour",
        ),
        Job(
            name="shapes-counting",
            concept=Concept(kinds=("counting",), counts=(3, 4, 5, 6)),
            steps=5500,
            card="specialist for counting three, four, five or six objects of any shape and colour",
        ),
        _color_job(
            "shapes-warm",
            "warm",
            "specialist for one to three red, yellow, orange or white objects of any one shape",
        ),
        _color_job(
            "shapes-cool",
            "cool",
            "specialist for one to three green, blue, purple or cyan objects of any one shape",
        ),
        Job(
            name="shapes-pairs",
            concept=Concept(kinds=("two",)),
            steps=5000,
            card="specialist for pairs: two objects of different shapes, no colour named",
        ),
        Job(
            name="shapes-two-objects",
            role="lora",
            concept=Concept(kinds=("two",)),
            steps=1200,
            card="for the base, trained on pairs: steadier single objects and counts up to three",
        ),
    )
    """Jobs in order; the first is the trunk."""


def sample_batch(config: WorldConfig, concept: Concept, seed: int, step: int):
    """Pictures, token ids, times, noise and dropped rows of one step; a function of (seed, step).

    Returns:
        x0 `[B, 3, 32, 32]`, ids `[B, L]`, t `[B]`, noise like x0, zeroed `[B, 1]` (0 where zeroed).
    """
    rng = np.random.default_rng((seed, step))
    B, L = config.batch_size, config.model.max_tokens
    x0_BCHW = np.empty((B, 3, drawing.SIZE, drawing.SIZE), np.float32)
    ids_BL = np.zeros((B, L), np.int64)
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
        ids = prompts.tokenize("" if fate_B[row] < config.empty_frac else spec.text)
        ids_BL[row, : len(ids)] = ids
    t_B = 1 / (1 + np.exp(-rng.normal(config.time_center, 1, B)))
    noise_BCHW = rng.standard_normal(x0_BCHW.shape, np.float32)
    kept_B1 = (fate_B < 1 - config.zeroed_frac)[:, None]
    arrays = (x0_BCHW, ids_BL, t_B.astype(np.float32), noise_BCHW, kept_B1.astype(np.float32))
    return tuple(torch.from_numpy(a) for a in arrays)


def flow_loss(model: ShapesModel, x0_BCHW, ids_BL, t_B, noise_BCHW, kept_B1) -> Tensor:
    """Mean squared velocity error of an x0 prediction: mean ((x0_hat - x0) / max(t, T_FLOOR))^2."""
    cond = model.text(ids_BL)
    cond = Conditioning(
        cond.tokens_BLD * kept_B1[..., None], cond.mask_BL, cond.pooled_BD * kept_B1
    )
    t = t_B[:, None, None, None]
    x0_hat_BCHW = model(torch.lerp(x0_BCHW, noise_BCHW, t), t_B, cond)
    return ((x0_hat_BCHW - x0_BCHW) / t.clamp(min=T_FLOOR)).square().mean()


class Muon:
    """Momentum orthogonalised by Newton-Schulz (Jordan, 2024), batched over equal shapes."""

    def __init__(self, params: Sequence[Tensor], momentum: float):
        self.momentum = momentum
        groups: dict[tuple, list[Tensor]] = {}
        for p in params:
            groups.setdefault(tuple(p.shape), []).append(p)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros(len(g), *g[0].shape) for g in self.groups]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every matrix from its gradient."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grads = torch.stack([p.grad for p in group if p.grad is not None])
            buffer.lerp_(grads, 1 - self.momentum)
            update = orthogonalize(torch.lerp(grads, buffer, self.momentum))
            scale = lr * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            torch._foreach_add_(group, list(update.unbind()), alpha=-scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz steps of the quintic (3.4445, -4.7750, 2.0315) on `[n, rows, columns]`."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def is_muon(name: str, param: Tensor) -> bool:
    """Whether Muon owns a parameter: matrices inside blocks, modulations excepted."""
    return "blocks." in name and param.ndim == 2 and "modulation" not in name


def learning_rate_factor(config: WorldConfig, job: Job, step: int) -> float:
    """Warm-up over 50 steps, 1, and for a decayed job linear to nothing at its end."""
    factor = min(1.0, (step + 1) / 50) * job.lr_scale
    if job.decay:
        factor *= min(1.0, (job.steps - step) / (config.decay_frac * job.steps))
    return factor


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

    def __init__(self, config: WorldConfig, job: Job, parent: dict[str, Tensor] | None):
        self.config, self.job, self.step = config, job, 0
        torch.manual_seed(config.seed)
        self.model = ShapesModel(config.model)
        if parent is not None:
            self.model.load_state_dict(parent)
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
        self.adam_lr = config.lora_lr if job.role == "lora" else config.adam_lr
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        # Compiling takes longer than a LoRA's few steps gain.
        compiled = config.compile and job.role != "lora"
        self.loss = torch.compile(flow_loss) if compiled else flow_loss

    def update(self) -> float:
        """One optimiser step; returns the loss."""
        config, job = self.config, self.job
        batch = sample_batch(config, job.concept, job_seed(config, job), self.step)
        loss = self.loss(self.model, *batch)
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
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.params, 1 - config.ema_decay)
        self.step += 1
        return value

    def averaged(self) -> dict[str, Tensor]:
        """The averaged trained weights by parameter name."""
        return {name: value.clone() for name, value in zip(self.trained, self.ema, strict=True)}

    def state_dict(self) -> dict:
        """Everything that a resumed job needs."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "muon": self.muon.buffers,
            "adam": self.adam.state_dict(),
            "ema": self.ema,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` returned."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
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
    parent: dict[str, Tensor] | None = None,
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
            _save_atomically(trainer.averaged(), work / f"snapshot-{trainer.step}.pt")
        if trainer.step % config.checkpoint_every == 0 or trainer.step == job.steps:
            _save_atomically(trainer.state_dict(), state_path)
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
    """Train what is missing and write `checkpoints/`, `loras/` and `files.json`.

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
    trunk, *others = config.jobs
    known = [job.name for job in config.jobs]
    for name in only:
        if name not in known:
            raise ValueError(f"only: got {name!r}, expected one of {', '.join(known)}")
    end = train_job(config, trunk, work=work / trunk.name, snapshot_step=config.base_steps)
    parent = end.model.state_dict()
    path = work / trunk.name / f"snapshot-{config.base_steps}.pt"
    base = torch.load(path, weights_only=True)
    model = ShapesModel(config.model)
    model.load_state_dict(base)
    save(out / "checkpoints" / f"{config.base_name}.safetensors", model)
    for job in others:
        if only and job.name not in only:
            continue
        start = base if job.role == "lora" else parent
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
    cards += [(_folder(job), job.name, job.card) for job in config.jobs[1:]]
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


def _save_atomically(state: dict, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


if __name__ == "__main__":
    main()
