"""Random workflows over an installation of real models: speed, validity, variety.

    python -m benchmarks.sampling [--quick] [--json] [--num N] [--processes P] [--catalogue FILE]

Draws from the text-to-image profile, decodes and validates every distinct workflow, and prints how
often each class occurs. Rates are per CPU second of one process; `wall_s` is of all together.
`--quick` takes 10,000 workflows in place of 1,000,000.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from flowloom.workflow import Catalogue, Grammar, decode, random_workflows, validate
from flowloom.workflow.mutation import mutate_all
from flowloom.workflow.profile import text_to_image

CATALOGUE = "data/catalogues/example.json.gz"
BUDGET = 128
CHUNK = 5_000  # workflows drawn from one seed
NUM_MUTATED = 1_000


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and print it; the last line is one JSON object with `--json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10,000 workflows, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    parser.add_argument("--num", type=int, help="how many workflows")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the work")
    parser.add_argument("--catalogue", default=CATALOGUE, help="a catalogue with model files")
    options = parser.parse_args(arguments)
    num = options.num or (10_000 if options.quick else 1_000_000)
    result = measure(options.catalogue, num, options.processes)
    for name, value in result.items():
        if name != "class_share":
            print(
                f"{name:24s} {value:>14,.4f}"
                if isinstance(value, float)
                else f"{name:24s} {value:>14,}"
            )
    for name, share in result["class_share"].items():
        print(f"  {name:30s} {share:8.3%}")
    if options.json:
        print(json.dumps(result))
    return result


def measure(catalogue: str, num: int, processes: int) -> dict[str, Any]:
    """Figures by name; failures are counts that must be 0."""
    start = time.perf_counter()
    chunks = [(catalogue, seed, min(CHUNK, num - seed * CHUNK)) for seed in range(-(-num // CHUNK))]
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            parts = list(pool.map(check_chunk, chunks))
    else:
        parts = [check_chunk(chunk) for chunk in chunks]
    prints = np.concatenate([part["prints"] for part in parts])
    lengths = np.concatenate([part["lengths"] for part in parts])
    share = sum((part["classes"] for part in parts), Counter())
    grammar = _grammar(catalogue)
    return {
        "drawn": num,
        "classes": grammar.num_classes,
        "classes_reached": len(share),
        "distinct": len(np.unique(prints)),
        "distinct_frac": len(np.unique(prints)) / num,
        "invalid": sum(part["invalid"] for part in parts),
        "warned": sum(part["warned"] for part in parts),
        "over_budget": int((lengths > BUDGET).sum()),
        "tokens_median": float(np.median(lengths)),
        "tokens_p95": float(np.percentile(lengths, 95)),
        "tokens_max": int(lengths.max()),
        "samples_per_s": num / sum(part["sample_s"] for part in parts),
        "check_per_s": num / sum(part["check_s"] for part in parts),
        **mutations(grammar),
        "wall_s": time.perf_counter() - start,
        "class_share": {name: count / num for name, count in share.most_common()},
    }


_GRAMMARS: dict[str, Grammar] = {}


def _grammar(path: str) -> Grammar:
    """The grammar of a catalogue's text-to-image profile, built once in a process."""
    if path not in _GRAMMARS:
        catalogue = Catalogue.load(path)
        _GRAMMARS[path] = Grammar(catalogue, budget=BUDGET, classes=text_to_image(catalogue))
    return _GRAMMARS[path]


def check_chunk(chunk: tuple[str, int, int]) -> dict[str, Any]:
    """Draw and check the workflows of one seed: fingerprints, lengths, failures, classes."""
    path, seed, num = chunk
    grammar = _grammar(path)
    start = time.process_time()
    codes = random_workflows(grammar, num, seed)
    sampled = time.process_time()
    prints, invalid, warned, classes = [], 0, 0, Counter()
    for code in codes:
        flow = decode(code.tokens, grammar, code.texts, code.seeds)
        severities = {problem.severity for problem in validate(flow, grammar.catalogue)}
        invalid += "error" in severities
        warned += "warning" in severities
        prints.append(int(flow.fingerprint()[:16], 16))
        classes.update({node.class_type for node in flow.nodes.values()})
    return {
        "prints": np.array(prints, np.uint64),
        "lengths": np.array([len(code.tokens) for code in codes]),
        "invalid": invalid,
        "warned": warned,
        "classes": classes,
        "sample_s": sampled - start,
        "check_s": time.process_time() - sampled,
    }


def mutations(grammar: Grammar) -> dict[str, Any]:
    """Speed of edits, and how many leave an invalid workflow (must be 0) or change nothing."""
    codes = random_workflows(grammar, NUM_MUTATED, 1 << 20)
    flows = [decode(code.tokens, grammar) for code in codes]
    mutate_all(flows[:1], grammar, np.random.default_rng(0))
    start = time.process_time()
    edited = mutate_all(flows, grammar, np.random.default_rng(0))
    seconds = time.process_time() - start
    severities = [{p.severity for p in validate(flow, grammar.catalogue)} for flow in edited]
    same = sum(a.fingerprint() == b.fingerprint() for a, b in zip(flows, edited, strict=True))
    return {
        "mutations_per_s": len(flows) / seconds,
        "mutations_invalid": sum("error" in found for found in severities),
        "mutations_unchanged": same,
    }


if __name__ == "__main__":
    main()
