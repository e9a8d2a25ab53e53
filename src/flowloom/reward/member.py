"""Train one member of the reward ensemble: regression of scores on prompt and workflow.

FlowRL (arXiv 2505.21478) trains an ensemble on prompt-workflow-score triplets; its details are not
public. Ours:
1. each render is a row of its own, so a cell with more seeds weighs more, as it should: its mean is
   better known;
2. a workflow is one vector per node, not one per token; 3. the score is a
   product of two gates, whether the files suit the words and whether the workflow works, solved in
   one go (`gates`; on a bootstrap if asked); the network learns the second one again behind the
   first, and both opinions are averaged; 4. the loss is the cross entropy of scores scaled to
   [0, 1]; 5. each prompt is encoded once per group of its rows, and groups of like size share a
   batch.

One process: flowloom run train_reward --recipe demo --set member=0

Shapes: P groups (one prompt each), B rows, L prompt words.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from flowloom.config import check, override, to_dict
from flowloom.dataset import triplets as triplet_table
from flowloom.dataset.tokenizer import WordTokenizer
from flowloom.reward.config import NetworkConfig, RewardConfig
from flowloom.reward.features import Features, FeatureTable
from flowloom.reward.gates import Facts, Gates, fit
from flowloom.reward.network import Batch, Network
from flowloom.runs import Run, write_json, write_state
from flowloom.workflow import Catalogue, Vocabulary, Workflow

WEIGHTS_FILE, RECORD_FILE = "member.safetensors", "member.json"
TOKENIZER_FILE, VOCABULARY_FILE = "tokenizer.json", "vocabulary.json"
CATALOGUE_FILE = "catalogue.json.gz"
UNITS = ("low", "high", "mean", "std")
"""Bounds that scores are scaled by, and the mean and std they are standardised by."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Renders to learn from."""

    prompts: list[str]
    """Different prompts."""
    prompt_of_R: np.ndarray
    """Prompt of each row."""
    workflows: list[Features]
    """Different workflows."""
    workflow_of_R: np.ndarray
    """Workflow of each row."""
    scores_R: np.ndarray
    """Score of each row, rubric units."""

    @staticmethod
    def read(path: Path, split: str, table: FeatureTable) -> Rows:
        """Read one split of the triplets."""
        columns = triplet_table.load(path, split)
        prompt_index = _index(columns["prompt"])
        flow_index = _index(columns["workflow"])
        flows = [Workflow.from_api(json.loads(text)) for text in flow_index]
        return Rows(
            list(prompt_index),
            np.array([prompt_index[text] for text in columns["prompt"]]),
            [table.of_workflow(flow) for flow in flows],
            np.array([flow_index[text] for text in columns["workflow"]]),
            np.array(columns["score"], float),
        )


