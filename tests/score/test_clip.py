"""Pins: PickScore, HPS v2, alignment and LAION aesthetics of tiny random CLIP models equal what the
raw model outputs give by hand; preprocessing by hand; no batch size matters; what a folder lacks is
named; heads of another layout are refused."""

import dataclasses
import types

import numpy as np
import pytest
import torch

from flowloom.score.build import build_rubric
from flowloom.score.config import (
    AestheticsConfig,
    AlignmentConfig,
    HPSConfig,
    PickScoreConfig,
    RubricConfig,
    TermConfig,
)
from tests.score.tiny import drawn, pictures, write_clip

TOLERANCE = 1e-5
PROMPTS = ["a photo of a cat", "a dog", "three red cats and a photo of a car " * 3, "a dog", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def raw(scorer, prompts=PROMPTS, images=None):
    images = pictures(len(prompts)) if images is None else images
    config = RubricConfig(terms=(TermConfig(scorer=scorer, weight=1.0, name="x"),), batch_size=4)
    rubric = build_rubric(config)
    found = np.array([row["x"] for row in rubric.score(prompts, images)])
    rubric.close()
    return found


def to_bytes(image):
    return np.rint((image.clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def outputs(folder, prompts, images):
    """Logits `[picture, prompt]` and unnormalised embeddings, by transformers alone."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    text = tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    pixels = processor(images=[to_bytes(i) for i in images], return_tensors="pt").pixel_values
    with torch.no_grad():
        found = model(**text, pixel_values=pixels)
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        embeddings = model.visual_projection(pooled)
    return found.logits_per_image, float(model.logit_scale.detach().exp()), embeddings


def test_scores_are_those_of_the_raw_outputs(folder):
    logits, scale, _ = outputs(folder, PROMPTS, pictures(len(PROMPTS)))
    expected = logits.diagonal().numpy()
    assert scale > 10
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(raw(PickScoreConfig(model=folder)), expected, atol=1e-4)
    for config in (HPSConfig(model=folder), AlignmentConfig(model=folder)):
        np.testing.assert_allclose(raw(config), expected / scale, atol=TOLERANCE)


def test_pictures_are_prepared_as_clip_was_trained(folder):
    """A picture of the model's own size is only normalised, by CLIP's channel means and spreads."""
    from transformers import CLIPModel

    from flowloom.score.clip import read_encoder
    from flowloom.score.models import to_pil

    (image,) = pictures(1, sizes=((16, 16),))
    mean, sd = np.array([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    pixels = (to_bytes(image) / 255 - mean[:, None, None]) / sd[:, None, None]
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=torch.tensor(pixels[None]).float()).pooler_output
        expected = model.visual_projection(pooled)[0].numpy()
        found = read_encoder(AlignmentConfig(model=folder)).pictures(
            [to_pil(torch.tensor(image), "")]
        )
    np.testing.assert_allclose(found[0], expected / np.linalg.norm(expected), atol=TOLERANCE)


def test_what_is_beyond_the_range_is_cut_off_and_the_rest_rounded():
    from flowloom.score.models import to_pil

    levels = torch.tensor([-1.5, -1.0, -0.501, 0.0, 0.503, 1.0, 1.5])
    picture = to_pil(levels.expand(3, 2, -1), "")
    assert picture.size == (7, 2)
    # (x + 1) 127.5, rounded; a half goes to the even one.
    assert [picture.getpixel((k, 1))[2] for k in range(7)] == [0, 0, 64, 128, 192, 255, 255]


@pytest.mark.parametrize(("num_words", "fits"), [(49, False), (50, True), (100, True)])
def test_a_tokenizer_has_half_of_the_words_at_least(num_words, fits):
    from flowloom.score.models import check_tokenizer

    sizes = types.SimpleNamespace(vocab_size=100)
    if fits:
        check_tokenizer(range(num_words), sizes, HPSConfig())
    else:
        with pytest.raises(ValueError, match="expected a tokenizer of 100 words, got: 49"):
            check_tokenizer(range(num_words), sizes, HPSConfig())


def test_no_batch_size_matters(folder):
    for config in (PickScoreConfig(model=folder), HPSConfig(model=folder)):
        whole = raw(config)
        for size in (1, 3):
            smaller = raw(dataclasses.replace(config, batch_size=size))
            np.testing.assert_allclose(smaller, whole, atol=1e-4)


def test_half_precision_is_near(folder):
    half = raw(HPSConfig(model=folder, dtype="bfloat16"))
    assert 0 < np.abs(half - raw(HPSConfig(model=folder))).max() < 0.1


def test_two_terms_share_a_model(folder, monkeypatch):
    from transformers import CLIPModel

    loads, read = [], CLIPModel.from_pretrained
    monkeypatch.setattr(
        CLIPModel, "from_pretrained", lambda *a, **k: loads.append(1) or read(*a, **k)
    )
    terms = tuple(
        TermConfig(scorer=kind(model=folder), weight=0.5) for kind in (HPSConfig, AlignmentConfig)
    )
    rubric = build_rubric(RubricConfig(terms=terms))
    assert not loads
    (row,) = rubric.score(["a cat"], pictures(1))
    assert row["hps"] == row["clip"] == row["score"]
    assert len(loads) == 1
    rubric.close()
    # Another type is another model.
    half = HPSConfig(model=folder, dtype="bfloat16")
    terms = (terms[1], TermConfig(scorer=half, weight=0.5))
    rubric = build_rubric(RubricConfig(terms=terms))
    (row,) = rubric.score(["a cat"], pictures(1))
    assert 0 < abs(row["hps"] - row["clip"]) < 0.1
    rubric.close()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A CLIP model with embeddings of width 768, and a head for them."""
    folder = tmp_path_factory.mktemp("wide")
    write_clip(folder, width=768)
    head = torch.nn.Sequential(
        torch.nn.Linear(768, 1024), torch.nn.Dropout(0.2),
        torch.nn.Linear(1024, 128), torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64), torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 16), torch.nn.Linear(16, 1),
    )  # fmt: skip
    drawn(head, 0.1)
    path = folder / "head.pth"
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, path)
    return folder, path, head


