"""Strict validation of one manifest: what a cluster would refuse, or drop without a word.

Kinds of Kubernetes go by its own schemas; the trainer's by its generated models, which take unknown
fields silently, so that the round trip must be equal; other kinds by `schemas/`. A kind that is
none of these is a finding.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from kubeflow_trainer_api import models

SCHEMAS = Path(__file__).parent / "schemas"
MODELS = {
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): models.TrainerV1alpha1TrainJob,
    (
        "trainer.kubeflow.org/v1alpha1",
        "ClusterTrainingRuntime",
    ): models.TrainerV1alpha1ClusterTrainingRuntime,
}

# Each call reads and parses megabytes of JSON otherwise.
kubernetes_validate.utils.schema_contents = functools.cache(
    kubernetes_validate.utils.schema_contents
)


@functools.cache
def schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """Schemas of this project by API version and kind."""
    found = {}
    for path in sorted(SCHEMAS.glob("*.yaml")):
        schema = yaml.safe_load(path.read_text())
        fields = schema["properties"]
        found[fields["apiVersion"]["const"], fields["kind"]["const"]] = schema
    return found


def findings(document: dict[str, Any], version: str) -> list[str]:
    """What is wrong with a manifest for a cluster of this version, as `path: message` each."""
    kind = (document.get("apiVersion", ""), document.get("kind", ""))
    # Schemas of Kubernetes allow null everywhere; a cluster takes it as if the line were not there.
    found = [f"{path}: is null" for path in _nulls(document)]
    if kind in MODELS:
        # The models ask for little of a pod, so that it is checked as the job's that it will be.
        jobs = _jobs(document)
        inner = [f"{name}/{line}" for name, job in jobs for line in findings(job, version)]
        return found + _by_model(document, MODELS[kind]) + inner
    if kind in schemas():
        return found + _by_schema(document, schemas()[kind])
    return found + _by_kubernetes(document, version)


def _by_kubernetes(document: dict[str, Any], version: str) -> list[str]:
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        kind = f"{document.get('apiVersion')} {document.get('kind')}"
        return [f"kind: {kind} is unknown to Kubernetes {version} and to the schemas here"]
    except kubernetes_validate.ValidationError as error:
        return [f"{_dotted(error.absolute_path)}: {error.message}"]
    return []


def _jobs(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Jobs that a training runtime makes; a TrainJob itself has none."""
    jobs = document["spec"].get("template", {}).get("spec", {}).get("replicatedJobs", [])
    head = {"apiVersion": "batch/v1", "kind": "Job"}
    return [(job["name"], {**head, "metadata": {}, **job["template"]}) for job in jobs]


def _by_schema(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{_dotted(e.absolute_path)}: {e.message}" for e in validator.iter_errors(document)]


def _by_model(document: dict[str, Any], model: Any) -> list[str]:
    try:
        understood = model.from_dict(document).to_dict()
    except (ValueError, TypeError, AttributeError) as error:
        return [f"{model.__name__}: {' '.join(str(error).split())}"]
    return [f"{path}: is not understood" for path in _differences(document, understood, ())]


def _differences(given: Any, understood: Any, path: tuple) -> Iterator[str]:
    """Paths whose value is not what came back."""
    if isinstance(given, dict) and isinstance(understood, dict):
        for key in {**given, **understood}:
            yield from _differences(given.get(key), understood.get(key), (*path, key))
    elif isinstance(given, list) and isinstance(understood, list) and len(given) == len(understood):
        for index, (one, other) in enumerate(zip(given, understood, strict=True)):
            yield from _differences(one, other, (*path, index))
    elif given != understood:
        yield _dotted(path)


def _nulls(value: Any, path: tuple = ()) -> Iterator[str]:
    if value is None:
        yield _dotted(path)
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _nulls(item, (*path, key))


def _dotted(path: Any) -> str:
    return "/".join(map(str, path))