def train_reward(
    config: RewardConfig, run: Run, *, catalogue: Path, triplets: Path, start: Path | None = None
) -> dict[str, float]:
    """Train member `config.member` on the train split.

    Args:
        config: How.
        run: Run folder; `out` gets `member.safetensors`, `member.json`, `tokenizer.json`,
            `vocabulary.json`.
        catalogue: Folder that `publish_generator` wrote.
        triplets: Folder of `build_triplets`.
        start: Folder of a member whose network is trained on; its words and units stay, files that
            were installed since join its vocabulary. The gates are solved anew.

    Raises:
        ValueError: `start` has a network of another size.
        FloatingPointError: The loss is not finite; names the step.
    """
    # Load rows, and scale their scores to [0, 1].
    torch.set_num_threads(config.num_threads)
    facts = Catalogue.load(catalogue / CATALOGUE_FILE)
    older = None if start is None else _read_vocabulary(start)
    vocabulary = Vocabulary.build(facts) if older is None else older.extend(facts)
    table = FeatureTable(facts, vocabulary)
    rows = Rows.read(triplets, "train", table)
    units = score_units(rows.scores_R)
    if start is not None:
        record = _read_record(start)
        units = {name: record[name] for name in UNITS}
    scaled_R = (rows.scores_R - units["low"]) / (units["high"] - units["low"])
    targets_R = torch.from_numpy(scaled_R).float()

    # Build tokenizer, gates, network and optimiser.
    if start is None:
        tokenizer = WordTokenizer.fit(rows.prompts)
    else:
        tokenizer = WordTokenizer.load(start / TOKENIZER_FILE)
    ids_PL = encode_prompts(tokenizer, rows.prompts, config.network)
    gates = solve_gates(config, rows, ids_PL, scaled_R)
    torch.manual_seed(_seed(config, 0))
    network = Network(
        config.network, len(tokenizer), table.num_rows, len(gates.keys_C), config.dropout
    )
    if start is not None and older is not None:
        network.go_on_from(_network_of(start, config, len(tokenizer)), table.heirs(older))
    network.set_gates(gates)
    network.share = torch.tensor(config.deep_share)
    network.units = torch.tensor([units[name] for name in UNITS])
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.lr, weight_decay=config.weight_decay, fused=True
    )

    # Resume.
    state_path, first, losses = run.work / "state.pt", 0, []
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first, losses = state["step"], state["losses"]
        run.log(f"resumed after step {first} of {config.num_steps}")

    network.train()
    for step, chunks in enumerate(batches(config, rows, first), start=first):
        # Predict; dropout draws from the step alone.
        torch.manual_seed(_seed(config, 1 + step))
        at_B = np.concatenate(chunks)
        group_of_B = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])
        prompts_P = torch.from_numpy(rows.prompt_of_R[[chunk[0] for chunk in chunks]])
        batch = Batch.of([rows.workflows[k] for k in rows.workflow_of_R[at_B]])
        group_of_B = torch.from_numpy(group_of_B)
        suits_B = network.suits(ids_PL[prompts_P], group_of_B, batch)
        works_B = network.deep(ids_PL[prompts_P], group_of_B, batch)
        logits_B = logit_of_both(suits_B, works_B)
        targets_B = targets_R[at_B]

        # Update.
        loss = config.regression_coef * F.binary_cross_entropy_with_logits(logits_B, targets_B)
        if config.pair_coef > 0:
            loss = loss + config.pair_coef * pairwise_loss(logits_B, targets_B, group_of_B)
        value = loss.item()
        if not np.isfinite(value):
            raise FloatingPointError(f"train_reward: loss is {value} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.grad_clip)
        optimizer.param_groups[0]["lr"] = config.lr * rate(config, step)
        optimizer.step()

        # Log, save.
        losses.append(value)
        done = step + 1
        if done % config.checkpoint_every == 0 or done == config.num_steps:
            recent = float(np.mean(losses[-config.checkpoint_every :]))
            run.metric(done, {"train/loss": recent})
            run.log(f"step {done} of {config.num_steps}: loss {recent:.3f}")
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            write_state(state_path, {**state, "step": done, "losses": losses})

    # Write the member, and what its inputs mean.
    safetensors.torch.save_file(network.state_dict(), run.out / WEIGHTS_FILE)
    record = {
        "network": to_dict(config.network),
        "num_rows": table.num_rows,
        "num_facts": len(gates.keys_C),
        **units,
        "catalogue": facts.hash,
    }
    write_json(run.out / RECORD_FILE, record)
    tokenizer.save(run.out / TOKENIZER_FILE)
    write_json(run.out / VOCABULARY_FILE, vocabulary.to_json())
    window = max(len(losses) // 10, 1)
    return {
        "reward/first_loss": float(np.mean(losses[:window])),
        "reward/last_loss": float(np.mean(losses[-window:])),
        "reward/facts": float(len(gates.keys_C)),
        "reward/rows": float(len(targets_R)),
    }


def score_units(scores_R: np.ndarray) -> dict[str, float]:
    """`UNITS` of scores: those within [0, 1] keep these bounds, others get those seen."""
    low, high = float(scores_R.min()), float(scores_R.max())
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    std = max(float(scores_R.std()), 1e-6)
    return dict(zip(UNITS, (low, high, float(scores_R.mean()), std), strict=True))


def solve_gates(config: RewardConfig, rows: Rows, ids_PL: Tensor, scaled_R: np.ndarray) -> Gates:
    """The gates of one member, on all prompts or on a bootstrap of them."""
    facts = Facts.of(ids_PL, rows.prompt_of_R, rows.workflows, rows.workflow_of_R, config.gates)
    drawn_R = np.ones(len(scaled_R))
    if config.bootstrap:
        rng = np.random.default_rng((config.seed, config.member, 2))
        num = len(rows.prompts)
        drawn_R = np.bincount(rng.integers(num, size=num), minlength=num)[rows.prompt_of_R]
    return fit(facts, scaled_R, drawn_R)


def logit_of_both(suits_B: Tensor, works_B: Tensor) -> Tensor:
    """Logit of the chance p = sigmoid(suits) * sigmoid(works).

    1 / p = (1 + exp(-suits)) (1 + exp(-works)), so exp(-logit) = 1 / p - 1 is the sum of both
    exponentials and of their product: nothing is subtracted, and nothing rounds to 0.
    """
    summands = torch.stack([-suits_B, -works_B, -suits_B - works_B])
    return -torch.logsumexp(summands, 0)


def batches(config: RewardConfig, rows: Rows, first: int = 0) -> Iterator[list[np.ndarray]]:
    """Steps `first` to `num_steps`: each a list of groups, a group being rows of one prompt.

    In an epoch every row comes once: a prompt's rows are cut into groups at random, groups of like
    workflow size share a step, and steps come in random order.
    """
    by_prompt = np.argsort(rows.prompt_of_R, kind="stable")
    bounds = np.flatnonzero(np.diff(rows.prompt_of_R[by_prompt])) + 1
    members = np.split(by_prompt, bounds)
    sizes_R = np.array([w.num_nodes for w in rows.workflows])[rows.workflow_of_R]
    num_groups = sum(-(-len(m) // config.rows_per_prompt) for m in members)
    per_epoch = -(-num_groups // config.prompts_per_step)
    plan: list[list[np.ndarray]] = []
    planned = -1
    for step in range(first, config.num_steps):
        epoch, index = divmod(step, per_epoch)
        if epoch != planned:
            rng = np.random.default_rng((config.seed, config.member, epoch))
            groups = []
            for member in members:
                shuffled = rng.permutation(member)
                cuts = range(config.rows_per_prompt, len(member), config.rows_per_prompt)
                # Groups of one prompt differ in size, so that sorting by size can work.
                ordered = shuffled[np.argsort(sizes_R[shuffled], kind="stable")]
                groups += np.split(ordered, list(cuts))
            largest = np.array([sizes_R[group].max() for group in groups])
            order = np.lexsort((rng.random(len(groups)), largest))
            plan = [
                [groups[k] for k in order[at : at + config.prompts_per_step]]
                for at in range(0, len(order), config.prompts_per_step)
            ]
            plan = [plan[k] for k in rng.permutation(len(plan))]
            planned = epoch
        yield plan[index]


def pairwise_loss(predicted_B: Tensor, targets_B: Tensor, group_of_B: Tensor) -> Tensor:
    """Mean of log(1 + exp(-sign(dy) dp)) over pairs of one group, weighted by |dy|."""
    same_BB = group_of_B[:, None] == group_of_B[None]
    dy_BB = (targets_B[:, None] - targets_B[None]) * same_BB
    dp_BB = predicted_B[:, None] - predicted_B[None]
    total = dy_BB.abs().sum()
    return (dy_BB.abs() * F.softplus(-dy_BB.sign() * dp_BB)).sum() / total.clamp(min=1e-6)


def rate(config: RewardConfig, step: int) -> float:
    """Learning rate factor: linear warm-up, then linear to 0 at the last step."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return warm * (1 - step / config.num_steps)


def encode_prompts(
    tokenizer: WordTokenizer, prompts: Sequence[str], config: NetworkConfig
) -> Tensor:
    """Word ids `[P, L]`, padded with 0."""
    return torch.tensor(tokenizer.encode_batch(prompts, config.num_prompt_tokens))


def load_member(folder: Path, name: str, num_words: int) -> Network:
    """Read `<name>.safetensors` and `<name>.json` of a folder; evaluation mode, no gradients.

    Raises:
        ValueError: It was written by a version with other members.
    """
    record = json.loads((folder / f"{name}.json").read_text())
    missing = [key for key in ("network", "num_rows", "num_facts") if key not in record]
    if missing:
        raise ValueError(
            f"{folder / name}.json: got no {missing[0]}, expected a member of this version; "
            "train_reward writes them"
        )
    config = override(NetworkConfig(), record["network"])
    network = Network(config, num_words, record["num_rows"], record["num_facts"])
    network.load_state_dict(safetensors.torch.load_file(folder / f"{name}.safetensors"))
    return network.eval().requires_grad_(False)


def _read_vocabulary(folder: Path) -> Vocabulary:
    return Vocabulary.from_json(json.loads((folder / VOCABULARY_FILE).read_text()))


def _read_record(folder: Path) -> dict:
    return json.loads((folder / RECORD_FILE).read_text())


def _network_of(folder: Path, config: RewardConfig, num_words: int) -> Network:
    """The network of a member of the same size."""
    found, expected = _read_record(folder)["network"], to_dict(config.network)
    check(found == expected, "start: network", found, str(expected))
    return load_member(folder, Path(RECORD_FILE).stem, num_words)


def _index(values: Sequence[str]) -> dict[str, int]:
    return {value: k for k, value in enumerate(dict.fromkeys(values))}


def _seed(config: RewardConfig, draw: int) -> int:
    return int(np.random.default_rng((config.seed, config.member, 1, draw)).integers(2**63))
