"""The embedded policy: a small Llama-layout decoder over prompt words and workflow tokens.

Layout of Llama (arXiv 2302.13971): RMSNorm before each sublayer, rotary positions, SwiGLU, no
biases. A sequence is the prompt, a start token at a fixed position, then the workflow; what lies
between prompt and start is padding, which the workflow does not see. Logits are over workflow
tokens only.

    embedding rows: 0 .. num_words - 1 prompt words | num_words + v workflow token v | start

Shapes: P prompts, G designs per prompt, B = P * G rows (rows of a prompt are neighbours), L prompt
positions, T workflow positions, S = L + T keys, D width, H heads, K head width, V workflow tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowloom.config import override
from flowloom.dataset.tokenizer import WordTokenizer
from flowloom.designer.attention import Cache, Packed, attend_causally
from flowloom.designer.config import PolicyConfig
from flowloom.runs import write_json

MODEL_FILE, MODEL_RECORD = "model.safetensors", "model.json"
ADAPTER_FILE, ADAPTER_RECORD = "adapter.safetensors", "adapter.json"
TOKENIZER_FILE, VOCABULARY_FILE = "tokenizer.json", "vocabulary.json"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
LayerAttend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """One decoder block: attention and SwiGLU, each after RMSNorm, each added to the residual."""

    def __init__(self, config: PolicyConfig):
        """Build the block; `Policy` initialises its weights."""
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.attention_norm = nn.Parameter(torch.ones(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(width))
        self.gate_up = nn.Linear(width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, width, bias=False)

    def forward(self, x_ND: Tensor, cos_NK: Tensor, sin_NK: Tensor, attend: Attend) -> Tensor:
        """Apply the block; `attend(query, key, value)` owns cache and mask."""
        N, D = x_ND.shape
        qkv = self.qkv(F.rms_norm(x_ND, (D,), self.attention_norm, 1e-6))
        qkv = qkv.view(N, 3, self.num_heads, -1)
        query, key = _rotate(qkv[:, :2], cos_NK, sin_NK).unbind(1)
        x_ND = x_ND + self.attention_out(attend(query, key, qkv[:, 2]))
        gate, up = self.gate_up(F.rms_norm(x_ND, (D,), self.mlp_norm, 1e-6)).chunk(2, -1)
        return x_ND + self.down(F.silu(gate) * up)


class Policy(nn.Module):
    """pi(workflow token | prompt, tokens so far), before the grammar mask."""

    def __init__(
        self, config: PolicyConfig, tokenizer: WordTokenizer, num_tokens: int, seed: int = 0
    ):
        """Build a policy with fresh weights.

        Args:
            config: Its size.
            tokenizer: Prompt words to ids, padding 0.
            num_tokens: Size V of the workflow vocabulary, reserved rows included.
            seed: Seed of the weights.
        """
        super().__init__()
        self.config, self.tokenizer, self.num_tokens = config, tokenizer, num_tokens
        self.num_words = len(tokenizer)
        self.embedding = nn.Embedding(self.num_words + num_tokens + 1, config.width)
        self.blocks: list[Block] = nn.ModuleList(Block(config) for _ in range(config.num_layers))  # pyright: ignore
        self.norm = nn.Parameter(torch.ones(config.width))
        self.head = nn.Linear(config.width, num_tokens, bias=False)
        cos, sin = _rotary_table(
            config.num_prompt_tokens + config.num_workflow_tokens,
            config.width // config.num_heads,
        )
        self._cos, self._sin = cos, sin
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                std = weight.shape[1] ** -0.5
                if name.endswith(("attention_out.weight", "down.weight")):
                    std /= math.sqrt(2 * config.num_layers)
                if name in ("embedding.weight", "head.weight"):
                    std = 0.5 if name == "embedding.weight" else 0.02
                nn.init.normal_(weight, std=std, generator=generator)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What SFT trains: all weights."""
        return dict(self.named_parameters())

    def tuned_parameters(self) -> dict[str, nn.Parameter]:
        """What GRPO trains and an adapter holds: all weights but the embeddings."""
        return {n: w for n, w in self.named_parameters() if not n.startswith("embedding.")}

    def extended(self, heirs: Mapping[int, Sequence[int]]) -> Policy:
        """A copy that knows tokens it never saw: each starts as the mean of others, untrained.

        Args:
            heirs: New workflow token to the tokens it resembles.
        """
        copy = deepcopy(self)
        with torch.no_grad():
            for weight, first in ((copy.embedding.weight, self.num_words), (copy.head.weight, 0)):
                for token, like in heirs.items():
                    weight[first + token] = weight[[first + other for other in like]].mean(0)
        return copy

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Ids of prompts, padded with 0 at the right to the longest of them. Shape P L."""
        ids_PL = torch.tensor(self.tokenizer.encode_batch(prompts, self.config.num_prompt_tokens))
        longest = int((ids_PL != 0).sum(1).max())
        return ids_PL[:, : max(longest, 1)]

    def prefill(self, prompts_PL: Tensor) -> Cache:
        """Run the prompts once; `extend` continues from the cache."""
        P, L = prompts_PL.shape
        keys, values = [], []

        def attend(_layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys.append(key.reshape(P, L, -1))
            values.append(value.reshape(P, L, -1))
            return attend_causally(query, key, value, P)

        self._read(prompts_PL.flatten(), torch.arange(L).repeat(P), attend)
        return Cache(keys, values, prompts_PL == 0)

    def _read(self, ids_N: Tensor, positions_N: Tensor, attend: LayerAttend) -> Tensor:
        """All blocks, of tokens in a list. Shape N D."""
        cos_NK, sin_NK = (
            self._cos[positions_N][:, None, None],
            self._sin[positions_N][:, None, None],
        )
        x_ND = self.embedding(ids_N)
        for layer, block in enumerate(self.blocks):
            x_ND = block(x_ND, cos_NK, sin_NK, partial(attend, layer))
        return x_ND

    def _logits(self, x_ND: Tensor) -> Tensor:
        return self.head(F.rms_norm(x_ND, (self.config.width,), self.norm, 1e-6))

    def start(self, num_rows: int) -> Tensor:
        """Inputs that ask for the first workflow token. Shape B 1."""
        return torch.full((num_rows, 1), self.num_tokens)

    def extend(self, inputs_BT: Tensor, cache: Cache) -> Tensor:
        """Read T more inputs per row into a cache with room for them.

        Args:
            inputs_BT: Workflow token ids, or `start`.
            cache: Of B rows.

        Returns:
            Unmasked logits of the token after the last input, shape B V.
        """
        B, T = inputs_BT.shape
        first = self.config.num_prompt_tokens + cache.num_written
        positions_N = torch.arange(first, first + T).repeat(B)
        cache.open(T)
        x_ND = self._read(inputs_BT.flatten() + self.num_words, positions_N, cache.attend)
        cache.close()
        return self._logits(x_ND[T - 1 :: T])

    @staticmethod
    def extend_together(
        policies: Sequence[Policy], inputs_BT: Tensor, caches: Sequence[Cache]
    ) -> list[Tensor]:
        """`extend` of several policies with the same inputs; logits of each, shape B V."""
        return [
            policy.extend(inputs_BT, cache) for policy, cache in zip(policies, caches, strict=True)
        ]

    def forward(self, prompts_PL: Tensor, tokens_BT: Tensor, wanted_BT: Tensor) -> Tensor:
        """Teacher-forced logits of the wanted tokens, each prompt read once for its B / P rows.

        Returns:
            Logits, shape N V: those of token t come from the prompt and tokens 0 .. t - 1.
        """
        # Behind its last wanted token nothing of a row is read.
        places_T = torch.arange(1, tokens_BT.shape[1] + 1)
        lengths_B = (wanted_BT * places_T).amax(1).clamp(min=1)
        inputs_BT = torch.cat([self.start(len(tokens_BT)), tokens_BT[:, :-1]], 1)
        packed = Packed(prompts_PL, inputs_BT, lengths_B)
        P, L = prompts_PL.shape
        ids_N = torch.cat([prompts_PL.flatten(), packed.inputs_N + self.num_words])
        first = self.config.num_prompt_tokens
        positions_N = torch.cat([torch.arange(L).repeat(P), first + packed.positions_N])
        x_ND = self._read(ids_N, positions_N, packed.attend)
        return self._logits(x_ND[packed.place_BT[wanted_BT]])

    def save(self, folder: Path) -> None:
        """Write weights, size and tokenizer: a designer folder but for its vocabulary."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        safetensors.torch.save_file(weights, folder / MODEL_FILE)
        record = {"policy": dataclasses.asdict(self.config), "num_tokens": self.num_tokens}
        write_json(folder / MODEL_RECORD, record)
        self.tokenizer.save(folder / TOKENIZER_FILE)

    def save_adapter(self, folder: Path, designer_dir: Path) -> None:
        """Write the tuned weights, bound to the designer that they were tuned from."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {n: w.detach().contiguous() for n, w in self.tuned_parameters().items()}
        safetensors.torch.save_file(weights, folder / ADAPTER_FILE)
        write_json(folder / ADAPTER_RECORD, {"model_sha256": _sha256(designer_dir / MODEL_FILE)})

    @classmethod
    def load(cls, designer_dir: Path, adapter_dir: Path | None = None) -> Policy:
        """Load a designer folder, with the tuned weights of an adapter folder if one is given.

        Raises:
            ValueError: If the adapter was tuned from another designer.
        """
        record = json.loads((designer_dir / MODEL_RECORD).read_text())
        tokenizer = WordTokenizer.load(designer_dir / TOKENIZER_FILE)
        policy = cls(override(PolicyConfig(), record["policy"]), tokenizer, record["num_tokens"])
        policy.load_state_dict(safetensors.torch.load_file(designer_dir / MODEL_FILE))
        if adapter_dir is not None:
            wanted = json.loads((adapter_dir / ADAPTER_RECORD).read_text())["model_sha256"]
            found = _sha256(designer_dir / MODEL_FILE)
            if wanted != found:
                raise ValueError(
                    f"{adapter_dir}: got the adapter of designer {wanted[:12]}, "
                    f"expected one of {found[:12]}"
                )
            weights = safetensors.torch.load_file(adapter_dir / ADAPTER_FILE)
            policy.load_state_dict(weights, strict=False)
        return policy


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _rotary_table(length: int, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position * 10000^(-2i/K), each for both halves. Shapes S K."""
    frequency = 10000.0 ** (-np.arange(0, width, 2) / width)
    angle = torch.from_numpy(np.outer(np.arange(length), np.tile(frequency, 2))).float()
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
    """Rotary positions, halves convention (arXiv 2104.09864): x cos + (-x2, x1) sin.

    Shape N 2 H K: queries and keys at once.
    """
    first, second = x.chunk(2, -1)
    return x * cos_NK + torch.cat([-second, first], -1) * sin_NK
