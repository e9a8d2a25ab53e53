"""Length of real text-to-image workflows: tokens of our code against JSON under a real BPE.

    python -m benchmarks.length [--quick] [--json]

The workflows are the templates named in `text_to_image_templates.json`, each once as our code and
as JSON: minified API JSON; API JSON as people export it (titles, two spaces of indentation); the
editor's own file. "bare" is the same with every prompt text replaced by "{prompt}": our code keeps
texts beside and counts one token for each, so the bare figures compare like with like.

JSON is counted in the tokens of Qwen and of Llama 3. Their vocabularies lie in packages that the
project does not depend on; what is not in `.cache` is not counted:

    pip download dashscope==1.25.24 --no-deps -d .cache
    npm pack llama3-tokenizer-js@1.2.0 --pack-destination .cache

The speed of the code is measured on the same workflows, in CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import base64
import json
import tarfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import regex

from flowloom.workflow import Catalogue, Codec, Vocabulary, Workflow
from flowloom.workflow import vocabulary as voc
from flowloom.workflow.inputs import active_inputs
from tests.workflow.templates import converted, load_catalogue, load_templates, template_folder

NAMED_SET = Path(__file__).parent / "text_to_image_templates.json"
CACHE = Path(".cache")
# How the tokenizers cut a text before they merge bytes; they differ in numbers only.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EVERY = 5


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and print it; the last line is one JSON object with `--json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.length", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"one template of {EVERY}")
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    options = parser.parse_args(arguments)
    names = named_set()[:: EVERY if options.quick else 1]
    result = measure(names, tokenizers())
    for name, value in result.items():
        print(f"{name:40s} {value:>10,.2f}" if isinstance(value, float) else f"{name:40s} {value}")
    if options.json:
        print(json.dumps(result))
    return result


def named_set() -> list[str]:
    """Names of the templates that are measured."""
    return json.loads(NAMED_SET.read_text())["names"]


def select() -> list[str]:
    """Apply the rule of the named set to the installed template package."""
    index = json.loads((template_folder() / "index.json").read_text())
    entries = [entry for group in index for entry in group["templates"]]
    return sorted(
        entry["name"]
        for entry in entries
        if "Text to Image" in entry.get("tags", ())
        and entry.get("openSource") is not False
        and entry["name"] in converted()
    )


def measure(names: Sequence[str], counters: Mapping[str, Tokenizer]) -> dict[str, Any]:
    """Mean, median and 90 % quantile of our code; means of the JSON forms; ratios of means."""
    catalogue = load_catalogue()
    start = time.process_time()
    codec = Codec(catalogue, Vocabulary.build(catalogue))
    build_s = time.process_time() - start
    codes = {name: codec.encode(converted()[name]).tokens for name in names}
    ours = np.array([len(code) for code in codes.values()])
    spelled = [sum(t in (voc.ESCAPE, voc.NUMBER) for t in code) / 2 for code in codes.values()]
    result: dict[str, Any] = {
        "templates": len(names),
        "code_mean": float(ours.mean()),
        "code_median": float(np.median(ours)),
        "code_p90": float(np.percentile(ours, 90)),
        "code_max": int(ours.max()),
        "code_spelled_values_mean": float(np.mean(spelled)),
    }
    result |= {"vocabulary": codec.vocabulary.size, "build_ms": 1e3 * build_s}
    result |= speed(codec, [converted()[name] for name in names])
    counts: dict[str, list[int]] = {}
    for name in names:
        for form, text in forms(name, catalogue).items():
            for language, tokenizer in counters.items():
                counts.setdefault(f"{language}_{form}", []).append(tokenizer.count(text))
    for form, found in counts.items():
        lengths = np.array(found)
        result[f"{form}_mean"] = float(lengths.mean())
        result[f"{form}_ratio"] = float(lengths.mean() / ours.mean())
        result[f"{form}_ratio_of_each_mean"] = float((lengths / ours).mean())
    return result


def speed(codec: Codec, workflows: Sequence[Workflow], rounds: int = 20) -> dict[str, float]:
    """Workflows per CPU second, written and read again."""
    start = time.process_time()
    for _ in range(rounds):
        for workflow in workflows:
            code = codec.encode(workflow)
            codec.decode(code.tokens, code.texts, code.seeds)
    return {"encode_decode_per_s": rounds * len(workflows) / (time.process_time() - start)}


def forms(name: str, catalogue: Catalogue) -> dict[str, str]:
    """A template as JSON; the API forms hold the part that the outputs reach, as our code does."""
    workflow, ui = converted()[name], load_templates()[name]
    kept = set(workflow.order(catalogue.output_classes, catalogue))
    part = Workflow({i: node for i, node in workflow.nodes.items() if i in kept})
    named = dict(titles(ui))
    bare = without_texts(part, catalogue)
    return {
        "minified": dump(part.to_api(), None),
        "minified_bare": dump(bare.to_api(), None),
        "minified_bare_renumbered": dump(bare.canonical(catalogue).to_api(), None),
        "exported": dump(exported(part, named), 2),
        "exported_bare": dump(exported(bare, named), 2),
        "editor": (template_folder() / f"{name}.json").read_text(),
    }


def dump(data: Any, indent: int | None) -> str:
    """JSON text, with no space at all where nothing is indented."""
    separators = (",", ":") if indent is None else None
    return json.dumps(data, indent=indent, separators=separators, ensure_ascii=False)


def exported(workflow: Workflow, named: Mapping[str, str]) -> dict[str, Any]:
    """API JSON with the titles that the editor writes into it."""
    api = workflow.to_api()
    return {
        node_id: {
            "inputs": raw["inputs"],
            "class_type": raw["class_type"],
            "_meta": {"title": named.get(node_id, raw["class_type"])},
        }
        for node_id, raw in api.items()
    }


def without_texts(workflow: Workflow, catalogue: Catalogue) -> Workflow:
    """A copy in which every text of several lines is "{prompt}"."""
    for node_id, node in workflow.nodes.items():
        for item in active_inputs(catalogue.nodes[node.class_type], node.inputs):
            if voc.is_text(item) and isinstance(node.inputs.get(item.name), str):
                workflow = workflow.replace(node_id, item.name, "{prompt}")
    return workflow


def titles(ui: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Ids as in API JSON ("4:7" inside node 4) and the titles that people gave some nodes."""
    inner = {one["id"]: one for one in ui.get("definitions", {}).get("subgraphs", ())}
    stack = [("", ui["nodes"])]
    while stack:
        prefix, nodes = stack.pop()
        for node in nodes:
            node_id = f"{prefix}{node['id']}"
            if node["type"] in inner:
                stack.append((f"{node_id}:", inner[node["type"]]["nodes"]))
            elif node.get("title"):
                yield node_id, node["title"]


