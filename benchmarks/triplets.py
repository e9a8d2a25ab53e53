"""How fast `build_triplets` is beside bare rendering, and whether anything loses a row.

    python -m benchmarks.triplets [--models DIR] [--kills N] [--machines N] [--quick] [--json]

rate     the stage on 2 processes, from its begin to its artifact (workers started, planned,
         rendered, scored, written), beside the sampler runs of the same pictures in the same
         batches on 2 processes that have everything loaded and texts encoded; run in turn. Wall
         seconds, and CPU seconds of all processes, imports left out, which other load matters
         little to
kills    the same command ended by SIGKILL at random moments and started again, until it ends
machines parts rendered by processes with homes of their own, then joined in another

Everything runs through the command `flowloom run build_triplets`, each with a home of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from flowloom.config import parse_assignments
from flowloom.dataset.config import BuildPairsConfig
from flowloom.dataset.pairs import build_pairs
from flowloom.recipes import stage_config
from flowloom.render.model_records import save_catalogue
from flowloom.render.models import ModelStore
from flowloom.runs import Run

NUM_PROCESSES = 2
ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 25)}
"""As render workers have it, for the bare processes too."""
SCALES = {"full": 480, "quick": 48}
"""Train prompts: about 5,000 renders, and 500."""


class Bench:
    """Folders and commands of one benchmark."""

    def __init__(self, folder: Path, models: Path | None, num_prompts: int):
        """Make the inputs: a catalogue with its models, and pairs."""
        self.folder = folder
        self.catalogue = folder / "catalogue"
        store = ModelStore.open(models)
        for file in store.catalogue.files:
            target = self.catalogue / "models" / file.folder / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(store.path(file.folder, file.name), target)
        save_catalogue(self.catalogue / "catalogue.json.gz", store.catalogue)
        share = num_prompts / SCALES["full"]
        self.changes = {
            "mode": "plain",
            "random_cells": 7,
            "wild_cells": 1,
            "calibration_cells": 2,
            "panel.num_prompts": [max(round(12 * share), 2)],
            "panel.num_kept": [],
            "prompts.num_train": num_prompts,
            "prompts.num_calibration": round(80 * share),
            "prompts.num_test": round(320 * share),
        }
        assignments = [f"{name}={json.dumps(value)}" for name, value in self.changes.items()]
        changes = parse_assignments(assignments)
        self.config = stage_config("demo", "build_triplets", changes)
        run = Run("build_pairs", folder / "pairs")
        run.begin()
        pairs = BuildPairsConfig(prompts=self.config.prompts, num_pairs=round(4400 * share))
        build_pairs(pairs, run, catalogue=self.catalogue)
        self.pairs = run.out

    def command(self, *more: str) -> list[str]:
        """The command that builds the dataset."""
        words = [sys.executable, "-m", "flowloom", "run", "build_triplets", "--json"]
        words += ["--input", f"catalogue={self.catalogue}", "--input", f"pairs={self.pairs}"]
        for name, value in self.changes.items():
            words += ["--set", f"{name}={json.dumps(value)}"]
        return [*words, *more]

    def start(self, home: str, *more: str) -> subprocess.Popen:
        """Start a build."""
        path = self.folder / home
        path.mkdir(exist_ok=True)
        # Sources that change under a run would make another run of it.
        environment = {**os.environ, "FLOWLOOM_HOME": str(path), "FLOWLOOM_CODE_DIGEST": "bench"}
        with (path / "log").open("a") as log:
            return subprocess.Popen(
                self.command(*more), env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def build(self, home: str, *more: str) -> dict[str, Any]:
        """Build to the end; the command's answer, with seconds."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = self.start(home, *more)
        answer, _ = process.communicate()
        if process.returncode:
            raise SystemExit((self.folder / home / "log").read_text())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        record = json.loads(answer)
        timing = json.loads((Path(record["out"]).parent / "timing.json").read_text())
        record["wall_s"] = timing["seconds"]
        record["cpu_s"] = sum(after[:2]) - sum(before[:2])
        return record


def replay(catalogue: Path, jobs: list[list[Any]], pipe: Any) -> None:
    """Render shards, keeping the sampler runs, then run these alone each time it is asked."""
    import torch

    from flowloom.render import batch
    from flowloom.render.engine import Engine

    torch.set_num_threads(1)
    engine, calls, run = Engine(ModelStore.open(catalogue)), [], batch.run

    def keep(model: Any, tasks: Any) -> Any:
        calls.append((model, list(tasks)))
        return run(model, tasks)

    batch.run = keep
    for shard in jobs:
        engine.render(shard)
    pipe.send(sum(len(tasks) for _, tasks in calls))
    while pipe.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            for model, tasks in calls:
                run(model, tasks)
        pipe.send((time.perf_counter() - wall, time.process_time() - cpu))


def import_cpu_s() -> float:
    """CPU seconds that a process needs before it starts to work: interpreter and imports."""
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    code = "import flowloom.dataset.triplets, flowloom.render.worker"
    subprocess.run([sys.executable, "-c", code], check=True)
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before


