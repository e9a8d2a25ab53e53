"""The policy over a pretrained causal language model: its own weights frozen, workflow tokens new.

A sequence is the prompt as the model's own tokenizer writes it, then a start token, then the
workflow. Workflow tokens have tables of their own, beside the model's: rows that go in, and rows
that score the model's last hidden state. Both start from the words that describe a token.

SFT trains these rows and a LoRA, which is merged into the saved model. GRPO trains a fresh LoRA and
a change of the scoring rows; with both at strength 0 the policy is its own reference, so that one
model in memory is two policies, and one batch runs both.

Shapes: P prompts, B rows, L prompt positions (padded at the left), T workflow positions, D width,
V workflow tokens, N wanted positions.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowloom.config import override, to_dict
from flowloom.designer.config import LanguageModelConfig
from flowloom.designer.descriptions import START
from flowloom.designer.lora import Adapter
from flowloom.designer.past import Cache, Past
from flowloom.designer.policy import ADAPTER_FILE, ADAPTER_RECORD, MODEL_RECORD
from flowloom.designer.pretrained import read_model
from flowloom.progress import no_progress_bars
from flowloom.runs import file_sha256, write_json

ROWS_FILE = "workflow.safetensors"
PADDING = -1
"""Prompt position without a token; no tokenizer has this id."""


class LanguageModelPolicy(nn.Module):
    """pi(workflow token | prompt, tokens so far), before the grammar mask."""

    def __init__(
        self,
        config: LanguageModelConfig,
        model: Any,
        tokenizer: Any,
        descriptions: Sequence[str],
        rows: Mapping[str, Tensor] | None = None,
    ):
        """Put a policy together; `build` and `load` read its parts.

        Args:
            config: How the model is read.
            model: A causal language model of transformers, from now on frozen.
            tokenizer: Its tokenizer.
            descriptions: Words for each of the V workflow tokens.
            rows: `embedding` (the start token is the last row) and `head`; without them, and for
                tokens that come later, the means of the model's rows of a description's words.
        """
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.descriptions, self.num_tokens = tuple(descriptions), len(descriptions)
        self.model = model.requires_grad_(False)
        self.adapter: Adapter | None = None
        self.strength = 1.0
        if rows is None:
            embedding, head = self._described([*descriptions, START])
            rows = {"embedding": embedding, "head": head[:-1]}
        device = model.device
        self.embedding = nn.Embedding.from_pretrained(rows["embedding"].float().to(device), False)
        self.head = nn.Parameter(rows["head"].float().to(device))
        self.head_delta: nn.Parameter | None = None
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable()
        self.eval()

    @classmethod
    def build(
        cls, config: LanguageModelConfig, descriptions: Sequence[str], seed: int
    ) -> LanguageModelPolicy:
        """A policy before any training: new rows from descriptions, a LoRA that does nothing.

        Args:
            config: Which model, and how it is read.
            descriptions: Words for each workflow token.
            seed: Seed of the LoRA.

        Raises:
            ValueError: There is no such model, or the LoRA's layers are not in it.
        """
        model, tokenizer = read_model(config.name_or_path, config, config.revision)
        policy = cls(config, model, tokenizer, descriptions)
        policy.adapter = Adapter(model, config.lora, seed)
        return policy

    def make_tunable(self) -> None:
        """Freeze everything and add what GRPO trains; nothing changes yet."""
        self.requires_grad_(False)
        # Tuning compares probabilities: a dropout would move them by itself.
        lora = dataclasses.replace(self.config.lora, dropout=0.0)
        self.adapter = Adapter(self.model, lora, seed=0)
        self.head_delta = nn.Parameter(torch.zeros_like(self.head))

    def at_strength(self, strength: float) -> LanguageModelPolicy:
        """The same model with its adapter at a strength: 0 reference, 1 tuned, w past it."""
        view = copy.copy(self)
        view.strength = strength
        return view

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What SFT trains: the workflow's rows and a LoRA, a fresh one where there is none yet."""
        if self.adapter is None:
            self.adapter = Adapter(self.model, self.config.lora, seed=0)
        return self._weights("embedding.weight", "head")

    def tuned_parameters(self) -> dict[str, nn.Parameter]:
        """What GRPO trains and an adapter holds: its LoRA and the change of the scoring rows."""
        return self._weights("head_delta")

    def train(self, mode: bool = True) -> LanguageModelPolicy:
        """Switch the LoRA's dropout on or off."""
        super().train(mode)
        # Layers that recompute drop the cache; `forward` alone switches that on.
        for layer in self._recomputing():
            layer.training = False
        return self

    def extended(
        self, heirs: Mapping[int, Sequence[int]], descriptions: Mapping[int, str] | None = None
    ) -> LanguageModelPolicy:
        """A policy over the same model that knows tokens it never saw, untrained.

        A row starts where its own description puts it, moved by what training moved the tokens
        that it resembles, on average: d(new) + mean(row - d). Without a description it starts as
        their mean.

        Args:
            heirs: New workflow token to the tokens it resembles.
            descriptions: Words for new tokens.
        """
        copied = copy.copy(self)
        copied._parameters, copied._modules = dict(self._parameters), dict(self._modules)
        texts = list(self.descriptions)
        rows = [self.embedding.weight.detach().clone(), self.head.detach().clone()]
        delta = None if self.head_delta is None else self.head_delta.detach().clone()
        for token, like in heirs.items():
            olds, old_texts = list(like), [self.descriptions[other] for other in like]
            text = (descriptions or {}).get(token)
            for weight, means in zip(rows, self._described([text or "", *old_texts]), strict=True):
                moved = means[0] - means[1:].mean(0) if text else 0.0
                weight[token] = weight[olds].mean(0) + moved
            if delta is not None:
                delta[token] = delta[olds].mean(0)
            texts[token] = text or texts[token]
        trainable = self.embedding.weight.requires_grad
        copied.embedding = nn.Embedding.from_pretrained(rows[0], not trainable)
        copied.head = nn.Parameter(rows[1], trainable)
        copied.head_delta = None if delta is None else nn.Parameter(delta)
        copied.descriptions = tuple(texts)
        return copied

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of the filled template, padded at the left to the longest. Shape P L."""
        most = self.config.num_prompt_tokens
        alone = self.tokenizer(
            list(prompts), add_special_tokens=False, return_offsets_mapping=True
        )["offset_mapping"]
        texts = []
        for prompt, spans in zip(prompts, alone, strict=True):
            kept = prompt if len(spans) <= most else prompt[: spans[most - 1][1]]
            texts.append(self.config.prompt_template.replace("{prompt}", kept))
        chat = self.config.use_chat_template
        if chat:
            turns = [[{"role": "user", "content": text}] for text in texts]
            texts = [
                self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
                for turn in turns
            ]
        ids = self.tokenizer(texts, add_special_tokens=not chat)["input_ids"]
        longest = max(map(len, ids))
        return torch.tensor([[PADDING] * (longest - len(row)) + row for row in ids])

    def prefill(self, prompts_PL: Tensor) -> Cache:
        """Run the prompts once; `extend` continues from the cache."""
        from transformers import DynamicCache

        prompts_PL = prompts_PL.to(self.model.device)
        cache = DynamicCache(config=self.model.config)
        past = Past(cache, prompts_PL != PADDING)
        self._run(self._words(prompts_PL), past.seen_BL, cache, self.strength)
        return Cache(past, torch.arange(len(prompts_PL)))

    def start(self, num_rows: int) -> Tensor:
        """Inputs that ask for the first workflow token. Shape B 1."""
        return torch.full((num_rows, 1), self.num_tokens)

    def extend(self, inputs_BT: Tensor, cache: Cache) -> Tensor:
        """Read T more inputs per row; unmasked logits of the token after the last of them.

        Args:
            inputs_BT: Workflow token ids, or `start`.
            cache: Of B rows; it remembers the new positions.

        Returns:
            Logits, float32 on the CPU, shape B V.
        """
        return self._logits(self._append([self], inputs_BT, [cache])[:, -1]).cpu()

    @staticmethod
    def extend_together(
        policies: Sequence[LanguageModelPolicy], inputs_BT: Tensor, caches: Sequence[Cache]
    ) -> list[Tensor]:
        """`extend` of several policies with the same inputs; logits of each, shape B V.

        Policies over one model run in one batch, each row with its own strength of the adapter.
        """
        first = policies[0]
        if any(policy.model is not first.model for policy in policies):
            pairs = zip(policies, caches, strict=True)
            return [policy.extend(inputs_BT, cache) for policy, cache in pairs]
        hidden = first._append(policies, inputs_BT, caches)[:, -1].chunk(len(policies))
        return [p._logits(part).cpu() for p, part in zip(policies, hidden, strict=True)]

    def forward(self, prompts_PL: Tensor, tokens_BT: Tensor, wanted_BT: Tensor) -> Tensor:
        """Teacher-forced logits of the wanted tokens, each prompt read once for its B / P rows.

        Only gradients of strength 1 are right when activations are recomputed.

        Returns:
            Logits, float32 on the model's device, shape N V: those of token t come from the prompt
            and tokens 0 .. t - 1.
        """
        B, T = tokens_BT.shape
        num = B // len(prompts_PL)
        wanted_BT = wanted_BT.to(self.model.device)
        inputs_BT = torch.cat([self.start(B), tokens_BT[:, :-1]], 1)
        if not (self.config.gradient_checkpointing and torch.is_grad_enabled()):
            cache = self.prefill(prompts_PL).repeat(num)
            return self._logits(self._append([self], inputs_BT, [cache])[wanted_BT])
        # A recomputed layer cannot keep a cache: prompt and workflow are read in one go.
        prompts_BL = prompts_PL.to(self.model.device).repeat_interleave(num, 0)
        inputs_BSD = torch.cat([self._words(prompts_BL), self._tokens(inputs_BT)], 1)
        seen_BS = F.pad(prompts_BL != PADDING, (0, T), value=True)
        with self._recompute():
            hidden_BSD = self._run(inputs_BSD, seen_BS, None, self.strength)
        return self._logits(hidden_BSD[:, -T:][wanted_BT])

    def save(self, folder: Path) -> None:
        """Write a designer folder but for its vocabulary: a transformers model, adapter merged."""
        folder.mkdir(parents=True, exist_ok=True)
        strength = self.strength
        weights = self.model.state_dict()
        if self.adapter is not None:
            weights = self.adapter.merged(self.model, strength)
        with no_progress_bars("transformers"):
            self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)
        head = self.head if self.head_delta is None else self.head + strength * self.head_delta
        rows = {"embedding": self.embedding.weight, "head": head}
        rows = {name: weight.detach().cpu().contiguous() for name, weight in rows.items()}
        safetensors.torch.save_file(rows, folder / ROWS_FILE)
        record = {
            "language_model": to_dict(self.config),
            "descriptions": list(self.descriptions),
            "sha256": {
                path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))
            },
        }
        write_json(folder / MODEL_RECORD, record)

    def save_adapter(self, folder: Path, designer_dir: Path) -> None:
        """Write the tuned weights, bound to the designer that they were tuned from."""
        assert self.adapter is not None
        assert self.head_delta is not None
        folder.mkdir(parents=True, exist_ok=True)
        self.adapter.save(folder)
        delta = {"head_delta": self.head_delta.detach().cpu().contiguous()}
        safetensors.torch.save_file(delta, folder / ADAPTER_FILE)
        write_json(
            folder / ADAPTER_RECORD, {"model_sha256": file_sha256(designer_dir / MODEL_RECORD)}
        )

    @classmethod
    def load(cls, designer_dir: Path, adapter_dir: Path | None = None) -> LanguageModelPolicy:
        """Load a designer folder, with the tuned weights of an adapter folder if one is given.

        Raises:
            ValueError: If the adapter was tuned from another designer.
        """
        record = json.loads((designer_dir / MODEL_RECORD).read_text())
        config = override(LanguageModelConfig(), record["language_model"])
        if adapter_dir is not None:
            wanted = json.loads((adapter_dir / ADAPTER_RECORD).read_text())["model_sha256"]
            found = file_sha256(designer_dir / MODEL_RECORD)
            if wanted != found:
                raise ValueError(
                    f"{adapter_dir}: got the adapter of designer {wanted[:12]}, "
                    f"expected one of {found[:12]}"
                )
        model, tokenizer = read_model(str(designer_dir), config)
        rows = safetensors.torch.load_file(designer_dir / ROWS_FILE)
        policy = cls(config, model, tokenizer, record["descriptions"], rows)
        if adapter_dir is not None:
            policy.make_tunable()
            policy._load_adapter(adapter_dir)
        return policy

    def _weights(self, *names: str) -> dict[str, nn.Parameter]:
        """Those named, and the LoRA."""
        own = self.named_parameters()
        return {name: weight for name, weight in own if name in names or ".lora_" in name}

    def _load_adapter(self, folder: Path) -> None:
        assert self.adapter is not None
        assert self.head_delta is not None
        self.adapter.load(folder)
        delta = safetensors.torch.load_file(folder / ADAPTER_FILE)["head_delta"]
        self.head_delta.data.copy_(delta)

    def _append(
        self, policies: Sequence[LanguageModelPolicy], inputs_BT: Tensor, caches: Sequence[Cache]
    ) -> Tensor:
        """Last hidden states of new inputs, rows of each policy in turn."""
        past = Cache.gather(caches)
        inputs = torch.cat([policy._tokens(inputs_BT) for policy in policies])
        past.num_written += inputs_BT.shape[1]
        seen = F.pad(past.seen_BL, (0, past.num_written), value=True)
        strength = self.strength
        if len(policies) > 1:
            strengths = torch.tensor([policy.strength for policy in policies])
            strength = strengths.repeat_interleave(len(inputs_BT)).to(inputs.device)[:, None, None]
        return self._run(inputs, seen, past.cache, strength)

    def _run(
        self, inputs_BTD: Tensor, seen_BS: Tensor, cache: Any, strength: float | Tensor
    ) -> Tensor:
        """Last hidden states of the newest T of S positions. Shape B T D.

        A position's number counts what the row has seen, so padding moves nothing.
        """
        T = inputs_BTD.shape[1]
        positions_BT = (seen_BS.long().cumsum(1) - 1).clamp(min=0)[:, -T:]
        with nullcontext() if self.adapter is None else self.adapter.at(strength):
            return self.model.base_model(
                inputs_embeds=inputs_BTD,
                attention_mask=seen_BS.long(),
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state

    def _words(self, prompts_BL: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(prompts_BL.clamp(min=0))

    def _tokens(self, inputs_BT: Tensor) -> Tensor:
        return self.embedding(inputs_BT.to(self.model.device)).to(self.model.dtype)

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        hidden_ND = hidden_ND.float()
        logits_NV = F.linear(hidden_ND, self.head)
        if self.head_delta is None or self.strength == 0.0:
            return logits_NV
        return logits_NV + self.strength * F.linear(hidden_ND, self.head_delta)

    def _described(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Mean of the model's rows, in and out, of each text's tokens; of all where it has none."""
        rows_in = self.model.get_input_embeddings()
        rows_out = self.model.get_output_embeddings().weight
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        everything = list(range(min(len(self.tokenizer), len(rows_out))))
        means = []
        with torch.no_grad():
            for ids in encoded:
                ids = torch.tensor(ids or everything, device=self.model.device)
                means.append((rows_in(ids).float().mean(0), rows_out[ids].float().mean(0)))
        into, out = zip(*means, strict=True)
        return torch.stack(into), torch.stack(out)

    def _recomputing(self) -> list[nn.Module]:
        return [m for m in self.model.modules() if getattr(m, "gradient_checkpointing", False)]

    @contextmanager
    def _recompute(self) -> Iterator[None]:
        """Let layers drop activations; they do so in training mode alone, dropout left as it is."""
        layers = self._recomputing()
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False
