"""Pins: boxes of a tiny random OWLv2 are those of transformers' own post-processing, and the score
is GenEval's judgement of them; colours are those whose descriptions CLIP finds nearest; thresholds
hold; no batch size matters; Grounding DINO's nouns are read off its sentence."""

import dataclasses

import numpy as np
import pytest
import torch

from flowloom.score.build import build_rubric
from flowloom.score.clip import read_encoder
from flowloom.score.config import AlignmentConfig, DetectorConfig, RubricConfig, TermConfig
from flowloom.score.detection import DetectorScorer, _detect
from flowloom.score.geneval import COLORS, Box, judge, parse, suppress
from flowloom.score.models import to_pil
from tests.score.tiny import pictures, write_clip, write_dino, write_owl

TOLERANCE = 1e-4
PROMPTS = [
    "a photo of a cat",
    "a cat and a dog",
    "three cats",
    "a red car",
    "a cat left of a dog",
    "a photo of a red car and a white dog",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    owl, clip = (tmp_path_factory.mktemp(name) for name in ("owl", "clip"))
    colors = AlignmentConfig(model=write_clip(clip), batch_size=3)
    return DetectorConfig(model=write_owl(owl), colors=colors, threshold=0.8, strict=False)


def raw(config, prompts=PROMPTS):
    terms = (TermConfig(scorer=config, weight=1.0),)
    rubric = build_rubric(RubricConfig(terms=terms))
    rows = rubric.score(prompts, pictures(len(prompts)))
    rubric.close()
    return np.array([row["geneval"] for row in rows])


def seen(config, prompt, image):
    """Boxes of one picture, by transformers' post-processing, before any is suppressed."""
    from transformers import AutoProcessor, Owlv2ForObjectDetection

    model = Owlv2ForObjectDetection.from_pretrained(config.model).eval()
    processor = AutoProcessor.from_pretrained(config.model)
    nouns = list(dict.fromkeys(wanted.noun for wanted in parse(prompt).wanted))
    picture = to_pil(torch.tensor(image), prompt)
    inputs = processor(
        text=[[f"a photo of a {noun}" for noun in nouns]], images=[picture], return_tensors="pt"
    )
    with torch.no_grad():
        found = model(**inputs)
    (result,) = processor.post_process_grounded_object_detection(
        found, threshold=config.threshold, target_sizes=[(picture.height, picture.width)]
    )
    limits = np.array([picture.width, picture.height] * 2)
    boxes = []
    for score, label, corners in zip(
        *(result[k] for k in ("scores", "labels", "boxes")), strict=True
    ):
        inside = tuple(np.clip(corners.numpy(), 0, limits).tolist())
        if min(inside[2] - inside[0], inside[3] - inside[1]) >= 1:
            boxes.append(Box(noun=nouns[int(label)], score=float(score), corners=inside))
    return suppress(boxes, config.max_overlap, config.max_objects)


def test_boxes_and_scores_are_those_of_the_raw_outputs(config):
    scorer = DetectorScorer(config)
    detector = scorer.load()
    images = pictures(len(PROMPTS))
    specs = [parse(prompt) for prompt in PROMPTS]
    opened = [to_pil(torch.tensor(image), "") for image in images]
    with torch.inference_mode():
        found = scorer._boxes(detector, specs, opened)
    plain, counts = [], []
    for prompt, image, boxes in zip(PROMPTS, images, found, strict=True):
        expected = seen(config, prompt, image)
        assert [box.noun for box in boxes] == [box.noun for box in expected]
        for box, other in zip(boxes, expected, strict=True):
            assert box.score == pytest.approx(other.score, abs=TOLERANCE)
            assert box.corners == pytest.approx(other.corners, abs=1e-2)
        counts.append(len(boxes))
        if not any(wanted.color for wanted in parse(prompt).wanted):
            plain.append(judge(parse(prompt), expected, strict=False))
    assert sum(counts) > 4
    assert len(set(plain)) > 1
    scores = raw(config)
    assert [scores[k] for k in (0, 1, 2, 4)] == pytest.approx(plain)
    # Fewer are left where less overlap is allowed.
    few = dataclasses.replace(config, max_overlap=0.02)
    with torch.inference_mode():
        found = DetectorScorer(few)._boxes(detector, specs, opened)
    expected = [len(seen(few, *pair)) for pair in zip(PROMPTS, images, strict=True)]
    assert [len(boxes) for boxes in found] == expected
    assert sum(expected) < sum(counts)


def test_colors_are_the_nearest_descriptions(config):
    (image,) = pictures(1)
    picture = to_pil(torch.tensor(image), "")
    scorer = DetectorScorer(config)
    boxes = [
        Box(noun="car", score=0.9, corners=(left, 2.0, left + 9.5, 20.0))
        for left in (0.0, 7.3, 20.0)
    ]
    other = Box(noun="dog", score=0.9, corners=(0.0, 0.0, 9.0, 9.0))
    with torch.inference_mode():
        found = scorer._colored(parse("a red car and a dog"), picture, [*boxes, other])
        encoder = read_encoder(config.colors)
        for box, colored in zip(boxes, found, strict=False):
            left, top, right, bottom = box.corners
            crop = picture.crop((int(left), int(top), int(np.ceil(right)), int(bottom)))
            seen_D = encoder.pictures([crop])[0]
            sums = [
                sum(
                    encoder.texts([text])[0]
                    for text in (
                        f"a photo of a {color} car",
                        f"a photo of a {color}-colored car",
                        f"a photo of a {color} object",
                    )
                )
                for color in COLORS
            ]
            cosines = [float(total @ seen_D / total.norm()) for total in sums]
            assert colored == dataclasses.replace(box, color=COLORS[int(np.argmax(cosines))])
            directions_CD = torch.stack([total / total.norm() for total in sums])
            palette_CD = scorer._palette(encoder, "car")
            torch.testing.assert_close(palette_CD, directions_CD, atol=1e-5, rtol=0)
    # Nobody asked for the dog's colour.
    assert found[3] == other
    assert len({box.color for box in found[:3]}) > 1


def test_no_batch_size_matters(config):
    whole = raw(config)
    for size in (1, 4):
        assert raw(dataclasses.replace(config, batch_size=size)) == pytest.approx(whole)


def test_thresholds_and_strictness(config):
    assert raw(dataclasses.replace(config, threshold=1.0)).max() == 0
    graded, strict = raw(config), raw(dataclasses.replace(config, strict=True))
    np.testing.assert_array_equal(strict, graded == 1)
    stricter = raw(dataclasses.replace(config, counting_threshold=1.0))
    assert stricter[2] == 0 < graded[2]
    np.testing.assert_array_equal(np.delete(stricter, 2), np.delete(graded, 2))


def test_prompts_that_cannot_be_judged_and_other_models_are_named(config):
    with pytest.raises(ValueError, match="prompt 'a cat and ': got '', expected a GenEval prompt"):
        raw(config, ["a cat and "])
    with pytest.raises(ValueError, match="expected an open-vocabulary detector, got: "):
        raw(dataclasses.replace(config, model=config.colors.model))


def test_grounding_dino_reads_nouns_off_a_sentence(tmp_path):
    from transformers import AutoProcessor, GroundingDinoForObjectDetection

    config = DetectorConfig(model=write_dino(tmp_path))
    detector = DetectorScorer(config).load()
    opened = [to_pil(torch.tensor(image), "") for image in pictures(2)]
    with torch.inference_mode():
        scores, corners = _detect(detector, [["cat", "hot dog"], ["car"]], opened)
    assert scores[1, :, 1].max() == 0
    model = GroundingDinoForObjectDetection.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(text=["a cat. a hot dog."], images=opened[:1], return_tensors="pt")
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert tokens == ["[CLS]", "a", "cat", ".", "a", "hot", "dog", ".", "[SEP]"]
    with torch.no_grad():
        found = model(**inputs)
    odds = found.logits[0].sigmoid()
    expected = torch.stack([odds[:, 2], odds[:, 5:7].max(1).values], 1)
    torch.testing.assert_close(scores[0], expected, atol=TOLERANCE, rtol=0)
    x, y, width, height = found.pred_boxes[0].unbind(1)
    sides = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    torch.testing.assert_close(corners[0], torch.stack(sides, 1), atol=TOLERANCE, rtol=0)
