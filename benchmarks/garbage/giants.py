"""Input that is large rather than broken."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.garbage.doors import (
    Call,
    run_chunks,
    run_decode,
    run_differences,
    run_encode,
    run_source,
    run_to_ui,
    run_validate,
    world,
)
from benchmarks.garbage.mutators import nested, picture
from flowloom.workflow import CodecError, WorkflowError
from flowloom.workflow.canvas import CanvasError
from flowloom.workflow.png import PngError


def giants(megabytes: int) -> Iterator[Call]:
    """A few inputs that are large rather than broken; each is made when its turn comes."""
    flow_errors = (WorkflowError, CodecError)
    for make in (_long_text, _long_names, _many_inputs, _many_outputs, _long_chain, _deep_value):
        flow = make(megabytes)
        for k, catalogue in enumerate(world().catalogues):
            yield Call(f"validate {make.__name__}", partial(run_validate, (flow, catalogue)), ())
            codec = world().codecs[k]
            yield Call(f"encode {make.__name__}", partial(run_encode, (flow, codec)), flow_errors)
        case = (world().flows[0], flow)
        yield Call(f"differ {make.__name__}", partial(run_differences, case), flow_errors)
        canvas = (flow, world().catalogues[0])
        yield Call(
            f"draw {make.__name__}", partial(run_to_ui, canvas), (WorkflowError, CanvasError)
        )
    text = json.dumps(_long_text(megabytes)).encode()
    yield Call("read long text", partial(run_source, (".json", text)), (ValueError,))
    yield Call("read half of it", partial(run_source, (".json", text[: len(text) // 2])), ())
    del text
    bomb = gzip.compress(b" " * (megabytes << 20))
    yield Call("read spaces, compressed", partial(run_source, (".json.gz", bomb)), ())
    rng = random.Random(3)
    data = picture({"prompt": b"x" * (megabytes << 20)}, rng)
    yield Call("read large picture", partial(run_chunks, data), (PngError,))
    tokens = [int(rng.random() * 120) for _ in range(megabytes * 10_000)]
    yield Call("decode many", partial(run_decode, (tokens, world().codecs[0], None)), (CodecError,))


def _first(name: str) -> tuple[dict[str, Any], str]:
    """A good flow, and the id of its first node of a class."""
    flow = json.loads(json.dumps(world().flows[0]))
    return flow, next(i for i, node in flow.items() if node["class_type"] == name)


def _long_text(megabytes: int) -> dict[str, Any]:
    flow, node_id = _first("CLIPTextEncode")
    flow[node_id]["inputs"]["text"] = "a cat, " * (megabytes * 150_000)
    return flow


def _long_names(megabytes: int) -> dict[str, Any]:
    flow, node_id = _first("KSampler")
    long = "9" * (megabytes << 20)
    flow[node_id]["inputs"] |= {long: 1, "sampler_name": long, "steps": long, "model": [long, 0]}
    flow[long] = {"class_type": long, "inputs": {}}
    return flow


def _many_inputs(megabytes: int) -> dict[str, Any]:
    flow, node_id = _first("KSampler")
    flow[node_id]["inputs"] |= {f"steps{k}": k for k in range(megabytes * 3000)}
    return flow


def _many_outputs(megabytes: int) -> dict[str, Any]:
    flow, node_id = _first("SaveImage")
    return flow | {f"s{k}": flow[node_id] for k in range(megabytes * 20)}


def _long_chain(megabytes: int) -> dict[str, Any]:
    flow, node_id = _first("SaveImage")
    link = flow[node_id]["inputs"]["images"]
    for k in range(megabytes * 90):
        flow[f"b{k}"] = {
            "class_type": "ImageBlur",
            "inputs": {"image": link, "blur_radius": 1, "sigma": 1.0},
        }
        link = [f"b{k}", 0]
    flow[node_id]["inputs"]["images"] = link
    return flow


def _deep_value(megabytes: int) -> dict[str, Any]:
    flow, node_id = _first("KSampler")
    flow[node_id]["inputs"]["steps"] = nested(megabytes * 5000)
    return flow
