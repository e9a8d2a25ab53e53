"""`validate`, `encode` and `sample`: commands about workflows that need no model."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from flowloom.cli import NO, OK, USAGE, one_line
from flowloom.cli.output import print_json, warn
from flowloom.cli.sources import Source, read_sources
from flowloom.workflow import Catalogue


def validate(parsed: Namespace) -> int:
    """Check workflows; status 0 all valid, 1 problems, 2 unreadable input."""
    from flowloom.workflow import validate as check

    catalogue = Catalogue.load(parsed.catalogue)
    results = []
    sources = read_sources(parsed.paths)
    for source in sources:
        if source.error is not None:
            problems = [_unreadable(source)]
        else:
            problems = [dataclasses.asdict(problem) for problem in check(source.api, catalogue)]
        valid = not any(problem["severity"] == "error" for problem in problems)
        results.append({"path": source.path, "valid": valid, "problems": problems})
    if parsed.json:
        print_json({"results": results})
    else:
        for result in results:
            print(f"{result['path']}: {'valid' if result['valid'] else 'not valid'}")
            for problem in result["problems"]:
                print(f"  {_problem_line(problem)}")
        num_valid = sum(result["valid"] for result in results)
        print(f"{num_valid} of {len(results)} valid against {catalogue.name or parsed.catalogue}")
    if report_unreadable("validate", sources):
        return USAGE
    return OK if all(result["valid"] for result in results) else NO


def encode(parsed: Namespace) -> int:
    """Write workflows as tokens and read them back; status 1 where that loses something."""
    from flowloom.workflow import Vocabulary
    from flowloom.workflow.codec import Codec

    catalogue = Catalogue.load(parsed.catalogue)
    vocabulary = Vocabulary.build(catalogue)
    codec = Codec(catalogue, vocabulary)
    results: list[dict[str, Any]] = []
    sources = read_sources(parsed.paths)
    for source in sources:
        row: dict[str, Any] = {"path": source.path, "tokens": None, "round_trip": False}
        row["error"] = None
        try:
            workflow = source.workflow()
            encoded = codec.encode(workflow)
            decoded = codec.decode(encoded.tokens, encoded.texts, encoded.seeds)
            row["tokens"] = [int(token) for token in encoded.tokens]
            row["round_trip"] = decoded.fingerprint() == workflow.fingerprint()
        except ValueError as error:  # the codec's and the graph's errors are
            row["error"] = one_line(error)
        results.append(row)
    if parsed.json:
        print_json({"results": results, "vocabulary": vocabulary.size})
    else:
        for row in results:
            if row["tokens"] is None:
                print(f"{row['path']}: {row['error']}")
            else:
                exact = "exact" if row["round_trip"] else "NOT the same when decoded"
                print(f"{row['path']}: {len(row['tokens'])} tokens, {exact}")
                print("  " + " ".join(vocabulary.token_text(token) for token in row["tokens"]))
        print(f"vocabulary: {vocabulary.size} tokens")
    if report_unreadable("encode", sources):
        return USAGE
    return OK if all(row["round_trip"] for row in results) else NO


def sample(parsed: Namespace) -> int:
    """Draw random valid workflows into a .jsonl, each a template with '{prompt}'."""
    from flowloom.workflow import Grammar, Vocabulary, random_workflows

    if not parsed.out.endswith(".jsonl"):
        raise ValueError(f"--out: got {parsed.out!r}, expected a name that ends with .jsonl")
    catalogue = Catalogue.load(parsed.catalogue)
    grammar = Grammar(catalogue, Vocabulary.build(catalogue))
    out = Path(parsed.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    with partial.open("w") as file:
        for encoded in random_workflows(grammar, parsed.n, parsed.seed):
            workflow = grammar.codec.decode(encoded.tokens, encoded.texts, encoded.seeds)
            file.write(json.dumps({"workflow": workflow.to_api()}) + "\n")
    partial.replace(out)
    warn(f"{parsed.n} workflows in {out}")
    return OK


def report_unreadable(command: str, sources: list[Source]) -> bool:
    """Name unreadable inputs on standard error, one line each; whether there are any."""
    unreadable = [source for source in sources if source.error is not None]
    for source in unreadable:
        warn(f"flowloom {command}: {source.path}: {source.error}")
    return bool(unreadable)


def _unreadable(source: Source) -> dict[str, Any]:
    return {
        "type": "unreadable",
        "severity": "error",
        "node_id": "",
        "class_type": "",
        "input": "",
        "message": source.error,
        "suggestion": "",
    }


def _problem_line(problem: dict[str, Any]) -> str:
    place = []
    if problem["node_id"]:
        place.append(f"node {problem['node_id']}")
    if problem["class_type"]:
        place.append(f"({problem['class_type']})")
    if problem["input"]:
        place.append(problem["input"])
    where = f"{' '.join(place)}: " if place else ""
    hint = f"; {problem['suggestion']}" if problem["suggestion"] else ""
    return f"{problem['severity']}: {where}{problem['message']}{hint}"
