"""The one prompt tokenizer of designer and reward: a fixed list of words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from flowloom.runs import write_json

PAD_ID = 0
UNKNOWN_ID = 1
_SPECIAL = ("<pad>", "<unknown>")


def split_words(text: str) -> list[str]:
    """Lower-case words and numbers; everything else separates."""
    return re.findall(r"[^\W\d_]+|\d+", text.lower())


class WordTokenizer:
    """Texts to ids and back; a word never seen becomes `UNKNOWN_ID`."""

    def __init__(self, words: Sequence[str]):
        """Take the words in id order, without the two special ones.

        Raises:
            ValueError: A word stands twice.
        """
        self.words = (*_SPECIAL, *words)
        self._ids = {word: index for index, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            raise ValueError(f"tokenizer: got {len(words)} words with repeats, expected each once")

    @classmethod
    def fit(cls, texts: Iterable[str]) -> WordTokenizer:
        """Collect the words of `texts`, in alphabetical order."""
        return cls(sorted({word for text in texts for word in split_words(text)}))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, max_len: int | None = None) -> list[int]:
        """Ids of the words of `text`, cut to `max_len`; not padded."""
        return [self._ids.get(word, UNKNOWN_ID) for word in split_words(text)[:max_len]]

    def encode_batch(self, texts: Sequence[str], max_len: int) -> list[list[int]]:
        """Ids of each text, cut and padded with `PAD_ID` to `max_len`."""
        rows = [self.encode(text, max_len) for text in texts]
        return [row + [PAD_ID] * (max_len - len(row)) for row in rows]

    def decode(self, ids: Iterable[int]) -> str:
        """Words of `ids` joined by blanks, padding left out."""
        return " ".join(self.words[index] for index in ids if index != PAD_ID)

    def save(self, path: str | Path) -> None:
        """Write the word list as JSON."""
        write_json(Path(path), {"words": list(self.words[len(_SPECIAL) :])})

    @classmethod
    def load(cls, path: str | Path) -> WordTokenizer:
        """Read what `save` wrote.

        Raises:
            ValueError: The file holds no word list.
        """
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict) or "words" not in content:
            raise ValueError(f"{path}: got no word list, expected an object with 'words'")
        return cls(content["words"])
