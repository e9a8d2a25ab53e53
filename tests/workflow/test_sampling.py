"""Facts: random workflows are valid, sane, and a function of the seed alone; the first of many do
not depend on how many; weights shift what is drawn and never what is legal; what a seed draws in
the embedded world does not change from one version to the next."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter

import numpy as np
import pytest

from flowloom.workflow import Encoded, Grammar, decode, encode, random_workflows, validate
from flowloom.workflow.weighing import Weigher
from flowloom.workflow.weights import embedded_weights
from tests.workflow.flows import SMALL, split_catalogue


@pytest.fixture(scope="module")
def drawn(grammar) -> list[Encoded]:
    return random_workflows(grammar, 2560, 7)


def test_all_are_valid_and_come_back(drawn, grammar, embedded):
    unique = {tuple(code.tokens): code for code in drawn}
    assert len(unique) > 1500
    for code in unique.values():
        workflow = decode(code.tokens, grammar, code.texts, code.seeds)
        assert {p.type for p in validate(workflow, embedded)} <= {"wasted_pass"}
        again = encode(workflow, grammar)
        assert again == code
    assert grammar.accept_all(list(unique)).all()


def test_they_are_sane(drawn, grammar):
    lengths = np.array([len(code.tokens) for code in drawn])
    assert 18 <= np.median(lengths) <= 30
    assert lengths.max() <= grammar.budget
    uses, second, texts, varied = Counter(), 0, Counter(), 0
    for code in drawn:
        nodes = decode(code.tokens, grammar).nodes
        classes = Counter(node.class_type for node in nodes.values())
        uses.update(classes.keys())
        second += classes["KSampler"] == 2
        samplers = {node.inputs.get("sampler_name", "euler") for node in nodes.values()}
        varied += not (classes.keys() <= set(SMALL) and samplers <= {"euler", "heun"})
        for node in nodes.values():
            if node.class_type != "KSampler":
                continue
            positive = nodes[node.inputs["positive"].node]
            texts[positive.inputs.get("text")] += 1
            latent = nodes[node.inputs["latent_image"].node].class_type
            if latent == "EmptyLatentImage":
                texts["full noise"] += node.inputs["denoise"] == 1.0
                texts["first pass"] += 1
    share = {name: count / len(drawn) for name, count in uses.items()}
    assert share["KSampler"] > 0.95
    assert share["SaveImage"] > 0.999
    assert 0.15 < varied / len(drawn) < 0.3
    assert 0.2 < share["LoraLoader"] < 0.35
    assert share["ImageSharpen"] < 0.12
    assert 0.04 < second / len(drawn) < 0.12
    assert texts["{prompt}"] > 0.99 * (texts["{prompt}"] + texts["{negative}"])
    assert texts["full noise"] > 0.99 * texts["first pass"]


def test_a_function_of_the_seed(grammar, drawn):
    assert random_workflows(grammar, 300, 7) == drawn[:300]
    assert random_workflows(grammar, 300, 8) != drawn[:300]
    assert random_workflows(grammar, 0, 7) == []


def test_a_seed_draws_the_same_in_every_version(grammar, drawn):
    """Triplets and results of the embedded world are made from these; ids of tokens may change."""
    prints = [decode(code.tokens, grammar).fingerprint() for code in drawn[:64]]
    digest = hashlib.sha256("".join(prints).encode()).hexdigest()
    assert digest == "50d7d7c4a33e23ab035c5fdd8ad0f261456fa63361402f6f2e1a9fa97cf1a277"


def test_weights_shift_the_share(grammar):
    """Three named checkpoints weigh 1, 2 and 5 of a total of 8 when the others weigh nothing."""
    weights = copy.deepcopy(embedded_weights())
    names = [f.name for f in grammar.catalogue.files_in("checkpoints")]
    shares = dict(zip(names, [1.0, 2.0, 5.0], strict=False))
    weights["fields"]["CheckpointLoaderSimple.ckpt_name"] = {
        f"checkpoints/{name}": shares.get(name, 0.0) for name in names
    }
    codes = random_workflows(grammar, 5120, 1, weights)
    first = Counter(
        next(
            token.value
            for token in map(grammar.vocabulary.tokens.__getitem__, c.tokens)
            if token.kind == "checkpoints"
        )
        for c in codes
    )
    assert set(first) == set(names[:3])
    for name, weight in shares.items():
        error = np.sqrt(weight / 8 * (1 - weight / 8) / len(codes))
        assert abs(first[name] / len(codes) - weight / 8) < 4 * error


def test_an_unknown_token_is_refused(grammar):
    weights = copy.deepcopy(embedded_weights())
    weights["fields"]["KSampler.steps"] = {"steps=9": 2.0}
    with pytest.raises(ValueError, match=r"weights of KSampler\.steps: .* no token 'steps=9'"):
        random_workflows(grammar, 1, 0, weights)


def test_weights_are_positive_where_legal(grammar):
    weigher, rng, state = Weigher(grammar), np.random.default_rng(0), grammar.start(64)
    rows = weigher.rows(64)
    while not state.done.all():
        mask, live = state.mask(), ~state.done
        weights, columns = weigher(state, rows)
        positive = np.zeros(mask.shape, bool)
        np.logical_or.at(positive, (np.arange(64)[:, None], columns), weights > 0)
        assert (positive == mask)[live].all()
        tokens = np.where(mask, rng.random(mask.shape), -1).argmax(1)
        state.advance(tokens)
        weigher.take(rows, tokens)


def test_another_catalogue():
    grammar = Grammar(split_catalogue(), budget=48)
    codes = random_workflows(grammar, 600, 0)
    families = Counter()
    for code in codes:
        workflow = decode(code.tokens, grammar)
        assert validate(workflow, grammar.catalogue) == []
        families["UNETLoader" in {n.class_type for n in workflow.nodes.values()}] += 1
    assert min(families.values()) > 100
