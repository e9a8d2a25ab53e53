"""Scores of workflows by content: what was rendered before, for whatever table, is looked up.

Shapes: P prompts, S seeds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flowloom.evaluation.frame import Choice
from flowloom.evaluation.rendering import JudgedJob, render_and_score
from flowloom.runs import Run
from flowloom.workflow import Catalogue


class ScoreBook:
    """Renders a (workflow, prompt, seed) once, on several processes, and keeps its score in files.

    A killed process goes on where it stopped, and later calls with other workflows find those that
    they share with earlier ones.
    """

    def __init__(
        self,
        run: Run,
        catalogue_dir: Path,
        *,
        rubric: str = "shapes",
        chunk_size: int = 128,
        num_processes: int = 2,
    ):
        """Read what is known.

        Args:
            run: Its `work` folder keeps the scores.
            catalogue_dir: Folder of `publish_generator`.
            rubric: How pictures are scored.
            chunk_size: Renders per chunk, the unit of resuming.
            num_processes: Processes that render.
        """
        catalogue = Catalogue.load(catalogue_dir / "catalogue.json.gz")
        self._run, self._catalogue_dir, self._rubric = run, catalogue_dir, rubric
        self._chunk_size, self._num_processes = chunk_size, num_processes
        self._prefix = f"scores-{rubric}-{catalogue.hash[:12]}"
        self._known: dict[str, float] = {}
        self._wanted: dict[str, JudgedJob] = {}
        for path in sorted(run.work.glob(f"{self._prefix}-*.json")):
            self._take(json.loads(path.read_text()))

    @property
    def num_wanted(self) -> int:
        """Renders that the next call of `scores` will do at least."""
        return len(self._wanted)

    def want(self, choices_P: Sequence[Choice], prompts: Sequence[str], seeds_PS: np.ndarray):
        """Note renders for later, so that many go to the workers at once."""
        for choice, prompt, seeds in zip(choices_P, prompts, seeds_PS, strict=True):
            for seed in seeds.tolist():
                name = _name(choice, prompt, seed)
                if name not in self._known and name not in self._wanted:
                    filled = choice.workflow.fill(prompt, seed=seed)
                    self._wanted[name] = JudgedJob(filled, name, prompt, False)

    def scores(
        self, choices_P: Sequence[Choice], prompts: Sequence[str], seeds_PS: np.ndarray
    ) -> np.ndarray:
        """Scores `[P, S]`; renders what is missing, and what was wanted before.

        Raises:
            FloatingPointError: If a picture or a score is not finite; names the jobs.
        """
        self.want(choices_P, prompts, seeds_PS)
        if any(
            _name(choice, prompt, seed) in self._wanted
            for choice, prompt, seeds in zip(choices_P, prompts, seeds_PS, strict=True)
            for seed in seeds.tolist()
        ):
            self._render()
        return np.array(
            [
                [self._known[_name(choice, prompt, seed)] for seed in seeds.tolist()]
                for choice, prompt, seeds in zip(choices_P, prompts, seeds_PS, strict=True)
            ]
        ).reshape(seeds_PS.shape)

    def _render(self) -> None:
        names = hashlib.sha256("\n".join(sorted(self._wanted)).encode()).hexdigest()
        self._take(
            render_and_score(
                list(self._wanted.values()),
                self._run,
                f"{self._prefix}-{names[:12]}",
                catalogue_dir=self._catalogue_dir,
                rubric=self._rubric,
                chunk_size=self._chunk_size,
                num_processes=self._num_processes,
            )
        )
        self._wanted.clear()

    def _take(self, rows: dict[str, dict[str, float]]) -> None:
        self._known.update((name, row["score"]) for name, row in rows.items())


def _name(choice: Choice, prompt: str, seed: int) -> str:
    """Renders that share a prompt and a seed lie together: they may share sampler runs."""
    text = hashlib.sha256(prompt.encode()).hexdigest()
    return f"{text[:12]}-{seed}-{choice.fingerprint[:20]}"
