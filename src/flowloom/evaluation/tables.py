"""The tables of the guidance benchmark, as markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RIVALS = ("best_fixed", "retrieval", "conditioned_one", "conditioned", "sft_one", "sft")
"""Whom a designer must beat."""


def show_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a markdown table with columns of even width."""
    widths = [max(len(row[k]) for row in (titles, *rows)) for k in range(len(titles))]
    lines = [titles, ["-" * width for width in widths], *rows]
    for line in lines:
        cells = [
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("| " + " | ".join(cells) + " |")
    print()


def interval(row: Mapping[str, float]) -> str:
    """`+.083 [+.051, +.114]`."""
    return f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def show_set(result: Mapping[str, Any], claim: str) -> None:
    """Print the tables of one set of artifacts."""
    policies = result["policies"]
    order = sorted(policies, key=lambda name: -policies[name]["mean"])
    print(f"\n### A, E. {result['prompts']} prompts x {result['seeds']} seeds; lead of {claim}\n")
    titles = ["policy", "score", "se", "lead", "predicted", "error", "|error|", "in 90 %"]
    rows = []
    for name in order:
        row = policies[name]
        figures = [f"{row[key]:.3f}" for key in ("mean", "se")]
        lead = "" if name == claim else interval(row["lead"])
        errors = [f"{row['predicted']:.3f}", f"{row['predicted_error']:+.3f}"]
        last = [f"{row['predicted_abs_error']:.3f}", f"{100 * row['coverage']:.1f}"]
        rows.append([name, *figures, lead, *errors, *last])
    show_table(titles, rows)

    print(f"Distinct workflows; similarity to the nearest of {result['known']} rendered ones\n")
    titles = ["policy", "designs", "distinct", "collapsed", "similarity", "tokens"]
    show_table(
        titles,
        [
            [
                name,
                *(str(policies[name][key]) for key in ("n", "raw", "collapsed")),
                f"{policies[name]['similarity']:.4f}",
                f"{policies[name]['num_tokens']:.1f}",
            ]
            for name in order
        ],
    )

    kinds = list(policies[claim]["by_kind"])
    print("By kind\n")
    rows = [[name, *(f"{policies[name]['by_kind'][k]:.3f}" for k in kinds)] for name in order]
    show_table(["policy", *kinds], rows)
    print(f"Lead of {claim} by kind\n")
    rivals = [name for name in RIVALS if name in policies]
    leads = [
        [name, *(interval(policies[name]["lead_by_kind"][k]) for k in kinds)] for name in rivals
    ]
    show_table(["policy", *kinds], leads)

    gap = result["gap"]
    print(
        f"### B. {gap['prompts']} prompts x {gap['seeds_per_half']} seeds per half, "
        f"{gap['candidates']:.0f} candidates\n\nbest fixed {gap['best_fixed']:.3f}, "
        f"oracle {gap['oracle']:.3f}, gap {interval(gap['gain'])}\n"
    )
    rows = []
    for name in sorted(gap["policies"], key=lambda name: -gap["policies"][name]["mean"]):
        row = gap["policies"][name]
        share = ""
        if "share" in row:
            share = f"{row['share']:+.0%} [{row['low']:+.0%}, {row['high']:+.0%}]"
        rows.append([name, f"{row['mean']:.3f}", share])
    show_table(["policy", "score", "share of the gap"], rows)

    print("### C. Sweeps, one sample per prompt\n")
    show_table(
        ["setting", "predicted", "score", "se", "designs", "distinct", "collapsed"],
        [
            [
                row["name"],
                *(f"{row[key]:.3f}" for key in ("predicted", "score", "se")),
                *(str(row[key]) for key in ("n", "raw", "collapsed")),
            ]
            for row in result["sweep"]
        ],
    )

    print("### D. Designs at temperature 1\n")
    rows = [
        [
            weight,
            *(str(row[key]) for key in ("n", "valid", "decodable")),
            f"{row['unique_frac']:.3f}",
        ]
        for weight, row in result["checked"].items()
    ]
    show_table(["w", "designs", "valid", "decodable", "distinct share"], rows)
    print(f"{result['rendered']} of them rendered to an image\n")


def show_sets(results: Sequence[Mapping[str, Any]], claim: str) -> None:
    """Print what all sets say of the claim, one line each."""
    print(f"## All sets: {claim}\n")
    rivals = [name for name in RIVALS if all(name in result["policies"] for result in results)]
    rows = []
    for number, result in enumerate(results):
        policies, gap = result["policies"], result["gap"]["policies"][claim]
        ours = policies[claim]
        share = f"{gap['share']:+.0%}" if "share" in gap else ""
        lows = [f"{policies[name]['lead']['low']:+.3f}" for name in rivals]
        counts = [str(ours["raw"]), str(ours["collapsed"])]
        covered = f"{100 * ours['coverage']:.1f}"
        rows.append([str(number), f"{ours['mean']:.3f}", *lows, share, *counts, covered])
    lows = [f"low vs {name}" for name in rivals]
    show_table(["set", "score", *lows, "gap closed", "distinct", "collapsed", "in 90 %"], rows)
