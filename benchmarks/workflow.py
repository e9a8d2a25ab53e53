"""Speed of the workflow core on one core: masks, random workflows, codec, validation.

    python -m benchmarks.workflow [--quick] [--json]

Times are CPU seconds of this process, so other work on the machine disturbs them less. Without
`--quick`, 100,000 random workflows are checked as well: valid, decodable, within the budget.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flowloom.workflow import Catalogue, Grammar, decode, encode, random_workflows, validate
from flowloom.workflow.mutation import mutate_all

BATCH = 256


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and print it; the last line is one JSON object with `--json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workflow", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller counts, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    options = parser.parse_args(arguments)
    result = measure(2_000 if options.quick else 10_000, 0 if options.quick else 100_000)
    for name, value in result.items():
        print(f"{name:28s} {value:>12,.2f}" if isinstance(value, float) else f"{name:28s} {value}")
    if options.json:
        print(json.dumps(result))
    return result


def measure(num: int, num_checked: int) -> dict[str, Any]:
    """Figures by name; rates are per CPU second, `*_ms` is CPU milliseconds per call."""
    catalogue = Catalogue.load("embedded")
    grammar, build_s = timed(lambda: Grammar(catalogue))
    codes, sample_s = timed(lambda: random_workflows(grammar, num, 0))
    lengths = np.array([len(code.tokens) for code in codes])
    graphs, decode_s = timed(lambda: [decode(code.tokens, grammar) for code in codes])
    _, encode_s = timed(lambda: [encode(graph, grammar) for graph in graphs])
    problems, validate_s = timed(lambda: [validate(graph, catalogue) for graph in graphs])
    _, print_s = timed(lambda: [graph.fingerprint() for graph in graphs])
    some = graphs[: num // 4]
    _, mutate_s = timed(lambda: mutate_all(some, grammar, np.random.default_rng(0)))
    minified = [len(json.dumps(graph.to_api(), separators=(",", ":"))) for graph in some]
    result = {
        "vocabulary": grammar.vocabulary.size,
        "tokens_median": float(np.median(lengths)),
        "tokens_p95": float(np.percentile(lengths, 95)),
        "minified_characters_mean": float(np.mean(minified)),
        "grammar_build_ms": 1e3 * build_s,
        **step_times(grammar),
        "samples_per_s": num / sample_s,
        "encode_decode_per_s": num / (encode_s + decode_s),
        "validate_per_s": num / validate_s,
        "fingerprint_per_s": num / print_s,
        "mutate_per_s": len(some) / mutate_s,
        "invalid": sum(map(bool, problems)),
    }
    return {**result, **check(grammar, num_checked)} if num_checked else result


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of some work and its CPU seconds."""
    start = time.process_time()
    value = work()
    return value, time.process_time() - start


def step_times(grammar: Grammar, rounds: int = 8) -> dict[str, float]:
    """CPU milliseconds of a mask and of a move for 256 rows drawn uniformly."""
    rng = np.random.default_rng(0)
    mask_s = move_s = 0.0
    steps = 0
    for _ in range(rounds):
        state = grammar.start(BATCH)
        while not state.done.all():
            mask, seconds = timed(state.mask)
            mask_s += seconds
            tokens = np.where(mask, rng.random(mask.shape), -1).argmax(1)
            _, seconds = timed(lambda state=state, tokens=tokens: state.advance(tokens))
            move_s += seconds
            steps += 1
    return {"mask_256_ms": 1e3 * mask_s / steps, "advance_256_ms": 1e3 * move_s / steps}


def check(grammar: Grammar, num: int) -> dict[str, Any]:
    """Draw, decode, validate and encode again; the counts of failures must be 0."""
    codes = random_workflows(grammar, num, 1)
    over = sum(len(code.tokens) > grammar.budget for code in codes)
    invalid = inexact = 0
    unique = {tuple(code.tokens): code for code in codes}
    for code in unique.values():
        graph = decode(code.tokens, grammar, code.texts, code.seeds)
        invalid += bool(validate(graph, grammar.catalogue))
        inexact += encode(graph, grammar) != code
    return {
        "checked": num,
        "checked_distinct": len(unique),
        "checked_over_budget": over,
        "checked_invalid": invalid,
        "checked_inexact": inexact,
    }


if __name__ == "__main__":
    main()
