"""`design --explain`: how a design differs from workflows that a person knows, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flowloom.evaluation.diversity import facts
from flowloom.workflow import Catalogue, Workflow, differences

MAX_LINES = 12
"""Differences that are printed; `--json` has them all."""


class Explainer:
    """Compares designs with the workflows that a model stores."""

    def __init__(self, policies: Mapping[str, Any], catalogue: Catalogue):
        """Take what a model stores.

        Args:
            policies: As `Designer.policies`.
            catalogue: What is installed.
        """
        self._catalogue = catalogue
        plain = policies.get("best_fixed")
        self._plain = None if plain is None else Workflow.from_api(plain)
        known = policies.get("retrieval", {"prompts": [], "workflows": []})
        self._known: dict[str, tuple[Workflow, str]] = {}
        for prompt, api in zip(known["prompts"], known["workflows"], strict=True):
            workflow = Workflow.from_api(api)
            self._known.setdefault(workflow.template_fingerprint(), (workflow, prompt))
        self._facts = {name: set(facts(flow)) for name, (flow, _) in self._known.items()}

    def explain(self, workflow: Workflow) -> dict[str, Any]:
        """What differs.

        Args:
            workflow: A template.

        Returns:
            `best_fixed`, a list of differences, None where the model stores none; `nearest`, None
            likewise, or `prompt` (it did best there), `similarity` in [0, 1], `differences`.
        """
        return {"best_fixed": self._from_plain(workflow), "nearest": self._from_nearest(workflow)}

    def _from_plain(self, workflow: Workflow) -> list[str] | None:
        if self._plain is None:
            return None
        return differences(self._plain, workflow, self._catalogue)

    def _from_nearest(self, workflow: Workflow) -> dict[str, Any] | None:
        """The known workflow that shares most facts (Dice's coefficient); ties go to the first."""
        if not self._known:
            return None
        own = set(facts(workflow))
        shared = {
            name: 2 * len(own & other) / (len(own) + len(other))
            for name, other in self._facts.items()
        }
        name = max(shared, key=shared.__getitem__)
        nearest, prompt = self._known[name]
        return {
            "prompt": prompt,
            "similarity": round(shared[name], 4),
            "differences": differences(nearest, workflow, self._catalogue),
        }


def lines(explanation: Mapping[str, Any]) -> Iterator[str]:
    """An explanation as a person reads it."""
    if explanation["best_fixed"] is not None:
        yield from _listed("the best fixed workflow", explanation["best_fixed"])
    nearest = explanation["nearest"]
    if nearest is not None:
        what = f"the nearest known workflow, best on {nearest['prompt']!r}"
        yield from _listed(what, nearest["differences"])
    if explanation["best_fixed"] is None and nearest is None:
        yield "  the model stores no workflow to compare with"


def _listed(what: str, changes: Sequence[str]) -> Iterator[str]:
    if not changes:
        yield f"  is {what}"
        return
    yield f"  from {what}:"
    for change in changes[:MAX_LINES]:
        yield f"    {change}"
    if len(changes) > MAX_LINES:
        yield f"    and {len(changes) - MAX_LINES} more"
