"""Prompts to tune on and held-out ones.

Facts pinned here:
- Prompts of one split are those that the language gives it; no meaning is in both splits. Kinds
  come in turn, and no meaning twice while there are others.
- A tenth of a file's prompts is held out, by their words alone; each prompt comes once before any
  comes twice. The order is a function of the entropy.
"""

from collections import Counter

import pytest

from flowloom.generator.config import PromptsConfig
from flowloom.generator.prompts import draw_prompts
from flowloom.shapes import prompts as language


def test_prompts_of_the_splits_do_not_meet():
    config = PromptsConfig(kinds=("two", "colors"), shapes=("circle", "star"))
    specs = {
        split: [language.parse(text) for text in draw_prompts(config, split, count, (0, 1))]
        for split, count in (("train", 200), ("holdout", 100))
    }
    meanings = [{spec.meaning for spec in some} for some in specs.values()]
    assert not meanings[0] & meanings[1]
    for split, some in specs.items():
        assert {language.split_of(spec) for spec in some} == {split}
        assert [spec.kind for spec in some] == ["two", "colors"] * (len(some) // 2)
        assert {item.shape for spec in some for item in spec.objects} == {"circle", "star"}


def test_meanings_differ_while_there_are_others():
    config = PromptsConfig(kinds=("colors",))
    texts = draw_prompts(config, "train", 20, (0,))
    assert len({language.parse(text).meaning for text in texts}) == 20
    assert draw_prompts(config, "train", 20, (0,)) == texts
    assert draw_prompts(config, "train", 20, (1,)) != texts


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"a picture of {n} cats\nA PICTURE of {n} Cats\n" for n in range(200)))
    return PromptsConfig(file=str(path))


def test_a_tenth_of_a_file_is_held_out_by_words_alone(file):
    train, held_out = (set(draw_prompts(file, s, 1000, (0,))) for s in ("train", "holdout"))
    assert not train & held_out
    assert len(train | held_out) == 400
    assert 20 < len(held_out) < 60
    words = [{text.lower() for text in texts} for texts in (train, held_out)]
    assert not words[0] & words[1]


def test_a_files_prompts_come_in_rounds(file):
    held_out = draw_prompts(file, "holdout", 100, (0,))
    num_known = len(set(held_out))
    counts = Counter(held_out).values()
    assert {min(counts), max(counts)} == {100 // num_known, 100 // num_known + 1}
    assert sorted(held_out[:num_known]) == sorted(held_out[num_known : 2 * num_known])
    assert held_out[:num_known] != held_out[num_known : 2 * num_known]
    assert draw_prompts(file, "holdout", 100, (0,)) == held_out
    assert draw_prompts(file, "holdout", 100, (1,)) != held_out
