"""Facts: whatever the mask allows ends within the budget as a workflow without problems, in two
families and at any budget; a tiny catalogue is generated exactly; a restriction only narrows; state
and codec agree on what each token fills."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowloom.workflow import (
    Catalogue,
    Grammar,
    GrammarError,
    Link,
    ModelFile,
    Workflow,
    decode,
    encode,
    is_valid,
    validate,
)
from flowloom.workflow import vocabulary as voc
from tests.workflow.flows import SMALL, every_code, plain, split_catalogue, two_pass

CHEAPEST = 9  # preview of an empty latent: 4 classes, 3 sizes, 1 file, <eos>


def uniform(grammar, count, seed):
    """Token rows [count] drawn uniformly from the mask, every mask checked to be non-empty."""
    rng = np.random.default_rng(seed)
    state, rows = grammar.start(count), []
    while not state.done.all():
        mask = state.mask()
        assert mask.any(1).all()
        tokens = np.where(mask, rng.random(mask.shape), -1).argmax(1)
        state.advance(tokens)
        rows.append(tokens)
    assert (state.used <= grammar.budget).all()
    assert len(rows) == state.used.max()
    return [row[: row.index(voc.EOS) + 1] for row in np.array(rows).T.tolist()]


@pytest.fixture(scope="module")
def split():
    return Grammar(split_catalogue(), budget=56)


@pytest.mark.parametrize("budget", [CHEAPEST, 11, 14, 18, 21, 24, 31, 40, 64, 100])
def test_any_budget_ends_valid(embedded, vocabulary, budget):
    grammar = Grammar(embedded, vocabulary, budget)
    for tokens in set(map(tuple, uniform(grammar, 512, budget))):
        workflow = decode(tokens, grammar)
        # Near the budget good taste in sampling passes gives way.
        assert {p.type for p in validate(workflow, embedded)} <= {"wasted_pass"}
        assert encode(workflow, grammar).tokens == list(tokens)


@pytest.mark.parametrize("budget", range(10, 56, 5))
def test_families_do_not_mix_and_do_not_dead_end(split, budget):
    """One family costs 2 tokens for its model, the other 3 + 3 + 3 for its three files."""
    grammar = Grammar(split.catalogue, split.vocabulary, budget)
    families = set()
    for tokens in set(map(tuple, uniform(grammar, 512, budget))):
        workflow = decode(tokens, grammar)
        assert validate(workflow, grammar.catalogue) == []
        families.add("UNETLoader" in {n.class_type for n in workflow.nodes.values()})
    assert families == {True, False} or budget < 30


def test_a_class_of_the_dearer_family_needs_its_room(split):
    """A LoRA, which only family three has, is legal only where all else of that family fits too.

    What is there by then need not be written twice: the negative text may be the positive one.
    """
    seen = {}
    for budget in range(26, 44):
        grammar = Grammar(split.catalogue, split.vocabulary, budget)
        ids = grammar.vocabulary.class_ids
        state = grammar.run([ids[c] for c in ("SaveImage", "VAEDecode", "KSampler")])
        seen[budget] = bool(state.mask()[0, ids["LoraLoader"]])
    # SaveImage VAEDecode KSampler LoraLoader | UNETLoader file dtype | CLIPLoader file <none> |
    # lora 2 strengths | 4 values | encode text <ref> | <ref> | latent 4 | denoise | VAELoader file
    # <none> | prefix <eos>: 4 + 3 + 3 + 3 + 4 + 3 + 1 + 4 + 1 + 3 + 2.
    assert min(b for b, legal in seen.items() if legal) == 31
    assert all(seen[b] for b in range(31, 44))


def tiny(**caps):
    """The embedded classes that a plain flow needs, one value for everything."""
    base = Catalogue.load("embedded")
    wanted = ("CheckpointLoaderSimple", "CLIPTextEncode", "EmptyLatentImage", "KSampler")
    names = (*wanted, "VAEDecode", "SaveImage")
    catalogue = dataclasses.replace(base, files=base.files_in("checkpoints")[:1])
    require = {
        "steps": 8, "cfg": 2.5, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0,
        "width": 32, "height": 32,
    }  # fmt: skip
    return Grammar(catalogue, budget=100, classes=names, require=require, caps=caps)


def test_a_tiny_catalogue_is_generated_exactly():
    """By hand: decode the empty latent, or sample it. A sampler's positive is one of 2 texts; its
    negative is one of 2 texts or the positive again; all else has one way to be. 1 + 2 * 3.
    """
    grammar = tiny(KSampler=1)
    found = every_code(grammar)
    assert len(found) == 1 + 2 * 3
    graphs = [decode(tokens, grammar) for tokens in found]
    assert len({graph.fingerprint() for graph in graphs}) == 7
    assert all(validate(graph, grammar.catalogue) == [] for graph in graphs)


def test_two_samplers_are_generated_exactly():
    """Two samplers, counted by the loop below.

    Each text of a sampler is new (2 ways, times the CLIPs there are) or one of those before it, up
    to 4 encodings in all; the second model is the first one, or new and brings a CLIP and a VAE.
    """

    def sampler(encodings, clips, deeper):
        """Ways to write positive, negative and latent, given what is finished."""
        total = 0
        for new_positive in (True, False):
            ways = (2 * clips if encodings < 4 else 0) if new_positive else encodings
            after = encodings + new_positive
            for new_negative in (True, False):
                more = (2 * clips if after < 4 else 0) if new_negative else after
                total += ways * more * deeper(after + new_negative, clips)
        return total

    def leaf(encodings, clips):
        return 1

    def with_vae():
        """Flows where a second loader was added have 2 VAEs to choose from at the end."""
        one = sampler(0, 1, lambda e, c: 1 + sampler(e, c, leaf))  # empty latent, or same model
        two = sampler(0, 1, lambda e, c: sampler(e, c + 1, leaf))
        return one + 2 * two

    grammar = tiny(KSampler=2, CLIPTextEncode=4, CheckpointLoaderSimple=2)
    found = every_code(grammar)
    assert len(found) == 1 + with_vae()
    assert len(set(map(tuple, found))) == len(found)


def test_caps(embedded, vocabulary):
    grammar = Grammar(embedded, vocabulary, classes=SMALL)
    limits = {"CheckpointLoaderSimple": 2, "LoraLoader": 2, "KSampler": 2, "LatentUpscaleBy": 1}
    most = dict.fromkeys([*limits, "pixel"], 0)
    for tokens in uniform(grammar, 1500, 3):
        classes = [n.class_type for n in decode(tokens, grammar).nodes.values()]
        for name in limits:
            most[name] = max(most[name], classes.count(name))
        pixel = sum(c in ("ImageScaleBy", "ImageSharpen", "ImageBlur") for c in classes)
        most["pixel"] = max(most["pixel"], pixel)
        assert classes.count("SaveImage") == 1
    assert most == {**limits, "pixel": 2}


def test_pictures_stay_within_the_bound(embedded, vocabulary):
    """32 pixels doubled twice would be 128: more than 64, so the second doubling is never legal."""
    require = {"LatentUpscaleBy.scale_by": 2.0}
    grammar = Grammar(embedded, vocabulary, require=require)
    ids, names = vocabulary.class_ids, ["SaveImage", "ImageScaleBy", "VAEDecode", "LatentUpscaleBy"]
    state = grammar.run([ids[name] for name in names])
    latent = [ids["EmptyLatentImage"], *(vocabulary.value_ids[f"px={32}"],) * 2]
    loader = [ids["CheckpointLoaderSimple"], vocabulary.file_ids[_file(embedded)]]
    method = vocabulary.value_ids['method="area"']
    for token in [*latent, vocabulary.value_ids["batch=1"], method]:
        state.advance(np.array([token]))
    state.advance(np.array([vocabulary.value_ids["scale=2.0"]]))
    for token in [*loader, method]:
        state.advance(np.array([token]))
    assert np.flatnonzero(state.mask()[0]).tolist() == [vocabulary.value_ids["scale=0.5"]]
    # Below a doubling there is no room for another one.
    caps = {"LatentUpscaleBy": 5}
    grammar = Grammar(embedded, vocabulary, require=require, caps=caps)
    state = grammar.run([ids[name] for name in ("SaveImage", "VAEDecode", "LatentUpscaleBy")])
    assert not state.mask()[0, ids["LatentUpscaleBy"]]


def _file(catalogue):
    file = catalogue.files_in("checkpoints")[0]
    return file.folder, file.name, file.sha256


def test_hand_written_flows_are_accepted(grammar):
    codes = [encode(flow, grammar).tokens for flow in (plain(), two_pass())]
    assert all(grammar.accepts(code) for code in codes)
    assert grammar.accepts([voc.BOS, *codes[0]])
    assert not grammar.accepts(codes[0][:-1])
    off_grid = encode(plain(n3_cfg=9.5), grammar).tokens
    wrong = [[*codes[0][:5], voc.EOS], [], off_grid, [*codes[1], voc.EOS], [-5], [9999]]
    assert not any(grammar.accepts(code) for code in wrong)
    assert grammar.accept_all([*codes, *wrong]).tolist() == [True] * 2 + [False] * 6
    assert grammar.accept_all([]).tolist() == []


def test_illegal_tokens_are_named(grammar):
    state = grammar.start(2)
    state.advance(np.full(2, grammar.vocabulary.class_ids["SaveImage"]))
    before = state.mask().copy()
    with pytest.raises(GrammarError, match=r"row 1, token 1, SaveImage\.images: got <eos>"):
        state.advance(np.array([grammar.vocabulary.class_ids["VAEDecode"], voc.EOS]))
    assert (state.mask() == before).all()
    assert state.used.tolist() == [1, 1]


def test_done_rows_take_only_pad(grammar):
    state = grammar.run(encode(plain(), grammar).tokens)
    assert np.flatnonzero(state.mask()[0]).tolist() == [voc.PAD]
    assert state.forced().tolist() == [-1]
    state.advance(np.array([voc.PAD]))
    assert state.used.tolist() == [23]


def test_forced_is_the_only_legal_token(grammar):
    state = grammar.start(3)
    rng = np.random.default_rng(0)
    forced = 0
    while not state.done.all():
        mask, only = state.mask(), state.forced()
        for row in range(3):
            if only[row] >= 0:
                assert mask[row].sum() == 1
                assert mask[row, only[row]]
                forced += 1
            else:
                assert mask[row].sum() > 1 or state.done[row]
        state.advance(np.where(mask, rng.random(mask.shape), -1).argmax(1))
    assert forced > 10


def test_a_forced_run_ends_at_the_next_choice(embedded, vocabulary):
    """The code begins with the only output node; rows of different runs are padded by -1."""
    grammar = Grammar(embedded, vocabulary, classes=SMALL)
    state, rng, longest = grammar.start(32), np.random.default_rng(5), 0
    assert state.forced_run().tolist() == [[state.forced()[0]]] * 32
    while not state.done.all():
        run, before = state.forced_run(), state.used.copy()
        assert (state.used == before).all()
        longest = max(longest, run.shape[1])
        follow = state.select(np.arange(32))
        for row, tokens in enumerate(run.tolist()):
            taken = [token for token in tokens if token >= 0]
            assert tokens == taken + [-1] * (len(tokens) - len(taken))
            alone = follow.select(np.array([row]))
            for token in taken:
                assert alone.forced().tolist() == [token]
                alone.advance(np.array([token]))
            assert alone.forced().tolist() == [-1]
        mask = state.mask()
        state.advance(np.where(mask, rng.random(mask.shape), -1).argmax(1))
    assert longest > 1


@pytest.mark.parametrize("world", ["embedded", "split"])
def test_holes_agree_with_annotation(grammar, split, world):
    """A class token belongs to the node it opens, by the codec; the hole to the link it fills."""
    language = grammar if world == "embedded" else split
    vocabulary = language.vocabulary
    for tokens in uniform(language, 20, 5):
        nodes, fields = language.annotate(tokens)
        state, opened = language.start(1), 0
        for at, token in enumerate(tokens):
            hole, node = (int(x[0]) for x in state.holes())
            if vocabulary.tokens[token].group == "class":
                assert (nodes[at], fields[at]) == (opened, voc.CLASS_FIELD)
                assert hole == voc.END_FIELD or language.field_type[hole] >= 0
                opened += 1
            else:
                assert (nodes[at], fields[at]) == (node, hole)
            state.advance(np.array([token]))
        assert state.done[0]


@given(st.integers(0, 10**6))
@settings(max_examples=15)
def test_rows_do_not_depend_on_each_other(grammar, seed):
    """Dropping rows in the middle changes nothing for the others."""
    rng = np.random.default_rng(seed)
    state = grammar.start(6)
    for _ in range(int(rng.integers(1, 25))):
        mask = state.mask()
        state.advance(np.where(mask, rng.random(mask.shape), -1).argmax(1))
    rows = np.flatnonzero(rng.random(6) < 0.5)
    part = state.select(rows)
    while not state.done.all():
        mask = state.mask()
        assert (part.mask() == mask[rows]).all()
        assert (part.roles() == state.roles()[rows]).all()
        tokens = np.where(mask, rng.random(mask.shape), -1).argmax(1)
        state.advance(tokens)
        part.advance(tokens[rows])
    assert (part.used == state.used[rows]).all()


def test_roles_follow_the_sampler(grammar):
    code = encode(plain(), grammar).tokens
    assert grammar.run(code[:9]).roles().tolist() == [1]  # positive
    assert grammar.run(code[:10]).roles().tolist() == [1]  # its text
    assert grammar.run(code[:13]).roles().tolist() == [2]  # the negative's text
    assert grammar.run(code[:15]).roles().tolist() == [0]  # latent


def test_a_restriction_only_narrows(grammar, embedded, vocabulary):
    narrow = Grammar(
        embedded,
        vocabulary,
        require={"steps": 8, "ckpt_name": "shapes-warm"},
        forbid=["ImageBlur", "shapes-two-objects.safetensors", "cfg=7.0", "sampler_name=heun"],
    )
    assert (narrow.static <= grammar.static).all()
    drawn = uniform(narrow, 400, 1)
    assert grammar.accept_all(drawn).all()
    for tokens in drawn:
        for node in decode(tokens, narrow).nodes.values():
            assert node.class_type != "ImageBlur"
            assert node.inputs.get("lora_name") != "shapes-two-objects.safetensors"
            assert node.inputs.get("steps", 8) == 8
            assert node.inputs.get("ckpt_name", "shapes-warm.safetensors") == (
                "shapes-warm.safetensors"
            )
            assert node.inputs.get("cfg") != 7.0
            assert node.inputs.get("sampler_name", "euler") != "heun"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 8}, "got budget 8, expected at least 9 tokens"),
        ({"require": {"steps": 7}}, "got 'steps=7' with no such value, expected one of 6, 8,"),
        ({"require": ["ckpt_name=shapes-warn"]}, "did you mean shapes-warm.safetensors?"),
        ({"require": ["stepz=8"]}, "got 'stepz=8' with no such input, did you mean step"),
        ({"require": ["steps"]}, "require: got 'steps', expected input=value$"),
        ({"forbid": ["Nothing"]}, "forbid: got 'Nothing', expected input=value or"),
        ({"forbid": ["vaedecod"]}, "did you mean VAEDecode?"),
        ({"classes": []}, "classes: none of them is available"),
        ({"forbid": ["VAEDecode"]}, "this restriction of the catalogue"),
        ({"classes": ["SaveImage", "Nope"]}, "classes: 'Nope' is not in the catalogue"),
    ],
)
def test_bad_grammars_are_named(embedded, vocabulary, options, message):
    with pytest.raises(GrammarError, match=message):
        Grammar(embedded, vocabulary, **options)


def test_without_files_there_is_no_workflow(embedded):
    with pytest.raises(GrammarError, match="this restriction"):
        Grammar(dataclasses.replace(embedded, files=()))


def test_a_new_file_is_written_through_its_reserved_row(embedded, vocabulary):
    tuned = ModelFile("checkpoints", "tuned.safetensors", "d" * 64, "shapes", "checkpoint")
    overlay = embedded.with_files([tuned])
    grammar = Grammar(overlay, vocabulary.extend(overlay))
    workflow = plain(n4_ckpt_name="tuned.safetensors")
    code = encode(workflow, grammar)
    assert voc.ESCAPE not in code.tokens
    assert vocabulary.token_text(code.tokens[4]) == "<file+0>"
    assert grammar.accepts(code.tokens)
    assert decode(code.tokens, grammar).fingerprint() == workflow.fingerprint()
    # The old vocabulary has no row for it, and still reads and writes it exactly.
    old = Grammar(overlay, vocabulary)
    spelled = encode(workflow, old)
    assert voc.ESCAPE in spelled.tokens
    assert decode(spelled.tokens, old).fingerprint() == workflow.fingerprint()


def test_several_outputs_on_request(embedded, vocabulary):
    grammar = Grammar(embedded, vocabulary, max_outputs=2)
    counts = set()
    for tokens in uniform(grammar, 256, 2):
        workflow: Workflow = decode(tokens, grammar)
        assert is_valid(workflow, embedded)
        outputs = [n for n in workflow.nodes.values() if n.class_type in embedded.output_classes]
        counts.add(len(outputs))
    assert counts == {1, 2}


def test_links_point_at_finished_nodes(grammar):
    for tokens in uniform(grammar, 50, 9):
        for node_id, node in decode(tokens, grammar).nodes.items():
            for value in node.inputs.values():
                assert type(value) is not Link or int(value.node) < int(node_id)
