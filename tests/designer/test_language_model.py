"""Facts: a pretrained language model serves wherever the embedded policy does.

Workflow rows start as hand-computed means of the words that describe them; SFT lowers the loss and
leaves the model's own weights bit for bit; what is merged and saved gives the same logits;
probabilities of a rollout are those of teacher forcing; prompts of other lengths beside a prompt
change nothing; with the adapter off the policy is its reference exactly, with it on and off in one
batch each row is what it is alone; guidance in weights is exact at 0 and 1; recomputed activations
give the same gradients; PEFT reads the saved adapter; the loops of SFT and GRPO train it, and end
with the same bytes when they are stopped and started again.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch

from flowloom.config import override, to_dict
from flowloom.designer import grpo, loading, sft
from flowloom.designer.config import (
    GRPOConfig,
    LanguageModelConfig,
    LoRAConfig,
    PolicyConfig,
    SFTConfig,
)
from flowloom.designer.descriptions import describe
from flowloom.designer.language_model import LanguageModelPolicy
from flowloom.designer.rollout import choice_logprobs, rollout
from flowloom.recipes import resolve
from flowloom.runs import Run
from flowloom.workflow import ModelFile
from tests.designer.tiny import PROMPTS, TINY

ATOL = 2e-5
"""Of logits of order one; float32 sums in another order."""
MIXED = (PROMPTS[2], PROMPTS[3])
"""A short prompt and a long one."""


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of a tiny Qwen3 (tied) and a tiny Llama (untied), random weights, own tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<end>"], initial_alphabet=alphabet
    )
    words.train_from_iterator([*PROMPTS, "node Load Checkpoint image sampler name steps"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "initializer_range": 0.15,
    }  # fmt: skip
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8, tie_word_embeddings=True))
    llama = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    for name, model in (("qwen3", qwen3), ("llama", llama)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def config_of(models, name="qwen3", **fields):
    lora = LoRAConfig(rank=4, alpha=8.0)
    defaults = {"dtype": "float32", "device": "cpu", "lora": lora, "num_prompt_tokens": 32}
    return LanguageModelConfig(name_or_path=str(models / name), **(defaults | fields))


@pytest.fixture
def build(models, catalogue, grammar):
    def built(name="qwen3", **fields):
        return loading.build_policy(
            config_of(models, name, **fields),
            vocabulary=grammar.vocabulary,
            catalogue=catalogue,
            texts=PROMPTS,
            seed=3,
        )

    return built


@pytest.fixture
def pair(build, tmp_path):
    """A tuned policy that differs from its reference, and where its designer lies."""
    build().save(tmp_path / "designer")
    tuned, reference = loading.load_pair(tmp_path / "designer")
    _disturb(tuned.tuned_parameters())
    return tuned, reference, tmp_path / "designer"


def _disturb(weights, std=0.1):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in weights.values():
            weight += std * torch.randn(weight.shape, generator=generator)


def _tokens(policy, rows=4, width=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, policy.num_tokens, (rows, width), generator=generator)


def _full(policy, prompts, tokens):
    wanted = torch.ones_like(tokens, dtype=torch.bool)
    logits = policy(policy.encode_prompts(prompts), tokens, wanted)
    return logits.view(*tokens.shape, -1)


def _same(one, other, atol=ATOL):
    assert torch.allclose(one, other, atol=atol), (one - other).abs().max()


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_rows_start_as_the_mean_of_their_description(build, catalogue, grammar, name):
    policy = build(name)
    token = grammar.vocabulary.class_ids["KSampler"]
    assert policy.descriptions[token] == "node K Sampler"
    ids = policy.tokenizer("node K Sampler", add_special_tokens=False)["input_ids"]
    weights = policy.model.state_dict()
    into = weights["model.embed_tokens.weight"]
    out = weights["lm_head.weight"] if name == "llama" else into
    assert len(ids) > 1
    _same(policy.embedding.weight[token], sum(into[i] for i in ids) / len(ids), 1e-6)
    _same(policy.head[token], sum(out[i] for i in ids) / len(ids), 1e-6)
    assert policy.embedding.weight.shape == (policy.num_tokens + 1, 32)


def test_descriptions_say_what_tokens_are(catalogue, grammar):
    texts = describe(grammar.vocabulary, catalogue)
    by_token = dict(zip(grammar.vocabulary.tokens, texts, strict=True))
    of_value = {t.text: d for t, d in by_token.items() if t.group == "value"}
    file = catalogue.files[0]
    (told,) = [d for t, d in by_token.items() if (t.kind, t.value) == (file.folder, file.name)]
    assert file.family in told
    assert file.card.split()[0] in told
    assert "sampler euler" in of_value["sampler=euler"]
    assert all(texts)


def test_sft_trains_new_rows_and_the_lora_alone(build, grammar):
    policy = build()
    policy.train()
    before = {n: w.clone() for n, w in policy.model.state_dict().items() if "lora" not in n}
    sequences = rollout(policy, grammar, MIXED, 4, seed=1).sequences
    prompts = policy.encode_prompts(MIXED)
    weights = policy.trainable_parameters()
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(6):
        loss = -choice_logprobs(policy, prompts, sequences)[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(weight.grad.abs().max() > 0 for weight in weights.values())
    assert {name.split(".")[0] for name in weights} == {"embedding", "head", "model"}
    after = policy.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_merged_and_saved_gives_the_same_logits(build, tmp_path, name):
    policy = build(name)
    _disturb(policy.trainable_parameters(), 0.05)
    tokens = _tokens(policy)
    expected = _full(policy, MIXED, tokens)
    policy.save(tmp_path / "designer")
    _same(_full(policy, MIXED, tokens), expected, 0)  # saving changes nothing
    loaded = loading.load_policy(tmp_path / "designer")
    assert isinstance(loaded, LanguageModelPolicy)
    _same(_full(loaded, MIXED, tokens), expected)
    assert loaded.descriptions == policy.descriptions
    # Untrained, the LoRA of the builder would not show: the trained one must.
    assert (_full(build(name), MIXED, tokens) - expected).abs().max() > 0.05
    text = "".join(p.read_text() for p in (tmp_path / "designer").glob("*config.json"))
    assert str(tmp_path) not in text


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_rollout_equals_teacher_forcing(build, grammar, name):
    policy = build(name)
    sampled = rollout(policy, grammar, PROMPTS, 5, seed=2)
    prompts = policy.encode_prompts(PROMPTS)
    _, logprobs_N = choice_logprobs(policy, prompts, sampled.sequences)
    _same(logprobs_N.detach(), sampled.logprobs_BT[sampled.sequences.choice_BT])
    assert policy.extend(policy.start(4), policy.prefill(prompts)).device.type == "cpu"


def test_reading_in_pieces_and_selecting_rows(build):
    policy = build()
    tokens = _tokens(policy)
    full = _full(policy, MIXED, tokens)
    read = policy.prefill(policy.encode_prompts(MIXED))
    cache = read.repeat(2)
    inputs = torch.cat([policy.start(4), tokens[:, :-1]], 1)
    for t, width in ((0, 1), (1, 3)):
        _same(policy.extend(inputs[:, t : t + width], cache), full[:, t + width - 1])
    rows = torch.tensor([3, 1])
    cache.select(rows)
    _same(policy.extend(inputs[rows, 4:], cache), full[rows, 5])
    for _ in range(2):  # the prompt stays as it was
        _same(policy.extend(policy.start(2), read.repeat(1)), full[[0, 2], 0])


def test_prompts_of_other_lengths_change_nothing(build):
    policy = build()
    tokens = _tokens(policy, 1)
    alone, beside = policy.encode_prompts(MIXED[:1]), policy.encode_prompts(MIXED)
    assert alone.shape[1] < beside.shape[1]
    _same(_full(policy, MIXED, tokens.repeat(2, 1))[:1], _full(policy, MIXED[:1], tokens))
    other = _full(policy, ["a square"], tokens)
    assert (other - _full(policy, MIXED[:1], tokens)).abs().max() > 1e-2


def test_a_long_prompt_is_cut_and_the_template_stays(build):
    policy = build(num_prompt_tokens=4, prompt_template="Say: {prompt} End:")
    long = "a red circle beside a blue square"
    ids = policy.tokenizer(long, add_special_tokens=False)["input_ids"][:4]
    kept = policy.tokenizer.decode(ids)
    read = policy.tokenizer.decode(policy.encode_prompts([long])[0])
    assert read == f"Say: {kept} End:"
    assert kept != long


def test_a_chat_template_wraps_the_text(build):
    policy = build(use_chat_template=True, prompt_template="Do {prompt}")
    policy.tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}!"
    assert policy.tokenizer.decode(policy.encode_prompts(["it"])[0]) == "<Do it>!"


def test_adapter_off_is_the_reference(pair):
    tuned, reference, designer = pair
    tokens = _tokens(tuned)
    alone = loading.load_policy(designer)
    assert torch.equal(_full(reference, MIXED, tokens), _full(alone, MIXED, tokens))
    assert (_full(tuned, MIXED, tokens) - _full(reference, MIXED, tokens)).abs().max() > 0.05
    assert tuned.model is reference.model
    assert {n.split(".")[0] for n in tuned.tuned_parameters()} == {"head_delta", "model"}
    assert not any("base_layer" in name for name in tuned.tuned_parameters())


def test_one_batch_of_both_equals_two(pair):
    tuned, reference, _ = pair
    tokens = _tokens(tuned)
    inputs = torch.cat([tuned.start(4), tokens[:, :-1]], 1)
    prompts = tuned.encode_prompts(MIXED)
    policies = (tuned, reference)
    full = [_full(policy, MIXED, tokens) for policy in policies]
    caches = [policy.prefill(prompts).repeat(2) for policy in policies]
    for t in range(3):
        logits = tuned.extend_together(policies, inputs[:, t : t + 1], caches)
        for got, expected in zip(logits, full, strict=True):
            _same(got, expected[:, t])
    rows = torch.tensor([2, 0, 1])
    for cache in caches:
        cache.select(rows)
    logits = tuned.extend_together(policies, inputs[rows, 3:], caches)
    for got, expected in zip(logits, full, strict=True):
        _same(got, expected[rows, 5])


def test_guided_rollout_has_exact_ends(pair, grammar):
    tuned, reference, _ = pair
    sample = {"num_per_prompt": 3, "seed": 4}
    ends = [
        rollout(tuned, grammar, MIXED, reference=reference, guidance=w, **sample) for w in (0.0, 2)
    ]
    assert ends[0].tokens == rollout(reference, grammar, MIXED, **sample).tokens
    assert ends[1].tokens != ends[0].tokens


def test_weight_space_guidance(pair, policy):
    tuned, reference, _ = pair
    tokens = _tokens(tuned)
    ends = [_full(loading.extrapolated(tuned, reference, w), MIXED, tokens) for w in (0.0, 1.0)]
    assert torch.equal(ends[0], _full(reference, MIXED, tokens))
    assert torch.equal(ends[1], _full(tuned, MIXED, tokens))
    doubled = _full(loading.extrapolated(tuned, reference, 2.0), MIXED, tokens)
    with torch.no_grad():
        for name, weight in tuned.tuned_parameters().items():
            if "lora_A" not in name:
                weight *= 2
    _same(doubled, _full(tuned, MIXED, tokens))

    moved = loading.extrapolated(policy, policy, 1.0)
    _disturb(moved.tuned_parameters())
    past = loading.extrapolated(moved, policy, 3.0).state_dict()
    for name, before in policy.state_dict().items():
        after = moved.state_dict()[name]
        _same(past[name], before + 3 * (after - before))
        for weight, end in ((0.0, before), (1.0, after)):
            exact = loading.extrapolated(moved, policy, weight).state_dict()[name]
            assert torch.equal(exact, end)


def test_adapter_is_saved_bound_to_its_designer(pair, build, tmp_path):
    tuned, _, designer = pair
    tokens = _tokens(tuned)
    tuned.save_adapter(tmp_path / "adapter", designer)
    again, reference = loading.load_pair(designer, tmp_path / "adapter")
    assert torch.equal(_full(again, MIXED, tokens), _full(tuned, MIXED, tokens))
    assert (_full(reference, MIXED, tokens) - _full(tuned, MIXED, tokens)).abs().max() > 0.05

    tuned.save(tmp_path / "merged")
    _same(
        _full(loading.load_policy(tmp_path / "merged"), MIXED, tokens), _full(tuned, MIXED, tokens)
    )
    with pytest.raises(ValueError, match="expected one of"):
        loading.load_pair(tmp_path / "merged", tmp_path / "adapter")


def test_peft_and_transformers_read_what_is_saved(pair, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tuned, _, designer = pair
    tuned.save_adapter(tmp_path / "adapter", designer)
    ids = torch.tensor([AutoTokenizer.from_pretrained(designer)("a red circle")["input_ids"]])
    with torch.no_grad():
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(designer, dtype=torch.float32),
            tmp_path / "adapter",
        )
        _same(model(ids).logits, tuned.model(ids).logits)
    record = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert str(tmp_path) not in record


def test_recomputed_activations_give_the_same_gradients(build, grammar):
    gradients = []
    for recompute in (False, True):
        policy = build(gradient_checkpointing=recompute)
        _disturb(policy.trainable_parameters(), 0.05)
        policy.train()
        sequences = rollout(policy, grammar, MIXED, 3, seed=1).sequences
        loss = -choice_logprobs(policy, policy.encode_prompts(MIXED), sequences)[1].mean()
        loss.backward()
        gradients.append({n: w.grad for n, w in policy.trainable_parameters().items()})
    for name, gradient in gradients[0].items():
        _same(gradients[1][name], gradient)


def test_a_new_file_starts_between_its_heirs_and_its_card(build, catalogue, grammar):
    policy = build()
    _disturb({n: w for n, w in policy.trainable_parameters().items() if "lora" not in n})
    old = catalogue.files[0]
    new = ModelFile(old.folder, "new.safetensors", "0" * 64, old.family, old.role, card="a circle")
    wider = catalogue.with_files([new])
    vocabulary = grammar.vocabulary.extend(wider)
    token = vocabulary.file_ids[new.folder, new.name, new.sha256]
    heirs = [vocabulary.file_ids[f.folder, f.name, f.sha256] for f in catalogue.files[:2]]
    grown = loading.extended(policy, {token: heirs}, vocabulary, wider)

    table = policy.model.get_input_embeddings().weight
    texts = [grown.descriptions[token], *(policy.descriptions[heir] for heir in heirs)]
    assert "a circle" in texts[0]
    ids = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    d_new, d_one, d_two = (table[row].mean(0) for row in ids)
    one, two = (policy.embedding.weight[heir] for heir in heirs)
    expected = d_new + ((one - d_one) + (two - d_two)) / 2
    _same(grown.embedding.weight[token], expected, 1e-5)
    others = [t for t in range(policy.num_tokens) if t != token]
    assert torch.equal(grown.head[others], policy.head[others])
    assert grown.model is policy.model

    plain = policy.extended({token: heirs})
    _same(plain.head[token], policy.head[heirs].mean(0), 1e-6)


def test_bfloat16_weights_keep_float32_adapters(build, grammar):
    policy = build(dtype="bfloat16")
    assert policy.model.dtype == torch.bfloat16
    assert {weight.dtype for weight in policy.trainable_parameters().values()} == {torch.float32}
    sampled = rollout(policy, grammar, MIXED, 2, seed=2)
    _, logprobs_N = choice_logprobs(policy, policy.encode_prompts(MIXED), sampled.sequences)
    _same(logprobs_N.detach(), sampled.logprobs_BT[sampled.sequences.choice_BT], 0.05)


def test_dropout_works_in_training_alone(build):
    policy = build(lora=LoRAConfig(rank=4, dropout=0.5))
    _disturb(policy.trainable_parameters())
    tokens = _tokens(policy)
    assert torch.equal(_full(policy, MIXED, tokens), _full(policy, MIXED, tokens))
    policy.train()
    assert not torch.equal(_full(policy, MIXED, tokens), _full(policy, MIXED, tokens))


def test_configurations_choose_the_policy(models):
    asked = {"name_or_path": "x", "lora": {"rank": 2}, "num_workflow_tokens": 48}
    config = override(SFTConfig(), {"policy": asked})
    assert config.policy == LanguageModelConfig(
        name_or_path="x", lora=LoRAConfig(rank=2), num_workflow_tokens=48
    )
    assert override(config, {"policy": to_dict(TINY)}).policy == TINY
    assert override(SFTConfig(), json.loads(json.dumps(to_dict(config)))) == config
    assert isinstance(SFTConfig().policy, PolicyConfig)


def test_what_is_wrong_is_said(models, build):
    with pytest.raises(ValueError, match=r"nothing: expected a causal language model"):
        build("nothing")
    with pytest.raises(ValueError, match=r"prompt_template: got 'x', expected \{prompt\} once"):
        LanguageModelConfig(prompt_template="x")
    with pytest.raises(ValueError, match=r"rank: got 0, expected >= 1"):
        dataclasses.replace(LoRAConfig(), rank=0)
    with pytest.raises(ValueError, match=r"not found in the base model"):
        build(lora=LoRAConfig(target_modules=("absent",)))


class LongIsGood:
    """Reward: a twentieth per token."""

    def reward(self, prompts, tokens):
        return np.array([len(row) / 20 for row in tokens])

    def predict(self, prompts, tokens):
        return self.reward(prompts, tokens), np.zeros(len(tokens))


class KilledError(Exception):
    pass


def _run(stage, folder, train, **inputs):
    run = Run(stage, folder)
    run.work.mkdir(parents=True, exist_ok=True)
    run.begin()
    return run.finish(train(run=run, **inputs)).digest


def _killed_run(monkeypatch, stage, folder, train, after, **inputs):
    """The digest of a run that was killed once, at its step `after`."""

    def metric(self, step, values):
        if step == after:
            raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(Run, "metric", metric)
        with pytest.raises(KilledError):
            _run(stage, folder, train, **inputs)
    return _run(stage, folder, train, **inputs)


def test_the_loops_train_it(models, inputs, tmp_path, monkeypatch):
    supervised = SFTConfig(
        policy=config_of(models), prior_steps=4, best_steps=2, batch_size=8, lr=1e-2,
        warmup_steps=1, num_samples=4, num_held_out=4, num_processes=1, checkpoint_every=2,
    )  # fmt: skip
    train = {"config": supervised, **inputs}
    digest = _run("train_sft", tmp_path / "sft", sft.train_sft, **train)
    again = _killed_run(monkeypatch, "train_sft", tmp_path / "again", sft.train_sft, 3, **train)
    assert again == digest

    monkeypatch.setattr(grpo.Ensemble, "load", lambda folder: LongIsGood())
    config = GRPOConfig(
        num_steps=3, prompts_per_step=4, num_minibatches=2, num_proposals=None, checkpoint_every=1
    )
    tune = {
        "config": config, "catalogue": inputs["catalogue"], "triplets": inputs["triplets"],
        "designer": tmp_path / "sft" / "out", "reward": tmp_path,
    }  # fmt: skip
    digest = _run("train_grpo", tmp_path / "grpo", grpo.train_grpo, **tune)
    again = _killed_run(monkeypatch, "train_grpo", tmp_path / "half", grpo.train_grpo, 1, **tune)
    assert again == digest

    tuned, reference = loading.load_pair(tmp_path / "sft" / "out", tmp_path / "grpo" / "out")
    tokens = _tokens(tuned)
    moved = _full(tuned, MIXED, tokens) - _full(reference, MIXED, tokens)
    assert moved.abs().max() > 1e-3


def test_recipes_have_the_sizes_they_name():
    sizes = {name: resolve(name) for name in ("qwen3_0_6b", "llama_3_1_8b", "paper")}
    for name, recipe in sizes.items():
        assert name.split("_")[0].title() in recipe.train_sft.policy.name_or_path or name == "paper"
    paper = sizes["paper"]
    cells = paper.build_triplets.random_cells + paper.build_triplets.wild_cells
    assert paper.build_pairs.num_pairs == 500_000
    assert paper.build_triplets.prompts.num_train * cells == 100_000
    assert paper.build_pairs.prompts == paper.build_triplets.prompts
