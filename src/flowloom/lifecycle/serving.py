"""The registered model behind MLflow's door: prompts in, workflows with scores and intervals out.

MLflow runs this file from the registered version (models from code). It needs no more than
flowloom's designer, torch and MLflow itself, and writes nothing. Besides this file a version holds
the model's folder, which `flowloom design` reads too.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class FlowDesigner(PythonModel):
    """Designs workflows for prompts."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model's folder."""
        from flowloom.designer.design import Designer

        self._designer = Designer.load(context.artifacts["model"])

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Design workflows.

        Args:
            context: Unused: `load_context` read it.
            model_input: One column of prompts.
            params: `n` designs per prompt, `guidance` (0 fine-tuned only, 1 tuned, above 1
                extrapolated), `seed` of the samples and of the workflows.

        Returns:
            For each prompt {"prompt", "designs"}, best predicted score first. A design has
            `workflow` (ComfyUI's API format, prompt and seed filled in), `score` (predicted, of a
            single render, in rubric units), `interval` (where that render's score will lie),
            `unfamiliar` (whether the score is no more than a guess), `fingerprint`.

        Raises:
            MlflowException: If a prompt or parameter is out of bounds; a server answers 400.
        """
        from flowloom.dataset.prompt_files import check_prompt

        given = dict(params or {})
        seed = int(given.get("seed", 0))
        try:
            given_prompts = enumerate(model_input.iloc[:, 0].tolist(), start=1)
            prompts = [
                check_prompt(str(text), f"prompt {number}") for number, text in given_prompts
            ]
            found = self._designer.design(prompts, **given)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return [
            {"prompt": prompt, "designs": [_record(design, prompt, seed) for design in designs]}
            for prompt, designs in zip(prompts, found, strict=True)
        ]


def _record(design: Any, prompt: str, seed: int) -> dict[str, Any]:
    return {
        "workflow": design.workflow.fill(prompt, seed=seed).to_api(),
        "score": design.score,
        "interval": list(design.interval),
        "unfamiliar": design.unfamiliar,
        "fingerprint": design.fingerprint,
    }


set_model(FlowDesigner())
