"""A language model that writes workflows as JSON: the peer of the embedded designer.

The same pairs, the same width, depth and heads; the target is the template in API format as
minified JSON, cut by a BPE that is trained on it. Nothing keeps what it writes valid.
"""

from __future__ import annotations

import json
import time

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flowloom.designer.sft import is_valid
from flowloom.workflow import Workflow

PAD, START, END = "<pad>", "<start>", "<end>"
NUM_MERGES_AT_MOST = 4096
BATCH_SIZE = 32


def llama(config, num_tokens, max_length, seed=0, **special):
    """A `LlamaForCausalLM` of the width, depth and heads of an embedded policy."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=num_tokens,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=max_length,
            tie_word_embeddings=False,
            **special,
        )
    )


def minified(workflow):
    """A template as the twin writes it."""
    return json.dumps(workflow.to_api(), separators=(",", ":"))


class JsonTwin:
    """Tokenizer, model, training and sampling."""

    def __init__(self, config, prompts, workflows, catalogue):
        """Train the tokenizer on pairs of prompt and workflow; the weights are fresh."""
        self.catalogue = catalogue
        texts = [minified(workflow) for workflow in workflows]
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=NUM_MERGES_AT_MOST,
            special_tokens=[PAD, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator([*prompts, *texts], trainer)
        self.prompts = [row.ids for row in bpe.encode_batch(prompts)]
        self.targets = [row.ids for row in bpe.encode_batch(texts)]
        # A prompt ends with the token that starts the workflow.
        bpe.post_processor = processors.TemplateProcessing(
            single=f"$A {START}", special_tokens=[(START, bpe.token_to_id(START))]
        )
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, pad_token=PAD, eos_token=END, padding_side="left"
        )
        self.pad, self.start, self.end = self.tokenizer.convert_tokens_to_ids([PAD, START, END])
        self.max_new_tokens = max(map(len, self.targets)) + 8
        self.model = llama(
            config,
            len(self.tokenizer),
            self.max_new_tokens + 64,
            bos_token_id=self.start,
            eos_token_id=self.end,
            pad_token_id=self.pad,
        )

    def mean_tokens(self):
        """Tokens of a workflow in the pairs, the end included."""
        return float(np.mean([len(row) + 1 for row in self.targets]))

    def train(self, seconds, lr=3e-3):
        """Maximum likelihood for CPU `seconds`; sequences seen and the last losses per token."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, fused=True)
        rng = np.random.default_rng(0)
        order = np.argsort([len(row) for row in self.targets], kind="stable")
        began, seen, losses = time.process_time(), 0, []
        while (spent := (time.process_time() - began) / seconds) < 1:
            for group in optimizer.param_groups:
                group["lr"] = lr * (1.0 - 0.95 * spent)
            first = int(rng.integers(len(order) - BATCH_SIZE))
            loss = self._loss(order[first : first + BATCH_SIZE])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            seen += BATCH_SIZE
            losses.append(loss.item())
        return seen, float(np.mean(losses[-20:]))

    def _loss(self, rows):
        whole = [[*self.prompts[r], self.start, *self.targets[r], self.end] for r in rows]
        width = max(map(len, whole))
        ids = torch.full((len(rows), width), self.pad)
        wanted = torch.zeros(len(rows), width, dtype=torch.bool)
        for index, (row, tokens) in enumerate(zip(rows, whole, strict=True)):
            ids[index, : len(tokens)] = torch.tensor(tokens)
            wanted[index, len(self.prompts[row]) + 1 : len(tokens)] = True
        # Padding stands behind, where nothing that counts can see it.
        hidden = self.model.model(ids).last_hidden_state[:, :-1][wanted[:, 1:]]
        return F.cross_entropy(self.model.lm_head(hidden), ids[wanted])

    def sample(self, prompts):
        """JSON texts, sampled at temperature 1 until each has ended."""
        inputs = self.tokenizer(list(prompts), return_tensors="pt", padding=True)
        with torch.no_grad():
            tokens = self.model.eval().generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=self.max_new_tokens,
            )
        written = tokens[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(written, skip_special_tokens=True)

    def valid(self, text):
        """Whether a text is a workflow that the catalogue accepts."""
        try:
            workflow = Workflow.from_api(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
        return is_valid(workflow, self.catalogue)
