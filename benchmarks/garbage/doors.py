"""The public doors of the workflow language, and what is thrown at each."""

from __future__ import annotations

import gzip
import json
import random
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.garbage.mutators import (
    bent,
    broken_bytes,
    broken_tokens,
    damaged,
    junk,
    picture,
    relinked,
)
from flowloom.cli.sources import Inputs
from flowloom.workflow import (
    Catalogue,
    CatalogueError,
    Codec,
    CodecError,
    Grammar,
    Vocabulary,
    VocabularyError,
    Workflow,
    WorkflowError,
    decode,
    differences,
    random_workflows,
    validate,
)
from flowloom.workflow.canvas import CanvasError, from_ui, to_ui
from flowloom.workflow.catalogue import DATA
from flowloom.workflow.png import PngError, read_chunks

_POOL = 150
_SERVER = Path("data/catalogues/comfyui-0.33.json.gz")
_CHOICE, _GROWING, _MATCH = (f"COMFY_{n}_V3" for n in ("DYNAMICCOMBO", "AUTOGROW", "MATCHTYPE"))
_NUMBER = ["INT", {"default": 512, "min": 0, "max": 16384, "step": 8}]
_SIZE = {"width": _NUMBER, "height": _NUMBER, "crop": [["center", "disabled"]]}
_DEPTH = {"bit_depth": ["COMBO", {"options": ["8-bit"]}], "input_color_space": [["sRGB"], {}]}
# As a server answers: a picture, a choice, growing inputs, an output with a choice.
_INFO: dict[str, Any] = {
    "LoadImage": {
        "input": {"required": {"image": [["none", "a.png"], {"image_upload": True}]}},
        "output": ["IMAGE", "MASK"],
    },
    "ResizeImageMaskNode": {
        "input": {
            "required": {
                "input": [_MATCH, {}],
                "resize_type": [
                    _CHOICE,
                    {"options": [{"key": "scale dimensions", "inputs": {"required": _SIZE}}]},
                ],
                "scale_method": [["area", "lanczos"], {"default": "area"}],
            }
        },
        "output": [_MATCH],
        "output_name": ["resized"],
    },
    "BatchImagesNode": {
        "input": {
            "required": {
                "images": [
                    _GROWING,
                    {
                        "template": {
                            "input": {"required": {"image": ["IMAGE", {}]}},
                            "prefix": "image",
                            "min": 1,
                            "max": 50,
                        }
                    },
                ]
            },
            "optional": {"note": ["STRING", {"multiline": True}], "colour": ["COLOR", {}]},
        },
        "input_order": {"required": ["images"], "optional": ["colour", "note"]},
        "output": ["IMAGE"],
    },
    "SaveImageAdvanced": {
        "input": {
            "required": {
                "images": ["IMAGE", {}],
                "filename_prefix": ["STRING", {"default": "ComfyUI"}],
                "format": [_CHOICE, {"options": [{"key": "png", "inputs": {"required": _DEPTH}}]}],
            }
        },
        "output": ["IMAGE"],
        "output_node": True,
    },
}


class Call(NamedTuple):
    """One call to be judged: what it does (giving its outcome in a word), what it may raise."""

    name: str
    run: Callable[[], str]
    errors: tuple[type[Exception], ...]


class Door(NamedTuple):
    """A public entry: its share of all inputs, and what makes a call from a source of chance."""

    weight: float
    make: Callable[[], Callable[[random.Random], Call]]


class World(NamedTuple):
    """What the calls share: catalogues, codecs, and good input to damage."""

    catalogues: tuple[Catalogue, Catalogue]
    codecs: tuple[Codec, Codec]
    grammar: Grammar
    flows: list[dict[str, Any]]
    canvases: list[dict[str, Any]]
    codes: list[list[int]]


