"""Pins: text, CSV and JSONL give the same prompts, repeats dropped, order kept, rows by line;
everything that cannot be read is refused in one line that names file, line, got and expected."""

import json

import pytest

from flowloom.dataset.prompt_files import MAX_CHARACTERS, read_prompts


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_three_formats_give_the_same_prompts(tmp_path):
    texts = ["a red circle", "a cat, asleep", "a\u00e9rien \u4e2d\u6587"]
    files = {
        "p.txt": f"# mine\n{texts[0]}\n\n  {texts[1]} \n{texts[2]}\r\n{texts[0]}\n",
        "p.csv": f'kind,prompt\n,{texts[0]}\npets,"a cat,\nasleep"\n,{texts[2]}\n,{texts[0]}\n',
        "p.jsonl": "".join(json.dumps({"prompt": t}) + "\n\n" for t in [*texts, texts[0]]),
    }
    read = {name: read_prompts(write(tmp_path / name, text)) for name, text in files.items()}
    for name, prompts in read.items():
        assert [prompt.text for prompt in prompts] == texts, name
    assert [p.place.rpartition(":")[2] for p in read["p.txt"]] == ["2", "4", "5"]
    assert [p.place.rpartition(":")[2] for p in read["p.csv"]] == ["2", "3", "5"]
    assert [p.place.rpartition(":")[2] for p in read["p.jsonl"]] == ["1", "3", "5"]
    assert [p.kind for p in read["p.csv"]] == [None, "pets", None]


def test_a_mark_at_the_front_is_no_text(tmp_path):
    (prompt,) = read_prompts(write(tmp_path / "p.csv", "prompt\na cat\n".encode("utf-8-sig")))
    assert prompt.text == "a cat"


LONG = "x" * 10_000
BROKEN = {
    "empty.txt": ("", r"empty.txt: got no prompts, expected at least one"),
    "comments.txt": ("# a\n \n", r"comments.txt: got no prompts"),
    "empty.csv": ("", r"empty.csv: got no prompts"),
    "head.csv": ("prompt\n", r"head.csv: got no prompts"),
    "long.txt": (
        f"a cat\n{LONG}\n",
        r"long.txt:2: got a prompt of 10000 characters, expected at m",
    ),
    "long.jsonl": (json.dumps({"prompt": LONG}), r"long.jsonl:1: got a prompt of 10000 characters"),
    "binary.txt": (
        b"\x89PNG\r\n\x1a\n\x00\x00\x01",
        r"binary.txt: got a binary file, expected text",
    ),
    "wide.txt": ("a cat\n".encode("utf-16"), r"wide.txt: got text in UTF-16, expected UTF-8"),
    "bare.txt": ("a cat\n".encode("utf-16-be"), r"bare.txt: got text in UTF-16, expected UTF-8"),
    "latin.txt": ("a\nfa\u00e7ade\n".encode("latin-1"), r"latin.txt:2: got byte 0xe7, expected t"),
    "column.csv": ("text;kind\na;b\n", r"column.csv:1: got columns 'text;kind', expected a column"),
    "short.csv": ("prompt,kind\na,b\nc\n", r"short.csv:3: got 1 values, expected 2"),
    "quote.csv": ('prompt\na\n"b\n', r"quote.csv:3: got no CSV: .*; expected quotes closed"),
    "blank.csv": ("prompt,kind\n ,b\n", r"blank.csv:2: got an empty prompt, expected some words"),
    "row.jsonl": ('{"prompt": "a"}\n{"prompt": ', r"row.jsonl:2: got '\{\"prompt\":' \(Expecting"),
    "list.jsonl": ('["a"]\n', r"list.jsonl:1: got no 'prompt', expected an object with a text"),
    "type.jsonl": ('{"prompt": 3}', r"type.jsonl:1: got int as 'prompt', expected an object"),
    "kind.jsonl": ('{"prompt": "a", "kind": 3}', r"kind.jsonl:1: got int as 'kind', expected a t"),
    "half.jsonl": (r'{"prompt": "a \ud800"}', r"half.jsonl:1: got half a character"),
    "p.docx": ("a", r"p.docx: got suffix '.docx', expected one of .txt, .csv, .jsonl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_named(name, tmp_path):
    content, message = BROKEN[name]
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"none.txt: got no such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"folder.txt: got no such file"):
        read_prompts(tmp_path / "folder.txt")


def test_the_longest_prompt_is_taken(tmp_path):
    text = "y" * MAX_CHARACTERS
    assert read_prompts(write(tmp_path / "p.txt", text))[0].text == text
