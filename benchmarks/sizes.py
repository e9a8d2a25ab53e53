"""What a retraining of so many renders takes: arithmetic, nothing is rendered.

Every figure is an argument, so that yours can stand in its place. Measured, in the embedded world
alone, are `--stage-frac`, `--row-bytes` and `--database-rows` (docs/log.md); the rest is assumed.

    python -m benchmarks.sizes [--renders N ...] [--seconds-per-render S] [--price P] [--json]

Equations, for N renders:

    GPU hours  = N * (seconds per render + seconds per score) / stage frac / 3600
    GPUs       = ceil(GPU hours / window hours), at least 1
    nodes      = ceil(GPUs / GPUs per node)
    hours      = GPU hours / GPUs
    renders/s  = N / (3600 * hours)
    cost       = (GPU hours + training GPU hours) * price
    rows MB    = N * row bytes / 10^6
    pictures GB = N * picture MB / 10^3
"""

import argparse
import dataclasses
import json
import math
import sys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the sizes follow from."""

    seconds_per_render: float = 5.0
    """GPU seconds of one picture. Assumed: 1024 x 1024 pixels, some 28 steps with guidance."""
    seconds_per_score: float = 0.5
    """GPU seconds to score one picture by preference models. Assumed."""
    stage_frac: float = 0.83
    """Renders per second of `build_triplets` over those of bare sampling. Measured on a CPU."""
    window_hours: float = 12.0
    """Hours in which the rendering of a retraining should end."""
    gpus_per_node: int = 4
    """GPUs of a node of the rendering pool."""
    training_gpu_hours: float = 16.0
    """GPU hours of all training of a turn. Assumed; steps are set by the recipe, not by renders."""
    price: float = 1.0
    """Of one GPU hour, in any currency."""
    row_bytes: float = 85.0
    """Bytes of a render in the triplets' Parquet. Measured: 69 to 90, with embedded workflows."""
    picture_mb: float = 1.5
    """MB of one PNG. Assumed; no stage keeps the pictures that it scores."""
    database_rows: int = 4626
    """Rows that a turn adds to MLflow's database: one of `demo`. They grow with logged steps."""


def sizes(renders: int, given: Assumptions) -> dict[str, float]:
    """The columns of the table for one number of renders."""
    per_render_s = (given.seconds_per_render + given.seconds_per_score) / given.stage_frac
    gpu_hours = renders * per_render_s / 3600
    gpus = max(1, math.ceil(gpu_hours / given.window_hours))
    hours = gpu_hours / gpus
    return {
        "renders": renders,
        "GPU hours": gpu_hours,
        "GPUs": gpus,
        "nodes": math.ceil(gpus / given.gpus_per_node),
        "hours": hours,
        "renders/s": renders / (3600 * hours),
        "cost": (gpu_hours + given.training_gpu_hours) * given.price,
        "rows MB": renders * given.row_bytes / 1e6,
        "pictures GB": renders * given.picture_mb / 1e3,
        "database rows": given.database_rows,
    }


def table(rows: list[dict[str, float]]) -> str:
    """A Markdown table: whole numbers as they are, others with one digit."""
    lines = [list(rows[0]), ["---:"] * len(rows[0])]
    for row in rows:
        lines.append([f"{v:,}" if isinstance(v, int) else f"{v:,.1f}" for v in row.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments=None):
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--renders", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    for field in dataclasses.fields(Assumptions):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default)
    parser.add_argument("--quick", action="store_true", help="changes nothing: it takes no time")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Assumptions)}
    for name, value in [*fields.items(), *(("renders", n) for n in options.renders)]:
        positive = name not in ("price", "seconds_per_score", "training_gpu_hours")
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            low = "above 0" if positive else "of at least 0"
            parser.error(f"--{name.replace('_', '-')}: got {value}, expected a number {low}")
    rows = [sizes(renders, Assumptions(**fields)) for renders in options.renders]
    print(table(rows))
    if options.json:
        print(json.dumps({"assumptions": fields, "sizes": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