def measure_rate(bench: Bench, repeats: int) -> dict[str, Any]:
    """Stage and bare sampler runs in turn; medians over the turns."""
    from flowloom.dataset.plan import Plan
    from flowloom.dataset.shards import Round
    from flowloom.dataset.triplets import read_templates
    from flowloom.workflow import Catalogue

    facts = Catalogue.load(bench.catalogue / "catalogue.json.gz")
    config = bench.config
    plan = Plan(config, facts, read_templates(bench.pairs, facts, config.random_cells))
    round_ = Round(0, plan.cells(0, []), config.shard_size, "")
    jobs = [round_.jobs(shard) for shard in round_.shards]
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for k in range(NUM_PROCESSES):
        ours, theirs = context.Pipe()
        share = jobs[k::NUM_PROCESSES]
        worker = context.Process(target=replay, args=(bench.catalogue, share, theirs), daemon=True)
        worker.start()
        pipes.append(ours)
        workers.append(worker)
    runs = sum(pipe.recv() for pipe in pipes)
    rows, imports = [], import_cpu_s() * (NUM_PROCESSES + 1)
    for number in range(repeats):
        for pipe in pipes:
            pipe.send(True)
        bare = np.array([pipe.recv() for pipe in pipes])
        ours = bench.build(f"rate-{number}")
        # Perfectly balanced: half of both processes' seconds each.
        rows.append(
            {
                "bare_wall_s": float(bare[:, 0].mean()),
                "bare_cpu_s": float(bare[:, 1].sum()),
                "stage_wall_s": ours["wall_s"],
                "stage_cpu_s": ours["cpu_s"] - imports,
            }
        )
        print("  ".join(f"{name} {value:.2f}" for name, value in rows[-1].items()), flush=True)
    for pipe in pipes:
        pipe.send(False)
    for worker in workers:
        worker.join()
    renders = int(ours["metrics"]["triplets/renders"])
    ratios = {
        kind: [row[f"bare_{kind}_s"] / row[f"stage_{kind}_s"] for row in rows]
        for kind in ("wall", "cpu")
    }
    return {
        "renders": renders,
        "sampler_runs": runs,
        "bare_renders_per_s": renders / statistics.median(row["bare_wall_s"] for row in rows),
        "stage_renders_per_s": renders / statistics.median(row["stage_wall_s"] for row in rows),
        "ratio_wall": statistics.median(ratios["wall"]),
        "ratio_cpu": statistics.median(ratios["cpu"]),
        "ratios": {kind: [round(value, 3) for value in found] for kind, found in ratios.items()},
        "digest": ours["digest"],
        "bytes": sum(f.stat().st_size for f in Path(ours["out"]).iterdir()),
    }


def measure_kills(bench: Bench, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill a build at random moments, then let it end."""
    rng, moments, ended = random.Random(seed), [], False
    whole = bench.build("uninterrupted")
    total = whole["metrics"]["triplets/renders"] // bench.config.shard_size
    for k in range(kills):
        process, began = bench.start("kills"), time.perf_counter()
        early = rng.random() < 0.25
        until = rng.uniform(0.0, 4.0)
        while process.poll() is None:
            done = len(list((bench.folder / "kills").glob("runs/build_triplets/*/work/round-*.p*")))
            # A quarter of them while it starts or plans, the others ever further on.
            if early or done >= total * k / (kills + 1):
                time.sleep(until if early else rng.uniform(0.0, 1.0))
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        ended = process.wait() != -signal.SIGKILL
        moments.append(round(time.perf_counter() - began, 2))
        print(f"kill {k + 1}: after {moments[-1]} s{', it had ended' * ended}", flush=True)
        if ended:
            break
    log = bench.folder / "kills" / "log"
    return {
        "kills": len(moments) - ended,
        "digest": bench.build("kills")["digest"],
        "uninterrupted_digest": whole["digest"],
        "damaged_shards": log.read_text().count("is damaged"),
    }


def measure_machines(bench: Bench, machines: int) -> dict[str, Any]:
    """Build parts in homes of their own and join them in another."""
    one = ("--set", "num_processes=1")
    running = [
        bench.start(f"machine-{k}", *one, "--set", f"part={k}/{machines}") for k in range(machines)
    ]
    answers = [json.loads(process.communicate()[0]) for process in running]
    parts = [word for answer in answers for word in ("--input", f"parts={answer['out']}")]
    joined = bench.build("joined", *one, *parts)
    shards = [int(answer["metrics"]["triplets/shards"]) for answer in answers]
    return {"machines": machines, "shards": shards, "digest": joined["digest"]}


def main() -> None:
    """Print figures; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", type=Path, help="folder with a catalogue; default: data/")
    parser.add_argument("--repeats", type=int, default=3, help="of the rate; 0 leaves it out")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--machines", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="a tenth of the renders")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.kills = min(options.repeats, 1), min(options.kills, 2)
    os.environ.update(ALLOCATION)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scale = SCALES["quick" if options.quick else "full"]
        bench = Bench(Path(folder), options.models, scale)
        if options.repeats:
            result["rate"] = measure_rate(bench, options.repeats)
        if options.kills:
            result["kills"] = measure_kills(bench, options.kills)
        if options.machines:
            result["machines"] = measure_machines(bench, options.machines)
    for name, figures in result.items():
        for key, value in figures.items():
            print(f"{name:9} {key:20} {value if not isinstance(value, float) else round(value, 3)}")
    found = [(name, value) for figures in result.values() for name, value in figures.items()]
    digests = {value for name, value in found if name.endswith("digest")}
    print("equal digests" if len(digests) == 1 else f"DIGESTS DIFFER: {digests}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
