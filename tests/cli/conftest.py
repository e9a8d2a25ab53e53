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


# The same as a person saves it: (id, class, inputs, outputs, literals), links by number.
_NODES = [
    (1, "CheckpointLoaderSimple", {}, [[1], [2], [3]], ["shapes-base.safetensors"]),
    (2, "CLIPTextEncode", {"clip": 2}, [[4, 5]], ["a star"]),
    (3, "ConditioningZeroOut", {"conditioning": 5}, [[6]], []),
    (4, "EmptyLatentImage", {}, [[7]], [32, 32, 1]),
    (
        5,
        "KSampler",
        {"model": 1, "positive": 4, "negative": 6, "latent_image": 7},
        [[8]],
        [3, "fixed", 8, 2.5, "euler", "simple", 1.0],
    ),
    (6, "VAEDecode", {"samples": 8, "vae": 3}, [[9]], []),
    (7, "SaveImage", {"images": 9}, [], ["x"]),
]
_LINKS = [
    [1, 1, 0, 5, 0, "MODEL"],
    [2, 1, 1, 2, 0, "CLIP"],
    [3, 1, 2, 6, 1, "VAE"],
    [4, 2, 0, 5, 1, "CONDITIONING"],
    [5, 2, 0, 3, 0, "CONDITIONING"],
    [6, 3, 0, 5, 2, "CONDITIONING"],
    [7, 4, 0, 5, 3, "LATENT"],
    [8, 5, 0, 6, 0, "LATENT"],
    [9, 6, 0, 7, 0, "IMAGE"],
]


@pytest.fixture
def editor_file():
    """`WORKFLOW` in the editor's format, written by hand."""
    types = {link[0]: link[5] for link in _LINKS}
    nodes = [
        {
            "id": node_id,
            "type": class_type,
            "pos": [300 * node_id, 0],
            "mode": 0,
            "inputs": [{"name": n, "type": types[k], "link": k} for n, k in inputs.items()],
            "outputs": [{"name": types[k[0]], "type": types[k[0]], "links": k} for k in outputs],
            "properties": {},
            "widgets_values": values,
        }
        for node_id, class_type, inputs, outputs, values in _NODES
    ]
    return {"nodes": nodes, "links": _LINKS, "groups": [], "version": 0.4, "extra": {}}


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
