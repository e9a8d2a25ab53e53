"""Pins: words and numbers in lower case, padding 0, unknown words 1, the same ids after saving."""

import pytest

from flowloom.dataset.tokenizer import PAD_ID, UNKNOWN_ID, WordTokenizer


def test_ids_survive_saving(tmp_path):
    tokenizer = WordTokenizer.fit(["A red circle,", "3 big discs"])
    assert tokenizer.words == ("<pad>", "<unknown>", "3", "a", "big", "circle", "discs", "red")
    assert tokenizer.encode("a BIG red cat") == [3, 4, 7, UNKNOWN_ID]
    assert tokenizer.encode("a big red circle", max_len=2) == [3, 4]
    assert tokenizer.encode_batch(["red", ""], 2) == [[7, PAD_ID], [PAD_ID, PAD_ID]]
    assert tokenizer.decode([7, 5, PAD_ID]) == "red circle"
    tokenizer.save(tmp_path / "tokenizer.json")
    again = WordTokenizer.load(tmp_path / "tokenizer.json")
    assert again.words == tokenizer.words
    assert len(again) == 8


def test_broken_files_are_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object with 'words'"):
        WordTokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="expected each once"):
        WordTokenizer(["a", "a"])
