"""The best workflow of each prompt, and the best one for all, by rendering: luck does not count.

Seeds are in two halves. On the first one workflows race: all are rendered with a few seeds, the
better ones with more, and the winner is the best over the whole half (successive halving; Jamieson
and Talwalkar, arXiv 1502.07943). On the second half winners are scored. So what a winner owes to
the noise of its choice is not in its score, and few renders are spent on bad workflows. A race may
miss a workflow that is slightly better than its winner, never overrate one.

Shapes: P prompts, S seeds, N (prompt, workflow) pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from flowloom.evaluation.frame import Choice

T = TypeVar("T")
Scores = Callable[[Sequence[tuple[int, T]], int, int], np.ndarray]
"""(pairs of prompt and candidate, first seed, end) to scores `[N, end - first]`."""
Rounds = Sequence[tuple[int, int]]
"""Seeds that a candidate has seen after a round, and how many go on."""


def race(candidates_P: Sequence[Sequence[T]], scores: Scores[T], rounds: Rounds) -> list[T]:
    """Each prompt's winner.

    Args:
        candidates_P: Candidates of each prompt, at least one.
        scores: Renders.
        rounds: The last one keeps 1.
    """
    alive = [list(candidates) for candidates in candidates_P]
    sums = [[0.0] * len(candidates) for candidates in alive]
    seen = 0
    for num_seeds, num_kept in rounds:
        pairs = [(p, candidate) for p, of_prompt in enumerate(alive) for candidate in of_prompt]
        new_N = scores(pairs, seen, num_seeds).sum(axis=1).tolist()
        first = 0
        for p, of_prompt in enumerate(alive):
            added = new_N[first : first + len(of_prompt)]
            first += len(of_prompt)
            total = [a + b for a, b in zip(sums[p], added, strict=True)]
            # Ties go to the earlier candidate.
            best = sorted(range(len(total)), key=lambda k: -total[k])[:num_kept]
            alive[p] = [of_prompt[k] for k in best]
            sums[p] = [total[k] for k in best]
        seen = num_seeds
    return [of_prompt[0] for of_prompt in alive]


def race_for_all(candidates: Sequence[T], num_prompts: int, scores: Scores[T], rounds: Rounds) -> T:
    """The candidate with the best mean over all prompts."""

    def over_prompts(pairs: Sequence[tuple[int, T]], first: int, end: int) -> np.ndarray:
        each = [(p, candidate) for _, candidate in pairs for p in range(num_prompts)]
        rows = scores(each, first, end)
        return rows.reshape(len(pairs), num_prompts, end - first).mean(axis=1)

    return race([candidates], over_prompts, rounds)[0]


def frequent_by_kind(
    designs: Mapping[str, Sequence[Choice]], kinds: Sequence[str], number: int
) -> dict[str, list[Choice]]:
    """The workflows that policies design most often for each kind of prompt."""
    found: dict[str, list[Choice]] = {}
    for kind in dict.fromkeys(kinds):
        of_kind = [
            choices[p] for choices in designs.values() for p, k in enumerate(kinds) if k == kind
        ]
        by_name = {choice.fingerprint: choice for choice in of_kind}
        counts = Counter(choice.fingerprint for choice in of_kind)
        order = sorted(by_name, key=lambda name: (-counts[name], name))
        found[kind] = [by_name[name] for name in order[:number]]
    return found
