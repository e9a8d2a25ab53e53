"""Facts: designs of a prompt differ by fingerprint and come best first; every policy gives valid
designs; constraints hold; the same seed gives the same designs; of N candidates the best n are
kept; no design is beyond the budget; a spread above the limit is unfamiliar; a folder of SFT alone
designs without scores, likeliest first; retrieval finds the prompt with the rare word."""

import dataclasses

import numpy as np
import pytest
import torch

from flowloom.designer import candidates as module
from flowloom.designer.baselines import prompt_similarity
from flowloom.designer.design import Budget, Designer
from flowloom.designer.extension import file_heirs
from flowloom.designer.policy import Policy
from flowloom.render.model_records import save_catalogue
from flowloom.runs import write_json
from flowloom.workflow import decode, random_workflows, validate
from tests.designer.tiny import PROMPTS, files_of


class ScriptedEnsemble:
    """Longer designs score better; a single render lies within 0.1; odd ones are familiar."""

    def unfamiliar(self, prompts, tokens):
        return np.array([len(row) % 2 == 0 for row in tokens])

    def score_and_interval(self, prompts, tokens):
        assert len(prompts) == len(tokens)
        score = np.array([len(row) / 100 for row in tokens])
        return score, score - 0.1, score + 0.1

    def extended(self, catalogue, vocabulary):
        return self


@pytest.fixture
def designer(policy, grammar, catalogue):
    reference = Policy(policy.config, policy.tokenizer, policy.num_tokens, seed=9)
    templates = [decode(e.tokens, grammar).to_api() for e in random_workflows(grammar, 6, 3)]
    policies = {
        "best_fixed": templates[0],
        "retrieval": {"prompts": list(PROMPTS), "workflows": templates[:4]},
    }
    return Designer(catalogue, grammar.vocabulary, policy, reference, ScriptedEnsemble(), policies)


@pytest.mark.parametrize("name", ["grpo", "sft", "random", "retrieval", "best_fixed"])
def test_policies(designer, grammar, catalogue, name):
    found = designer.design(PROMPTS[:3], n=3, policy=name, seed=1)
    assert len(found) == 3
    for designs in found:
        assert len(designs) == (1 if name == "best_fixed" else 3)
        assert len({d.fingerprint for d in designs}) == len(designs)
        assert [d.score for d in designs] == sorted((d.score for d in designs), reverse=True)
        for d in designs:
            assert d.workflow.template_fingerprint() == d.fingerprint
            assert decode(d.tokens, grammar).template_fingerprint() == d.fingerprint
            assert d.interval == pytest.approx((d.score - 0.1, d.score + 0.1))
            assert d.unfamiliar == (len(d.tokens) % 2 == 0)
            assert (d.logprob is not None) == (name in ("grpo", "sft"))
            problems = validate(d.workflow, catalogue)
            assert not [p for p in problems if p.severity == "error"]
    again = designer.design(PROMPTS[:3], n=3, policy=name, seed=1)
    assert again == found


def test_seed_and_guidance_matter(designer):
    def tokens(**how):
        return [d.tokens for row in designer.design(PROMPTS, n=2, **how) for d in row]

    assert tokens(seed=0) != tokens(seed=1)
    assert tokens(guidance=0.0) == tokens(policy="sft")
    assert tokens(guidance=3.0) != tokens(guidance=1.0)


def test_constraints_hold(designer, grammar):
    how = {"require": ("KSampler.steps=8",), "forbid": ("shapes-base.safetensors", "ImageSharpen")}
    for policy in ("grpo", "random"):
        for designs in designer.design(PROMPTS, n=4, policy=policy, **how):
            for d in designs:
                nodes = d.workflow.nodes.values()
                assert all(n.inputs["steps"] == 8 for n in nodes if n.class_type == "KSampler")
                assert all(n.class_type != "ImageSharpen" for n in nodes)
                assert "shapes-base.safetensors" not in files_of(d.tokens, grammar)
    fixed = designer.policies["best_fixed"]
    file = next(n["inputs"]["ckpt_name"] for n in fixed.values() if "ckpt_name" in n["inputs"])
    with pytest.raises(ValueError, match="no stored workflow satisfies"):
        designer.design(PROMPTS, policy="best_fixed", forbid=(file,))


def test_a_new_file_is_used_at_once(designer, catalogue):
    old = catalogue.files_in("checkpoints")
    new = dataclasses.replace(old[0], name="shapes-new.safetensors", sha256="f" * 64)
    more = catalogue.with_files([new])
    extended = designer.extended(more)
    (heir,) = file_heirs(designer.vocabulary, extended.vocabulary)
    like = [designer.vocabulary.file_ids[f.folder, f.name, f.sha256] for f in old]
    weight = designer.tuned.head.weight
    assert torch.allclose(extended.tuned.head.weight[heir], weight[like].mean(0))
    first = designer.tuned.num_words
    rows = designer.tuned.embedding.weight[[first + k for k in like]]
    assert torch.allclose(extended.tuned.embedding.weight[first + heir], rows.mean(0))
    assert not torch.allclose(weight[heir], weight[like].mean(0))  # the old one is left alone

    with_new = designer.design(PROMPTS[:1], n=2, catalogue=more, require=(f"ckpt_name={new.name}",))
    files = [n.inputs.get("ckpt_name") for d in with_new[0] for n in d.workflow.nodes.values()]
    assert set(files) - {None} == {new.name}


def test_what_has_no_more_gives_fewer(designer, monkeypatch):
    row = designer.design(PROMPTS[:1], n=1)[0][0].tokens
    monkeypatch.setattr(module.Drawer, "__call__", lambda *args: [(row, -1.0)] * 4)
    (designs,) = designer.design(PROMPTS[:1], n=4)
    assert len(designs) == 1