class Tokenizer:
    """Byte-pair encoding: the pair with the lowest rank is merged until none has one."""

    def __init__(self, ranks: Mapping[bytes, int], number: str) -> None:
        """`number` is the pattern of a piece of digits."""
        self.ranks = ranks
        self.pieces = regex.compile(PIECES.format(number=number))
        self.count_piece = lru_cache(maxsize=None)(self._count_piece)

    def count(self, text: str) -> int:
        """Number of tokens of a text."""
        return sum(self.count_piece(piece) for piece in self.pieces.findall(text))

    def _count_piece(self, piece: str) -> int:
        if piece.encode() in self.ranks:
            return 1
        parts = [bytes([byte]) for byte in piece.encode()]
        never = len(self.ranks)
        while len(parts) > 1:
            pairs = [self.ranks.get(a + b, never) for a, b in pairwise(parts)]
            best = min(pairs)
            if best == never:
                break
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return len(parts)


def tokenizers() -> dict[str, Tokenizer]:
    """Those whose package lies in the cache; says what is missing."""
    found: dict[str, Tokenizer] = {}
    for path in sorted(CACHE.glob("dashscope-*.whl")):
        found["qwen"] = Tokenizer(qwen_ranks(path), r"\p{N}")
    for path in sorted(CACHE.glob("llama3-tokenizer-js-*.tgz")):
        found["llama3"] = Tokenizer(llama_ranks(path), r"\p{N}{1,3}")
    for missing in {"qwen", "llama3"} - set(found):
        print(f"no vocabulary of {missing} in {CACHE}: not counted, see --help")
    return found


def qwen_ranks(wheel: Path) -> dict[bytes, int]:
    """Line by line a token in base64 and its rank."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read("dashscope/resources/qwen.tiktoken").splitlines()
    pairs = (line.split() for line in lines if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def llama_ranks(archive: Path) -> dict[bytes, int]:
    """Tokens in order of rank, in base64 in a script; a byte is written as a printable letter."""
    with tarfile.open(archive) as files:
        script = files.extractfile("package/src/data-converted.js")
        assert script is not None
        text = script.read().decode()
    tokens = base64.b64decode(text.split('llama_vocab_base64 = "')[1].split('"')[0]).decode()
    # Bytes that are printable letters stand for themselves, the others for letters from 256 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + k): byte for k, byte in enumerate(others)}
    return {bytes(byte_of[c] for c in t): rank for rank, t in enumerate(tokens.split("\n"))}


if __name__ == "__main__":
    main()
