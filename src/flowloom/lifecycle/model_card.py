"""The card of a registered model: use, data, metrics, limits and lineage, for a reader.

Everything in it follows from the model's parts, so the same parts give the same card.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowloom.lifecycle.gate import CANDIDATE


def count_data(triplets: Path) -> dict[str, dict[str, int]]:
    """What the reward was trained and calibrated on: for each split prompts, workflows, renders."""
    from pyarrow import parquet

    paths = sorted(triplets.glob("triplets*.parquet"))
    table = parquet.read_table(paths, columns=["split", "prompt", "fingerprint"]).to_pydict()
    found: dict[str, dict[str, int]] = {}
    for split in sorted(set(table["split"])):
        rows = [i for i, name in enumerate(table["split"]) if name == split]
        found[split] = {
            "prompts": len({table["prompt"][i] for i in rows}),
            "workflows": len({table["fingerprint"][i] for i in rows}),
            "renders": len(rows),
        }
    return found


def card(
    record: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    data: Mapping[str, Mapping[str, int]],
) -> str:
    """The card as Markdown.

    Args:
        record: `config.json` of the model's folder.
        evaluation: `evaluation.json`.
        data: What `count_data` gives.
    """
    sections = (
        _use(record),
        _data(record, data),
        _metrics(evaluation),
        _limits(evaluation),
        _lineage(record),
    )
    return "\n".join(line for section in sections for line in [*section, ""])


def _use(record: Mapping[str, Any]) -> list[str]:
    lines = [
        "# flow-designer",
        "",
        "Turns a prompt into the text-to-image workflow that draws it best, from what is in",
        "`catalogue.json.gz`, with the score that its picture will probably get.",
        "",
        "- `flowloom design PROMPT --model models:/flow-designer@champion --render`",
        "- `mlflow models serve --env-manager local -m models:/flow-designer@champion`, then POST",
        '  `{"inputs": ["three red circles"], "params": {"n": 4, "seed": 0}}` to `/invocations`',
        '- `mlflow.pyfunc.load_model("models:/flow-designer@champion").predict(["a star"])`',
    ]
    if "guidance" in record:
        lines += [
            "",
            f"It was evaluated, and answers by default, with guidance {record['guidance']}.",
        ]
    return lines


def _data(record: Mapping[str, Any], data: Mapping[str, Mapping[str, int]]) -> list[str]:
    rows = [[split, *counts.values()] for split, counts in data.items()]
    return [
        "## Data",
        "",
        *_table(["rendered for the reward", "prompts", "workflows", "renders"], rows),
        "",
        f"Input folder `{record['data']}`, catalogue `{record['catalogue']}`.",
    ]


def _metrics(evaluation: Mapping[str, Any]) -> list[str]:
    policies, designs = evaluation["policies"], evaluation["designs"]
    level = f"{100 * evaluation.get('level', 0.95):g} % interval"
    scores = [[name, f"{r['mean']:.4f}", f"{r['se']:.4f}"] for name, r in sorted(policies.items())]
    paired = [
        [name.removeprefix("vs_"), f"{row['mean']:+.4f}", _interval(row), row["n"]]
        for name, row in sorted(evaluation["paired"].items())
    ]
    opponent = evaluation["opponent"]
    theirs = policies[opponent]["by_kind"]
    kinds = [
        [kind, f"{score:.4f}", f"{theirs[kind]:.4f}" if kind in theirs else "-"]
        for kind, score in sorted(policies[CANDIDATE]["by_kind"].items())
    ]
    return [
        "## Rendered score on held-out prompts",
        "",
        f"This model is `{CANDIDATE}`; the gate held it against `{opponent}`.",
        "",
        *_table(["policy", "mean", "standard error"], scores),
        "",
        *_table(["candidate against", "difference", level, "prompts"], paired),
        "",
        *_table(["kind of prompt", "mean", opponent], kinds),
        "",
        f"Of {designs['n']} designs that were not rendered {designs['valid']} are valid, "
        f"{designs['decodable']} can be read back, {100 * designs['unique_frac']:.2f} % differ.",
    ]


def _limits(evaluation: Mapping[str, Any]) -> list[str]:
    ours = evaluation["policies"][CANDIDATE]
    by_kind = ours["by_kind"]
    theirs = evaluation["policies"][evaluation["opponent"]]["by_kind"]
    lines = [
        "## Limits",
        "",
        "- It knows the nodes and files of its catalogue. A file that is new there starts as the",
        "  mean of its like, until the designer is trained again.",
        "- Scores are those of the rubric on pictures that this catalogue renders. They say",
        "  nothing of other rubrics, or of prompts unlike those of its data.",
        "- A score is predicted, its interval that of a single render. `unfamiliar` marks designs",
        "  on which the ensemble's members differ more than in calibration: a guess.",
    ]
    if by_kind:
        weakest = min(by_kind, key=lambda kind: (by_kind[kind], kind))
        lines.append(f"- Weakest on `{weakest}`: {by_kind[weakest]:.4f}.")
    worse = [kind for kind in sorted(by_kind) if by_kind[kind] < theirs.get(kind, -1.0)]
    if worse:
        named = ", ".join(f"`{kind}` ({by_kind[kind] - theirs[kind]:+.4f})" for kind in worse)
        lines.append(f"- Below {evaluation['opponent']} on {named}.")
    if "coverage" in ours:
        lines.append(
            f"- {100 * ours['coverage']:.1f} % of single renders were within their interval; "
            f"predictions were {ours['predicted_error']:+.4f} too high on average."
        )
    return lines


def _lineage(record: Mapping[str, Any]) -> list[str]:
    parts = [[name, f"`{digest}`"] for name, digest in sorted(record["made_from"].items())]
    return [
        "## Made from",
        "",
        *_table(["artifact", "digest"], parts),
        "",
        f"By flowloom {record['flowloom']}. A digest names the artifact in the store; the run that",
        "made it has it as the tag `flowloom.digest`.",
    ]


def _interval(row: Mapping[str, float]) -> str:
    return f"{row['low']:+.4f} to {row['high']:+.4f}"


def _table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [names, ["---"] * len(names), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]
