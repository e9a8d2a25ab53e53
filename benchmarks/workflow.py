"""Speed of the workflow core on one core: masks, random workflows, codec, validation.

    python -m benchmarks.workflow [--quick] [--json]

Over the embedded catalogue, and over the text-to-image classes of a ComfyUI 0.33 server with an
example installation. Times are CPU seconds of this process, so other work on the machine disturbs
them less. Without `--quick`, 100,000 random workflows of each are checked as well: valid,
decodable, within the budget.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flowloom.workflow import (
    Catalogue,
    Grammar,
    Problem,
    decode,
    encode,
    random_workflows,
    validate,
)
from flowloom.workflow import vocabulary as voc
from flowloom.workflow.mutation import mutate_all
from flowloom.workflow.profile import text_to_image

BATCH = 256
EXAMPLE = "data/catalogues/example.json.gz"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and print it; the last line is one JSON object with `--json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workflow", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller counts, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    options = parser.parse_args(arguments)
    num, num_checked = (2_000, 0) if options.quick else (10_000, 100_000)
    result = {name: measure(grammar, num, num_checked) for name, grammar in grammars().items()}
    print(f"{'':26s}" + "".join(f"{name:>14s}" for name in result))
    for figure in next(iter(result.values())):
        cells = "".join(f"{values[figure]:>14,.5g}" for values in result.values())
        print(f"{figure:26s}{cells}")
    if options.json:
        print(json.dumps(result))
    return result


def grammars() -> dict[str, Callable[[], Grammar]]:
    """How to build the grammars that are measured, by name."""
    embedded = Catalogue.load("embedded")
    example = Catalogue.load(EXAMPLE)
    return {
        "embedded": lambda: Grammar(embedded),
        "example": lambda: Grammar(example, budget=128, classes=text_to_image(example)),
    }


def measure(build: Callable[[], Grammar], num: int, num_checked: int) -> dict[str, Any]:
    """Figures by name; rates are per CPU second, `*_ms` is CPU milliseconds per call."""
    grammar, build_s = timed(build)
    catalogue = grammar.catalogue
    codes, sample_s = timed(lambda: random_workflows(grammar, num, 0))
    lengths = np.array([len(code.tokens) for code in codes])
    graphs, decode_s = timed(lambda: [decode(code.tokens, grammar) for code in codes])
    _, encode_s = timed(lambda: [encode(graph, grammar) for graph in graphs])
    problems, validate_s = timed(lambda: [validate(graph, catalogue) for graph in graphs])
    _, print_s = timed(lambda: [graph.fingerprint() for graph in graphs])
    some = graphs[: num // 4]
    _, mutate_s = timed(lambda: mutate_all(some, grammar, np.random.default_rng(0)))
    result = {
        "vocabulary": grammar.vocabulary.size,
        "classes": grammar.num_classes,
        "nodes_mean": float(np.mean([len(graph.nodes) for graph in graphs])),
        "tokens_median": float(np.median(lengths)),
        "tokens_p95": float(np.percentile(lengths, 95)),
        "grammar_build_ms": 1e3 * build_s,
        **step_times(grammar, num),
        "mask_256_uniform_ms": uniform_mask_ms(grammar, num),
        "samples_per_s": num / sample_s,
        "encode_decode_per_s": num / (encode_s + decode_s),
        "validate_per_s": num / validate_s,
        "fingerprint_per_s": num / print_s,
        "mutate_per_s": len(some) / mutate_s,
        "invalid": sum(map(has_error, problems)),
    }
    return {**result, **check(grammar, num_checked)} if num_checked else result


def has_error(problems: Sequence[Problem]) -> bool:
    """Whether a workflow with these problems is refused; warnings do not count."""
    return any(problem.severity == "error" for problem in problems)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of some work and its CPU seconds."""
    start = time.process_time()
    value = work()
    return value, time.process_time() - start


def step_times(grammar: Grammar, num: int) -> dict[str, float]:
    """CPU milliseconds of a mask and of a move, 256 rows at a time, along random workflows.

    A batch is followed until a tenth of its rows have ended, since those cost nothing any more.
    """
    mask_s = move_s = 0.0
    steps = 0
    codes = random_workflows(grammar, min(num, 8 * BATCH), 2)
    for start in range(0, len(codes) - BATCH + 1, BATCH):
        rows = [code.tokens for code in codes[start : start + BATCH]]
        state = grammar.start(BATCH)
        for step in range(int(np.quantile([len(row) for row in rows], 0.1))):
            tokens = np.array([row[step] if step < len(row) else voc.PAD for row in rows])
            mask_s += timed(state.mask)[1]
            move_s += timed(lambda state=state, tokens=tokens: state.advance(tokens))[1]
            steps += 1
    return {"mask_256_ms": 1e3 * mask_s / steps, "advance_256_ms": 1e3 * move_s / steps}


def uniform_mask_ms(grammar: Grammar, num: int) -> float:
    """CPU milliseconds of a mask of 256 rows that take any legal token alike.

    Such rows open far more than they close and so run into the budget, where the grammar has to
    search for completions: about the worst that can be met.
    """
    rng, mask_s, steps = np.random.default_rng(0), 0.0, 0
    for _ in range(num // 2_000):
        state = grammar.start(BATCH)
        while not state.done.all():
            mask, seconds = timed(state.mask)
            mask_s, steps = mask_s + seconds, steps + 1
            state.advance(np.where(mask, rng.random(mask.shape), -1).argmax(1))
    return 1e3 * mask_s / steps


def check(grammar: Grammar, num: int) -> dict[str, Any]:
    """Draw, decode, validate and encode again; the counts of failures must be 0."""
    codes = random_workflows(grammar, num, 1)
    over = sum(len(code.tokens) > grammar.budget for code in codes)
    invalid = inexact = 0
    unique = {tuple(code.tokens): code for code in codes}
    for code in unique.values():
        graph = decode(code.tokens, grammar, code.texts, code.seeds)
        invalid += has_error(validate(graph, grammar.catalogue))
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