@lru_cache(maxsize=1)
def world() -> World:
    """Made once per process."""
    embedded = Catalogue.load("embedded")
    server = Catalogue.load(_SERVER) if _SERVER.exists() else Catalogue.from_object_info(_INFO)
    grammar = Grammar(embedded)
    codes = random_workflows(grammar, _POOL, 0)
    graphs = [decode(code.tokens, grammar) for code in codes]
    flows = [graph.to_api() for graph in graphs] + [_dynamic(k) for k in range(_POOL // 5)]
    return World(
        (embedded, server),
        (grammar.codec, Codec(server, Vocabulary.build(server))),
        grammar,
        flows,
        [to_ui(graph, embedded) for graph in graphs] + _templates(),
        [code.tokens for code in codes],
    )


def _dynamic(k: int) -> dict[str, Any]:
    """A flow with a choice, growing inputs, a picture and a file saved by a choice."""
    resize = {
        "input": ["1", 0],
        "resize_type": "scale dimensions",
        "resize_type.width": 8 * (k + 1),
        "resize_type.height": 512,
        "resize_type.crop": "center",
        "scale_method": "area",
    }
    grown = {f"images.image{j}": ["2", 0] for j in range(1 + k % 4)}
    save = {
        "images": ["3", 0],
        "filename_prefix": "x",
        "format": "png",
        "format.bit_depth": "8-bit",
        "format.input_color_space": "sRGB",
    }
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "none"}},
        "2": {"class_type": "ResizeImageMaskNode", "inputs": resize},
        "3": {"class_type": "BatchImagesNode", "inputs": grown},
        "4": {"class_type": "SaveImageAdvanced", "inputs": save},
    }


def _templates() -> list[dict[str, Any]]:
    """Some of the templates that ComfyUI's editor comes with, where they are installed."""
    try:
        import comfyui_workflow_templates_json as package
    except ImportError:
        return []
    files = sorted((Path(package.__file__).parent / "templates").glob("image_*.json"))
    return [json.loads(file.read_bytes()) for file in files if file.stat().st_size < 60_000][:40]


def _broken_flow(rng: random.Random) -> Any:
    flow: Any = _pick(world().flows, rng)
    if rng.random() < 0.01:
        return junk(rng)
    if rng.random() < 0.5:
        for _ in range(1 + int(rng.random() * 3)):
            flow = relinked(flow, rng) if rng.random() < 0.2 else bent(flow, rng)
        return flow
    for _ in range(1 + int(rng.random() * 3)):
        flow = relinked(flow, rng) if rng.random() < 0.2 and flow else damaged(flow, rng)
        if not isinstance(flow, dict):
            break
    return flow


def _pick(items: Any, rng: random.Random) -> Any:
    return items[int(rng.random() * len(items))]


def _calls(
    name: str,
    errors: tuple[type[Exception], ...],
    draw: Callable[[random.Random], Any],
    run: Callable[[Any], str],
) -> Callable[[], Callable[[random.Random], Call]]:
    """Maker of calls that run one function on what was drawn."""

    def make() -> Callable[[random.Random], Call]:
        world()
        return lambda rng: Call(name, partial(run, draw(rng)), errors)

    return make


def run_validate(case: tuple[Any, Catalogue]) -> str:
    """Judge a flow; what is said must be short and printable."""
    problems = validate(*case)
    for problem in problems:
        assert len(problem.message) < 500, "a message that long is no message"
        text = problem.message + problem.suggestion + problem.node_id + problem.input
        assert text.isprintable(), "what cannot be printed in a line"
    return "valid" if not problems else "problems"


def _from_api(flow: Any) -> str:
    workflow = Workflow.from_api(flow)
    workflow.fingerprint()
    workflow.to_api()
    workflow.fill("a cat", "a dog", 7)
    return "read"


def run_encode(case: tuple[Any, Codec]) -> str:
    """Write a flow as tokens and read it back as the same."""
    flow, codec = case
    workflow = Workflow.from_api(flow)
    encoded = codec.encode(workflow)
    again = codec.decode(encoded.tokens, encoded.texts, encoded.seeds)
    outputs = codec.catalogue.output_classes
    assert again.fingerprint(outputs) == workflow.fingerprint(outputs), "read back as another"
    return "written"


def run_decode(case: tuple[list[int], Codec, Any]) -> str:
    """Read tokens and judge what they say."""
    tokens, codec, texts = case
    workflow = codec.decode(tokens, texts)
    validate(workflow, codec.catalogue)
    return "read"


def run_differences(case: tuple[Any, Any]) -> str:
    """Compare two flows; no line if and only if the fingerprints are equal."""
    old, new = map(Workflow.from_api, case)
    lines = differences(old, new)
    assert (lines == []) == (old.fingerprint() == new.fingerprint()), "differences hide one"
    return "differ" if lines else "equal"


def _from_ui(case: tuple[Any, Catalogue]) -> str:
    canvas, catalogue = case
    validate(from_ui(canvas, catalogue).workflow, catalogue)
    return "converted"


def run_to_ui(case: tuple[Any, Catalogue]) -> str:
    """Draw a flow for the editor."""
    flow, catalogue = case
    json.dumps(to_ui(Workflow.from_api(flow), catalogue))
    return "drawn"


def _vocabulary(data: Any) -> str:
    assert Vocabulary.from_json(data).hash
    return "read"