def test_of_many_candidates_the_best_are_kept(designer):
    (plain,) = designer.design(PROMPTS[:1], n=12)
    (best,) = designer.design(PROMPTS[:1], n=3, candidates=12)
    assert best == plain[:3]
    assert plain[2].score > plain[11].score


def test_no_design_is_beyond_the_budget(designer):
    asked = []

    def seconds_of(workflow):
        asked.append(workflow)
        return float(len(workflow.nodes))

    for policy in ("grpo", "random"):
        free = designer.design(PROMPTS, n=4, policy=policy)
        assert {d.seconds for row in free for d in row} == {None}
        sizes = [[len(d.workflow.nodes) for d in row] for row in free]
        limit = max(map(min, sizes))
        assert limit < max(map(max, sizes))
        budget = Budget(float(limit), seconds_of)
        for row in designer.design(PROMPTS, n=4, policy=policy, budget=budget):
            assert row
            assert all(d.seconds == len(d.workflow.nodes) <= limit for d in row)
    assert not any("{prompt}" in str(workflow.to_api()) for workflow in asked)
    for policy in ("grpo", "retrieval", "best_fixed"):
        with pytest.raises(ValueError, match=r"budget_seconds: got 1, expected at least \d"):
            designer.design(PROMPTS, policy=policy, budget=Budget(1.0, seconds_of))


def test_top_p_and_temperature_matter(designer):
    def tokens(**how):
        return [d.tokens for row in designer.design(PROMPTS, n=2, **how) for d in row]

    assert tokens(top_p=1.0) == tokens()
    assert tokens(top_p=0.3) != tokens()
    assert tokens(temperature=0.1) != tokens()


def test_sft_alone_designs_without_scores(policy, grammar, catalogue, tmp_path):
    policy.save(tmp_path)
    write_json(tmp_path / "vocabulary.json", grammar.vocabulary.to_json())
    with pytest.raises(ValueError, match=r"got no catalogue.json.gz in .*, expected one, or a cat"):
        Designer.load(tmp_path)
    given = Designer.load(tmp_path, catalogue)
    save_catalogue(tmp_path / "catalogue.json.gz", catalogue)
    designer = Designer.load(tmp_path)
    assert designer.policy_names == ("sft", "random")
    found = designer.design(PROMPTS, n=3, policy="sft")
    assert found == given.design(PROMPTS, n=3, policy="sft")
    for row in found:
        assert {(d.score, d.interval, d.unfamiliar) for d in row} == {(None, None, False)}
        assert [d.logprob for d in row] == sorted((d.logprob for d in row), reverse=True)
    (three,) = designer.design(PROMPTS[:1], n=3, policy="random")
    assert len(three) == 3
    with pytest.raises(ValueError, match="got 'grpo', expected one of sft, random"):
        designer.design(PROMPTS)
    with pytest.raises(ValueError, match="without a reward ensemble"):
        _ = designer.ensemble


def test_sft_alone_learns_of_files_from_the_catalogue_given(policy, grammar, catalogue, tmp_path):
    policy.save(tmp_path)
    write_json(tmp_path / "vocabulary.json", grammar.vocabulary.to_json())
    old = catalogue.files_in("checkpoints")[0]
    more = catalogue.with_files([dataclasses.replace(old, name="new.safetensors", sha256="f" * 64)])
    designer = Designer.load(tmp_path, more)
    (row,) = designer.design(PROMPTS[:1], policy="sft", n=2, require=("ckpt_name=new.safetensors",))
    assert row
    assert designer.tuned is designer.reference


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"n": 0}, "n: got 0, expected an integer >= 1"),
        ({"n": 3, "candidates": 2}, "candidates: got 2, expected an integer >= n = 3"),
        ({"guidance": float("nan")}, "guidance: got nan, expected a finite number >= 0"),
        ({"guidance": -1.0}, "guidance: got -1.0"),
        ({"temperature": 0.0}, "temperature: got 0.0, expected a finite number > 0"),
        ({"top_p": 0.0}, r"top_p: got 0.0, expected a number in \(0, 1\]"),
        ({"require": ["stepz=8"]}, "require: got 'stepz=8' with no such input, did you mean steps"),
        ({"forbid": ["ImageSharpn"]}, "forbid: got 'ImageSharpn', .* did you mean ImageSharpen?"),
        ({"forbid": ["SaveImage"]}, r"restriction .*\(require nothing, forbid SaveImage\)"),
    ],
)
def test_what_is_asked_wrongly_is_named(designer, how, said):
    with pytest.raises(ValueError, match=said):
        designer.design(PROMPTS, **how)
    with pytest.raises(ValueError, match="budget_seconds: got nan"):
        Budget(float("nan"), len)


def test_unknown_policy(designer):
    with pytest.raises(ValueError, match="policy: got 'best', expected one of grpo, sft"):
        designer.design(PROMPTS, policy="best")


def test_similarity_prefers_rare_words():
    known = [f"please draw a photo of a {n}" for n in ("circle", "square", "wedge")] + ["a star"]
    similarity = prompt_similarity(known)
    for text, best in (("please draw a photo of a star", 3), (known[1], 1)):
        scores = similarity(text)
        assert max(range(4), key=scores.__getitem__) == best


def test_load_names_what_is_missing(tmp_path):
    write_json(tmp_path / "policies.json", {})
    with pytest.raises(ValueError, match="model: got no model in"):
        Designer.load(tmp_path)
