"""Pins: P(yes) of a tiny random Qwen2.5-VL equals what its logits give by hand, over the answers or
over all tokens, whatever the batch; questions and answers are configurable; answers that begin
alike are refused."""

import dataclasses

import numpy as np
import pytest
import torch

from flowloom.score.build import build_rubric
from flowloom.score.config import RubricConfig, TermConfig, VLMConfig
from tests.score.tiny import pictures, write_qwen

TOLERANCE = 1e-5
PROMPTS = ["a cat", "three large red dogs", "x"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = write_qwen(tmp_path_factory.mktemp("qwen"))
    return VLMConfig(model=folder, dtype="float32", question='Is it "{prompt}"?')


def raw(config, prompts=PROMPTS):
    terms = (TermConfig(scorer=config, weight=0.1, name="yes"),)
    rubric = build_rubric(RubricConfig(terms=terms))
    rows = rubric.score(prompts, pictures(len(prompts)))
    rubric.close()
    assert [row["score"] for row in rows] == pytest.approx([0.1 * row["yes"] for row in rows])
    return np.array([row["yes"] for row in rows])


@pytest.fixture(scope="module")
def logits(config):
    """Of the first answer token `[prompt, vocabulary]`, one picture at a time; and the tokenizer.

    The place of the picture in the text is widened by hand: one token per 2 x 2 patches.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    processor = AutoImageProcessor.from_pretrained(config.model, backend="pil")
    rows = []
    for prompt, image in zip(PROMPTS, pictures(len(PROMPTS)), strict=True):
        bytes_CHW = np.rint((image + 1) * 127.5).astype(np.uint8)
        seen = processor(images=[bytes_CHW], return_tensors="pt")
        places = "<|image_pad|>" * (int(seen["image_grid_thw"].prod()) // 4)
        ids = tokenizer(
            f'<|im_start|>user\n<|vision_start|>{places}<|vision_end|>Is it "{prompt}"?<|im_end|>\n'
            "<|im_start|>assistant\n",
            return_tensors="pt",
        ).input_ids
        kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        with torch.no_grad():
            found = model(input_ids=ids, mm_token_type_ids=kinds, **seen)
        rows.append(found.logits[0, -1].numpy())
    return np.stack(rows), tokenizer


def test_p_yes_by_hand(config, logits):
    logits_PV, tokenizer = logits
    p_PV = np.exp(logits_PV) / np.exp(logits_PV).sum(1, keepdims=True)
    yes = p_PV[:, tokenizer.convert_tokens_to_ids(["Yes", "yes"])].sum(1)
    no = p_PV[:, tokenizer.convert_tokens_to_ids(["No", "no"])].sum(1)
    assert np.ptp(yes / (yes + no)) > 0.01
    np.testing.assert_allclose(raw(config), yes / (yes + no), atol=TOLERANCE)
    whole = dataclasses.replace(config, over="vocabulary")
    np.testing.assert_allclose(raw(whole), yes, atol=TOLERANCE)
    # A word that is no token counts by its first one, once.
    other = dataclasses.replace(config, yes=("Yes", "Yessir"), no=("A",))
    yes, no = (p_PV[:, tokenizer.convert_tokens_to_ids(word)] for word in ("Yes", "A"))
    np.testing.assert_allclose(raw(other), yes / (yes + no), atol=TOLERANCE)


def test_no_batch_size_matters(config):
    whole = raw(config)
    for size in (1, 2):
        smaller = raw(dataclasses.replace(config, batch_size=size))
        np.testing.assert_allclose(smaller, whole, atol=TOLERANCE)


def test_the_question_matters(config):
    asked = raw(dataclasses.replace(config, question="{prompt}, yes or no?"))
    assert np.abs(asked - raw(config)).max() > 1e-4


def test_answers_that_begin_alike_are_refused(config):
    with pytest.raises(ValueError, match="both begin with the token 'No', expected different"):
        raw(dataclasses.replace(config, yes=("Yes", "Now"), no=("No",)))
    with pytest.raises(ValueError, match="nobody/nothing: expected a processor of pictures"):
        raw(dataclasses.replace(config, model="nobody/nothing"))