def _catalogue(read: Callable[[Any], Catalogue], data: Any) -> str:
    catalogue = read(data)
    assert catalogue.hash
    for flow in world().flows[:2] + world().flows[-1:]:
        validate(flow, catalogue)
    return "read"


def run_chunks(data: bytes) -> str:
    """Read the texts of a picture."""
    return f"{min(len(read_chunks(data)), 3)} texts"


def run_source(case: tuple[str, bytes]) -> str:
    """Read a file as the command line does."""
    suffix, data = case
    outcome = "empty"
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        for source in Inputs([file.name]):
            assert "\n" not in (source.error or ""), "an error of several lines"
            outcome = "unreadable"
            if source.error is None:
                source.read(world().catalogues[0])
                outcome = "read"
    return outcome


def _draw_picture(rng: random.Random) -> bytes:
    text = json.dumps(_pick(world().flows, rng)).encode()
    data = picture({"prompt": text, "workflow": text[: int(rng.random() * 99)]}, rng)
    return broken_bytes(data, rng) if rng.random() < 0.8 else data


def _draw_source(rng: random.Random) -> tuple[str, bytes]:
    value = _broken_flow(rng) if rng.random() < 0.5 else damaged(_pick(world().canvases, rng), rng)
    try:
        data = json.dumps(value).encode()
    except (ValueError, RecursionError):
        data = b"[" * 100_000
    suffix = _pick((".json", ".jsonl", ".json.gz", ".png"), rng)
    if suffix == ".png":
        data = picture({"prompt": data}, rng)
    if suffix == ".json.gz":
        data = gzip.compress(data, 1)
    return suffix, broken_bytes(data, rng) if rng.random() < 0.7 else data


def _draw_info(rng: random.Random) -> Any:
    return damaged(_INFO, rng, 1 + int(rng.random() * 2))


def _case(rng: random.Random, kind: str) -> tuple[Any, Any]:
    """A broken flow with a catalogue or codec; dynamic flows mean something to a server only."""
    return _broken_flow(rng), _pick(getattr(world(), kind), rng)


def _draw_tokens(rng: random.Random) -> tuple[list[int], Codec, Any]:
    codec = _pick(world().codecs, rng)
    texts = _pick((None, (), ("a",), ("a", "b", "c")), rng)
    return broken_tokens(_pick(world().codes, rng), codec.vocabulary.size, rng), codec, texts


_EMBEDDED = json.loads((DATA / "embedded.json").read_text())
_BAD_CATALOGUE, _BAD_FLOW = (CatalogueError,), (WorkflowError,)

DOORS: dict[str, Door] = {
    "validate": Door(30, _calls("validate", (), lambda r: _case(r, "catalogues"), run_validate)),
    "from_api": Door(20, _calls("from_api", _BAD_FLOW, _broken_flow, _from_api)),
    "encode": Door(
        13,
        _calls("encode", (WorkflowError, CodecError), lambda r: _case(r, "codecs"), run_encode),
    ),
    "decode": Door(13, _calls("decode", (CodecError,), _draw_tokens, run_decode)),
    "differences": Door(
        5,
        _calls(
            "differences",
            _BAD_FLOW,
            lambda r: (_pick(world().flows, r), _broken_flow(r)),
            run_differences,
        ),
    ),
    "from_ui": Door(
        6,
        _calls(
            "from_ui",
            (CanvasError,),
            lambda r: (
                damaged(_pick(world().canvases, r), r, 1 + int(r.random() * 3)),
                _pick(world().catalogues, r),
            ),
            _from_ui,
        ),
    ),
    "to_ui": Door(
        3,
        _calls("to_ui", (WorkflowError, CanvasError), lambda r: _case(r, "catalogues"), run_to_ui),
    ),
    "png": Door(6, _calls("png", (PngError,), _draw_picture, run_chunks)),
    "sources": Door(1.5, _calls("sources", (ValueError,), _draw_source, run_source)),
    "vocabulary": Door(
        1,
        _calls(
            "vocabulary",
            (VocabularyError,),
            lambda r: damaged(world().grammar.vocabulary.to_json(), r, 2),
            _vocabulary,
        ),
    ),
    "catalogue": Door(
        1,
        _calls(
            "catalogue",
            _BAD_CATALOGUE,
            lambda r: damaged(_EMBEDDED, r, 2),
            partial(_catalogue, Catalogue.from_json),
        ),
    ),
    "object_info": Door(
        1.5,
        _calls(
            "object_info",
            _BAD_CATALOGUE,
            _draw_info,
            partial(_catalogue, Catalogue.from_object_info),
        ),
    ),
}
