"""`encode`: workflows as tokens, and whether decoding gives the same workflow."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

from flowloom.cli import NO, OK, USAGE, one_line
from flowloom.cli.catalogues import open_catalogue
from flowloom.cli.output import Lines, print_json, progress
from flowloom.cli.sources import Inputs, Source, report_unreadable
from flowloom.workflow import Codec, Vocabulary
from flowloom.workflow import vocabulary as voc
from flowloom.workflow.steps import NUMERALS


def encode(parsed: Namespace) -> int:
    """Write workflows as tokens and read them back; status 1 where that loses something."""
    catalogue = open_catalogue(parsed.catalogue, parsed.header)
    vocabulary = Vocabulary.build(catalogue)
    codec, inputs = Codec(catalogue, vocabulary), Inputs(parsed.paths)
    results, lengths, lines = [], [], Lines()
    num_checked = num_exact = num_unreadable = 0
    for source in progress(
        inputs, "encoding", inputs.size, inputs.position, prints=not parsed.json
    ):
        row: dict[str, Any] = {"path": source.path, "tokens": None, "round_trip": False}
        row["error"] = source.error
        if report_unreadable("encode", source):
            num_unreadable += 1
        else:
            row.update(_round_trip(source, codec))
            num_checked += 1
            num_exact += row["round_trip"]
            if row["tokens"] is not None:
                lengths.append(len(row["tokens"]))
            if not parsed.json:
                _print_row(lines, row, vocabulary)
        if parsed.json:
            results.append(row)
    if parsed.json:
        print_json({"results": results, "vocabulary": vocabulary.size})
    else:
        if len(lengths) > 1:
            lengths.sort()
            median, most = lengths[len(lengths) // 2], lengths[-1]
            print(f"tokens: median {median}, mean {sum(lengths) / len(lengths):.1f}, most {most}")
        if num_checked:
            print(f"{num_exact} of {num_checked} exact; vocabulary: {vocabulary.size} tokens")
    if num_unreadable:
        return USAGE
    return OK if num_exact == num_checked else NO


def _round_trip(source: Source, codec: Codec) -> dict[str, Any]:
    outputs = codec.catalogue.output_classes
    try:
        workflow = source.workflow(codec.catalogue)
        encoded = codec.encode(workflow)
        decoded = codec.decode(encoded.tokens, encoded.texts, encoded.seeds)
        same = decoded.fingerprint(outputs) == workflow.fingerprint(outputs)
    except ValueError as error:  # those of the codec, the canvas and the graph are
        return {"error": one_line(error)}
    error = None if same else "decoding gives another workflow"
    tokens = [int(token) for token in encoded.tokens]
    return {"tokens": tokens, "round_trip": same, "error": error}


def _print_row(lines: Lines, row: dict[str, Any], vocabulary: Vocabulary) -> None:
    place = (row["path"], "bold")
    if row["tokens"] is None:
        lines.print(place, ": ", (f"no tokens: {row['error']}", "bold red"))
        return
    verdict = ("exact", "green") if row["round_trip"] else ("NOT the same when decoded", "bold red")
    lines.print(place, f": {len(row['tokens'])} tokens, ", verdict)
    lines.print("  ", " ".join(token_words(vocabulary, row["tokens"])))


def token_words(vocabulary: Vocabulary, tokens: Sequence[int]) -> Iterator[str]:
    """Tokens as a person reads them; what is spelled out is one word: `<esc "x.safetensors">`."""
    rest = iter(tokens)
    for token in rest:
        if token not in (voc.ESCAPE, voc.NUMBER):
            yield vocabulary.token_text(token)
            continue
        spelled = [t - voc.SPELL0 for t in itertools.takewhile(lambda t, end=token: t != end, rest)]
        if token == voc.NUMBER:
            yield f"<num {''.join(NUMERALS[k] for k in spelled)}>"
        else:
            yield f"<esc {bytes.fromhex(''.join(f'{k:x}' for k in spelled)).decode()}>"
