"""Configurations of the designer's stages: `train_sft` and `train_grpo`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from flowloom.config import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Size of the embedded policy: a Llama-layout decoder trained from scratch."""

    width: int = 64
    """Residual width."""
    num_layers: int = 3
    """Decoder blocks."""
    num_heads: int = 4
    """Attention heads; `width / num_heads` must be even (rotary positions turn pairs)."""
    mlp_width: int = 160
    """Inner width of SwiGLU."""
    num_prompt_tokens: int = 16
    """Prompt positions; a longer prompt is cut, a shorter one padded and the padding hidden."""
    num_workflow_tokens: int = 64
    """Workflow positions, and the grammar's token budget: no design is longer."""

    def __post_init__(self) -> None:
        """Check the fields."""
        for field in dataclasses.fields(self):
            check(getattr(self, field.name) >= 1, field.name, getattr(self, field.name), ">= 1")
        even = self.width % (2 * self.num_heads) == 0
        check(even, "width", self.width, f"a multiple of 2 * num_heads = {2 * self.num_heads}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters of a pretrained language model (arXiv 2106.09685)."""

    rank: int = 16
    """Rank of each update B A."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout before A, in SFT only: tuning compares probabilities and needs them exact."""
    target_modules: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Last name of each adapted linear layer."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(self.rank >= 1, "rank", self.rank, ">= 1")
        check(self.alpha > 0, "alpha", self.alpha, "> 0")
        check(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        check(len(self.target_modules) > 0, "target_modules", self.target_modules, "a name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """A pretrained causal language model that learns the workflow vocabulary."""

    name_or_path: str = "Qwen/Qwen3-0.6B"
    """Folder, or name on the hub, of a causal language model with its tokenizer."""
    revision: str | None = None
    """Commit of a hub model; None takes its newest."""
    prompt_template: str = "Write the image workflow for this prompt.\nPrompt: {prompt}\nWorkflow:"
    """What the model reads before the workflow; `{prompt}` is replaced."""
    use_chat_template: bool = False
    """Wrap that text as a user's turn by the tokenizer's chat template."""
    num_prompt_tokens: int = 128
    """Tokens kept of a prompt; the template's come on top."""
    num_workflow_tokens: int = 64
    """Workflow positions, and the grammar's token budget: no design is longer."""
    lora: LoRAConfig = LoRAConfig()
    """The adapter of SFT, merged into the saved model, and that of tuning, kept beside it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the frozen weights; workflow rows and adapters are float32."""
    device: str = "auto"
    """Where it runs, as torch names it; `auto` is the process's own GPU, else the CPU."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass; a prompt is then read once per row."""

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("num_prompt_tokens", "num_workflow_tokens"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        once = self.prompt_template.count("{prompt}") == 1
        check(once, "prompt_template", self.prompt_template, "{prompt} once")
        check(bool(self.name_or_path), "name_or_path", self.name_or_path, "a folder or a name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """`train_sft`: maximum likelihood under the grammar mask, on pairs, then on good cells."""

    seed: int = 0
    """Seed of weights, batches and samples."""
    policy: PolicyConfig | LanguageModelConfig = PolicyConfig()
    """The model: the embedded one by size, or a pretrained language model."""
    prior_steps: int = 130
    """Phase 1: steps on the prompt-workflow pairs."""
    best_steps: int = 70
    """Phase 2: steps on the best cells of each train prompt of the triplets, if they are given."""
    best_per_prompt: int = 2
    """Cells kept per prompt, by shrunk mean score."""
    score_levels: int | None = None
    """Phase 2 on all cells instead, each after a word for its score's quantile within the prompt,
    one of so many (ComfyGen-FT, arXiv 2410.01731). Off is None."""
    batch_size: int = 128
    """Sequences per step, of all processes together."""
    micro_batch_size: int | None = None
    """Sequences per forward pass of a process; smaller ones take less memory and change nothing
    but the order of summation. None takes the whole batch at once."""
    lr: float = 3e-3
    """Peak learning rate of AdamW; falls linearly to a tenth within each phase."""
    warmup_steps: int = 10
    """Steps of linear warm-up at the start of phase 1."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    num_samples: int = 200
    """Designs sampled at the end to log validity, distinct share and length."""
    num_held_out: int = 256
    """Held-out pairs at most whose likelihood is reported at the end."""
    num_processes: int = 2
    """Worker processes that encode pairs, of no use for a single shard; changes no result."""
    checkpoint_every: int = 20
    """Steps between checkpoints of an unfinished run."""
    num_threads: int = 1
    """Torch threads; part of the configuration since it may change the last bits."""

    def __post_init__(self) -> None:
        """Check the fields."""
        positive = ("batch_size", "best_per_prompt", "num_samples", "checkpoint_every")
        for name in (*positive, "num_processes", "num_threads"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("prior_steps", "best_steps", "warmup_steps", "num_held_out"):
            check(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        rows, levels = self.micro_batch_size, self.score_levels
        check(rows is None or rows >= 1, "micro_batch_size", rows, ">= 1")
        check(levels is None or 2 <= levels <= 26, "score_levels", levels, "in [2, 26]")
        check(self.prior_steps + self.best_steps > 0, "prior_steps", self.prior_steps, "a step")
        check(self.lr > 0, "lr", self.lr, "> 0")
        check(self.grad_clip > 0, "grad_clip", self.grad_clip, "> 0")

    @property
    def wanted_inputs(self) -> tuple[str, ...]:
        """Optional inputs of the stage that this configuration makes use of."""
        return ("triplets",) if self.best_steps else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """`train_grpo`: policy optimisation on the frozen reward ensemble; nothing is rendered."""

    seed: int = 0
    """Seed of prompts and designs; step s draws from (seed, s) alone."""
    num_steps: int = 96
    """Rollouts; each is followed by `num_minibatches` updates."""
    prompts_per_step: int = 32
    """Groups per rollout."""
    designs_per_prompt: int = 8
    """Designs per group: the advantage compares a design with its group's mean."""
    num_minibatches: int = 8
    """Updates per rollout and epoch; whole groups go to one minibatch."""
    epochs: int = 1
    """Passes over a rollout's minibatches."""
    accumulate: int = 1
    """Backward passes per update: the memory of a minibatch's share, the gradient of the whole."""
    lr: float = 1e-3
    """Learning rate of AdamW over all weights but the embeddings."""
    warmup_steps: int = 2
    """Rollouts over which the learning rate rises linearly."""
    clip: float = 0.2
    """Clip range of the importance ratio per token."""
    kl_coef: float = 0.05
    """Weight of KL(policy || SFT reference) per choice: stays where the ensemble is right."""
    kl: Literal["exact", "k3"] = "exact"
    """The KL as a sum over legal tokens, or its k3 estimate from the chosen ones."""
    kl_gate_frac: float | None = None
    """Only this share of a rollout's designs, those of largest spread, pays for the KL; null: all.
    """
    entropy_coef: float = 0.0
    """Weight of an entropy bonus per choice; it also rewards what the reference never does."""
    entropy_floor: float | None = None
    """The bonus acts only on rollouts of less mean entropy per choice, in nats; null: always."""
    divide_by_std: bool = False
    """Divide advantages by the group's standard deviation; sharpens to nearly one workflow."""
    advantage_clip: float | None = None
    """Largest size of an advantage; null: none is cut."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    max_step_kl: float = 1.0
    """Trust region: the run stops if one rollout's updates move the policy further, in nats."""
    watch_every: int | None = None
    """Steps between looks at reward hacking: designs are rendered and logged; null: never."""
    watch_prompts: int = 8
    """Designs rendered at each look, one per prompt."""
    watch_rubric: str = "shapes"
    """What scores them."""
    num_proposals: int | None = 1000
    """Designs of the tuned policy handed on for rendering (`proposals.parquet`); null: none."""
    checkpoint_every: int = 5
    """Steps between checkpoints of an unfinished run."""
    num_threads: int = 1
    """Torch threads; part of the configuration since it may change the last bits."""

    def __post_init__(self) -> None:
        """Check the fields."""
        positive = ("num_steps", "prompts_per_step", "num_minibatches", "checkpoint_every")
        for name in (*positive, "epochs", "accumulate", "watch_prompts", "num_threads"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("watch_every", "num_proposals"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, ">= 1 or null")
        check(self.designs_per_prompt >= 2, "designs_per_prompt", self.designs_per_prompt, ">= 2")
        whole = self.prompts_per_step % self.num_minibatches == 0
        expected = f"a divisor of prompts_per_step = {self.prompts_per_step}"
        check(whole, "num_minibatches", self.num_minibatches, expected)
        groups = self.prompts_per_step // self.num_minibatches
        expected = f"a divisor of the {groups} prompts of a minibatch"
        check(groups % self.accumulate == 0, "accumulate", self.accumulate, expected)
        for name in ("lr", "clip", "grad_clip", "max_step_kl"):
            check(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        for name in ("kl_coef", "entropy_coef", "warmup_steps"):
            check(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        share = self.kl_gate_frac
        check(share is None or 0 < share <= 1, "kl_gate_frac", share, "in (0, 1] or null")
        floor = self.entropy_floor
        check(floor is None or floor >= 0, "entropy_floor", floor, ">= 0 or null")
        idle = floor is not None and self.entropy_coef == 0
        check(not idle, "entropy_floor", floor, "null where entropy_coef is 0")
        bound = self.advantage_clip
        check(bound is None or bound > 0, "advantage_clip", bound, "> 0 or null")