def test_aesthetics_are_the_head_on_the_embedding(wide):
    folder, path, head = wide
    embeddings = outputs(str(folder), PROMPTS, pictures(len(PROMPTS)))[2]
    with torch.no_grad():
        expected = head(embeddings / embeddings.norm(dim=1, keepdim=True))[:, 0].numpy()
    config = AestheticsConfig(model=str(folder), head=str(path))
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(raw(config), expected, atol=TOLERANCE)
    one = raw(dataclasses.replace(config, batch_size=1), ["x"] * len(PROMPTS))
    np.testing.assert_allclose(one, expected, atol=TOLERANCE)


def test_other_heads_are_refused(wide, folder, tmp_path):
    from safetensors.torch import save_file

    path = wide[1]
    state = torch.load(path)

    def refused(file, message, model=str(wide[0])):
        with pytest.raises(ValueError, match=message):
            raw(AestheticsConfig(model=model, head=str(file)))

    refused(tmp_path / "none.pth", "head: got '.*none.pth', expected a file")
    (tmp_path / "text.pth").write_text("hello")
    refused(tmp_path / "text.pth", "text.pth: expected the head's state dict, got")
    save_file({k: v for k, v in state.items() if k != "layers.4.bias"}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", r"layers.4.bias: got shape None, expected \(64,\)")
    save_file(state | {"layers.9.bias": torch.ones(1)}, tmp_path / "b.safetensors")
    refused(tmp_path / "b.safetensors", r"got 'layers.9.bias', expected only layers.0.weight")
    refused(path, r"got embeddings of width 24, expected 768", model=folder)


def test_what_a_folder_lacks_is_named(folder, tmp_path):
    import shutil

    with pytest.raises(ValueError, match="model: got '/nowhere', expected an existing folder"):
        raw(HPSConfig(model="/nowhere"))
    with pytest.raises(ValueError, match="nobody/nothing: expected a CLIP tokenizer, got: "):
        raw(HPSConfig(model="nobody/nothing"))
    parts = {
        "tokenizer.json": "a tokenizer of 5.. words",
        "preprocessor_config.json": "CLIP's image processor",
        "model.safetensors": "a CLIP model",
    }
    for file, what in parts.items():
        copied = tmp_path / file
        shutil.copytree(folder, copied)
        (copied / file).unlink()
        with pytest.raises(ValueError, match=f"{copied}: expected {what}, got: ") as caught:
            raw(HPSConfig(model=str(copied)))
        assert "\n" not in str(caught.value)
