"""A workflow file that is valid in the embedded catalogue, and a way to run the command."""

import json

import pytest

from flowloom.cli import main

WORKFLOW = {
    "1": {
        "class_type": "CheckpointLoaderSimple",
        "inputs": {"ckpt_name": "shapes-base.safetensors"},
    },
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a star", "clip": ["1", 1]}},
    "3": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["2", 0]}},
    "4": {
        "class_type": "EmptyLatentImage",
        "inputs": {"width": 32, "height": 32, "batch_size": 1},
    },
    "5": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["1", 0],
            "seed": 3,
            "steps": 8,
            "cfg": 2.5,
            "sampler_name": "euler",
            "scheduler": "simple",
            "positive": ["2", 0],
            "negative": ["3", 0],
            "latent_image": ["4", 0],
            "denoise": 1.0,
        },
    },
    "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
    "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "x"}},
}


@pytest.fixture
def workflow():
    return json.loads(json.dumps(WORKFLOW))


@pytest.fixture
def good(tmp_path, workflow):
    path = tmp_path / "good.json"
    path.write_text(json.dumps(workflow))
    return path


@pytest.fixture
def bad(tmp_path, workflow):
    workflow["5"]["inputs"]["cfg"] = "high"
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(workflow))
    return path


@pytest.fixture
def run(capsys):
    """Run a command line; gives the exit status, standard output and standard error."""

    def command(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse ends this way
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


@pytest.fixture
def run_json(run):
    """Run with `--json`; gives the exit status and the one object on standard output."""

    def command(*arguments):
        status, out, _ = run(*arguments, "--json")
        assert len(out.splitlines()) == 1
        return status, json.loads(out)

    return command
