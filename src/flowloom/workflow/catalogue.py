"""The catalogue: which node classes a server has, and which model files are installed.

`python -m flowloom.workflow.catalogue --bake data/models/files.json` rewrites the file list of the
embedded catalogue, which ships as package data.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from flowloom.workflow import object_info
from flowloom.workflow.graph import json_fault
from flowloom.workflow.inputs import InputSpec, NodeSpec, spec_fault

__all__ = ["Catalogue", "CatalogueError", "InputSpec", "Limits", "ModelFile", "NodeSpec"]

DATA = Path(__file__).parent / "data"
# By how much an upscale model enlarges a side, where a family is known to have only such.
_MODEL_SCALES = {"shapes": 2.0}


class CatalogueError(ValueError):
    """A catalogue cannot be read; the message says what, where, got, expected."""


@dataclass(frozen=True)
class ModelFile:
    """One installed model file; `sha256` (64 hex digits) is what it is, `name` only where."""

    folder: str
    name: str
    sha256: str
    family: str
    role: str = ""
    licence: str = ""
    card: str = ""


@dataclass(frozen=True)
class Limits:
    """Bounds on any picture's pixels, on the batch, and on a sampling's pixels x batch x steps."""

    pixels: int = 4096 * 4096
    batch: int = 16
    work: float = 16.0 * 4096 * 4096 * 50


@dataclass(frozen=True)
class Catalogue:
    """Node classes by name, installed files, and limits. `hash` covers all but `name`."""

    nodes: dict[str, NodeSpec]
    files: tuple[ModelFile, ...]
    name: str = ""
    limits: Limits = field(default_factory=Limits)

    @staticmethod
    def load(source: str | Path, headers: Mapping[str, str] | None = None) -> Catalogue:
        """Load "embedded", the http(s) address of a server, or a .json or .json.gz file.

        A file holds a saved catalogue or the answer of `object_info`.

        Args:
            source: Which one.
            headers: Sent along to a server, such as a proxy's authorisation.

        Raises:
            CatalogueError: the source cannot be read as a catalogue.
        """
        if str(source) == "embedded":
            return _embedded()
        if re.match(r"https?://", str(source)):
            try:
                data, name = object_info.fetch(str(source), headers), str(source)
            except ValueError as error:
                raise CatalogueError(f"catalogue {error}") from error
        else:
            data, name = _read_file(Path(source))
        try:
            if isinstance(data, dict) and isinstance(data.get("nodes"), dict) and "files" in data:
                return Catalogue.from_json(data)
            return Catalogue.from_object_info(data, name)
        except CatalogueError as error:
            raise CatalogueError(f"{source}: {error}") from error

    @staticmethod
    def from_json(data: Any) -> Catalogue:
        """Inverse of `to_json`.

        Raises:
            CatalogueError: `data` is not a saved catalogue.
        """
        try:
            nodes = {c: _read_node(c, raw) for c, raw in data["nodes"].items()}
            files = tuple(ModelFile(**raw) for raw in data["files"])
            limits = Limits(**data.get("limits", {}))
            name = str(data.get("name", ""))
            _check_files(files, limits)
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
            got = _one_line(f"{type(error).__name__} {str(error)[:200]}")
            raise CatalogueError(f"catalogue: got {got}, expected name, nodes, files") from error
        return Catalogue(nodes, _sorted_files(files), name, limits)

    @staticmethod
    def from_object_info(info: Any, name: str = "", limits: Limits | None = None) -> Catalogue:
        """Read the answer of `GET /object_info`. File lists become files of unknown family.

        Raises:
            CatalogueError: `info` is not such an answer.
        """
        if not isinstance(info, dict) or not info:
            raise CatalogueError("catalogue: expected an object of node classes by name")
        try:
            nodes, names = object_info.read_nodes(info)
        except ValueError as error:
            raise CatalogueError(_one_line(f"catalogue, {error}")) from error
        files = (ModelFile(folder, file, "", "") for folder, file in names)
        return Catalogue(nodes, _sorted_files(files), name, limits or Limits())

    def to_json(self) -> dict[str, Any]:
        """Plain data with nodes in order; input fields equal to their default are left out."""
        return {
            "name": self.name,
            "limits": asdict(self.limits),
            "nodes": {c: _write_node(spec) for c, spec in self.nodes.items()},
            "files": [asdict(file) for file in self.files],
        }

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of nodes, files and limits; the order of classes does not matter."""
        data = self.to_json()
        del data["name"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    @cached_property
    def output_classes(self) -> frozenset[str]:
        """Classes that save or show a result."""
        return frozenset(c for c, spec in self.nodes.items() if spec.output_node)

    @cached_property
    def families(self) -> tuple[str, ...]:
        """Families of the installed files, sorted; "" (unknown) is none."""
        return tuple(sorted({file.family for file in self.files if file.family}))

    @cached_property
    def model_scale(self) -> float:
        """By how much `ImageUpscaleWithModel` enlarges a side; 1 where that is not known."""
        known = [_MODEL_SCALES.get(file.family, 1.0) for file in self.files_in("upscale_models")]
        return max(known, default=1.0)

    def with_files(self, files: Iterable[ModelFile]) -> Catalogue:
        """Overlay: the same nodes, these files added; an equal folder and name is replaced."""
        merged = {(file.folder, file.name): file for file in self.files}
        merged.update({(file.folder, file.name): file for file in files})
        return replace(self, files=_sorted_files(merged.values()))

    def described(self, facts: Iterable[ModelFile]) -> Catalogue:
        """Fill in what a server does not tell of its files, from facts about common ones.

        A file is known by its folder and its name without leading folders (``flux/x.safetensors``).
        What is known already is kept.
        """
        known = {(fact.folder, base_name(fact.name)): fact for fact in facts}
        described = []
        for file in self.files:
            fact = known.get((file.folder, base_name(file.name)))
            news = (
                {} if fact is None else {k: v for k, v in vars(fact).items() if not vars(file)[k]}
            )
            described.append(replace(file, **news))
        return replace(self, files=tuple(described))

    def files_in(self, folder: str) -> tuple[ModelFile, ...]:
        """Installed files of one folder, by name."""
        return self._by_folder.get(folder, ())

    def file(self, folder: str, name: str) -> ModelFile | None:
        """The installed file, or None."""
        return self._by_address.get((folder, name))

    def options(self, spec: InputSpec) -> tuple[Any, ...] | None:
        """Choices of an input: file names, a COMBO's options, or None where any value goes."""
        if spec.folder is not None:
            return self._names_in.get(spec.folder, ())
        return spec.options

    def available(self, class_type: str) -> bool:
        """Whether every required choice of the class has at least one option."""
        spec = self.nodes[class_type]
        return all(self.options(i) != () for i in spec.inputs if i.required)

    @cached_property
    def _by_folder(self) -> dict[str, tuple[ModelFile, ...]]:
        folders: dict[str, list[ModelFile]] = {}
        for file in self.files:
            folders.setdefault(file.folder, []).append(file)
        return {folder: tuple(files) for folder, files in folders.items()}

    @cached_property
    def _names_in(self) -> dict[str, tuple[str, ...]]:
        return {folder: tuple(f.name for f in files) for folder, files in self._by_folder.items()}

    @cached_property
    def _by_address(self) -> dict[tuple[str, str], ModelFile]:
        return {(file.folder, file.name): file for file in self.files}


@lru_cache(maxsize=1)
def _embedded() -> Catalogue:
    return Catalogue.from_json(json.loads((DATA / "embedded.json").read_text()))


def _read_file(path: Path) -> tuple[Any, str]:
    """Parsed JSON of a .json or .json.gz file, and its name without suffixes."""
    if not path.name.endswith((".json", ".json.gz")):
        raise CatalogueError(
            f"catalogue {path}: expected 'embedded', http://HOST:PORT, or a .json or .json.gz file"
        )
    try:
        raw = path.read_bytes()
        data = json.loads(gzip.decompress(raw) if path.name.endswith(".gz") else raw)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise CatalogueError(f"catalogue {path}: cannot read: {error}") from error
    return data, path.name.removesuffix(".gz").removesuffix(".json")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def base_name(name: str) -> str:
    """A file name without the folders before it: ``flux/x.safetensors`` is ``x.safetensors``."""
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def _sorted_files(files: Iterable[ModelFile]) -> tuple[ModelFile, ...]:
    return tuple(sorted(files, key=lambda file: (file.folder, file.name)))


def _check_files(files: Iterable[ModelFile], limits: Limits) -> None:
    for file in files:
        if not all(isinstance(text, str) for text in vars(file).values()):
            raise TypeError(f"file {str(file.name)[:40]!r}: a field that is no text")
    for name, value in vars(limits).items():
        if type(value) not in (int, float) or not value > 0 or json_fault(value):
            raise TypeError(f"limits: {name} is no positive number")


def _read_node(class_type: str, raw: dict[str, Any]) -> NodeSpec:
    spec = NodeSpec(
        class_type,
        tuple(_read_input(entry) for entry in raw["inputs"]),
        tuple(raw["outputs"]),
        raw.get("output_node", False),
        tuple(raw.get("output_names", ())),
        raw.get("deprecated", False),
    )
    fault = spec_fault(spec)
    if fault:
        raise ValueError(f"class {class_type[:60]}: {fault}")
    return spec


def _read_input(entry: dict[str, Any]) -> InputSpec:
    entry = dict(entry)
    for key in ("options", "names"):
        if key in entry:
            entry[key] = tuple(entry[key])
    if "branches" in entry:
        entry["branches"] = tuple(
            (key, tuple(_read_input(inner) for inner in inputs))
            for key, inputs in entry["branches"]
        )
    if "element" in entry:
        entry["element"] = _read_input(entry["element"])
    return InputSpec(**entry)


def _write_node(spec: NodeSpec) -> dict[str, Any]:
    node: dict[str, Any] = {"inputs": [_write_input(item) for item in spec.inputs]}
    node["outputs"] = list(spec.outputs)
    if spec.output_node:
        node["output_node"] = True
    if spec.output_names:
        node["output_names"] = list(spec.output_names)
    if spec.deprecated:
        node["deprecated"] = True
    return node


_BLANK = InputSpec("", "")


def _write_input(spec: InputSpec) -> dict[str, Any]:
    entry = {k: v for k, v in vars(spec).items() if v is not getattr(_BLANK, k)}
    for key in ("options", "names"):
        if key in entry:
            entry[key] = list(entry[key])
    if "branches" in entry:
        entry["branches"] = [
            [key, [_write_input(inner) for inner in inputs]] for key, inputs in spec.branches
        ]
    if spec.element is not None:
        entry["element"] = _write_input(spec.element)
    return entry


def bake(files_path: str | Path) -> Catalogue:
    """Replace the embedded catalogue's file list (package data) by the list in a JSON file.

    Raises:
        CatalogueError: an entry is not {folder, name, sha256, family, role, licence, card}.
    """
    try:
        entries = json.loads(Path(files_path).read_text())
        files = [ModelFile(**entry) for entry in entries]
    except (OSError, ValueError, TypeError) as error:
        raise CatalogueError(f"bake {files_path}: {error}") from error
    for file in files:
        if not re.fullmatch(r"[0-9a-f]{64}", str(file.sha256)):
            raise CatalogueError(
                f"bake {files_path}: {file.folder}/{file.name}: "
                f"sha256 is {str(file.sha256)[:70]!r}, expected 64 hex digits"
            )
    path = DATA / "embedded.json"
    baked = replace(Catalogue.from_json(json.loads(path.read_text())), files=_sorted_files(files))
    path.write_text(_pretty(baked.to_json()))
    _embedded.cache_clear()
    return baked


def _pretty(data: dict[str, Any]) -> str:
    """JSON with one input or file per line, so that a change reads well in a diff."""
    rows = [f' "name": {json.dumps(data["name"])},', f' "limits": {json.dumps(data["limits"])},']
    rows.append(' "nodes": {')
    for k, (class_type, node) in enumerate(data["nodes"].items()):
        rest = {key: value for key, value in node.items() if key != "inputs"}
        rows.append(f'  {json.dumps(class_type)}: {{"inputs": [')
        rows.append(",\n".join(f"   {json.dumps(entry)}" for entry in node["inputs"]))
        end = "," if k + 1 < len(data["nodes"]) else ""
        rows.append(f"  ], {json.dumps(rest)[1:]}{end}")
    rows += [" },", ' "files": [']
    rows.append(",\n".join(f"  {json.dumps(entry)}" for entry in data["files"]))
    return "\n".join(["{", *rows, " ]", "}"]) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Command line: `--bake FILE` rewrites the embedded file list; returns the exit status."""
    if len(arguments) != 2 or arguments[0] != "--bake":
        print("usage: python -m flowloom.workflow.catalogue --bake FILES.json", file=sys.stderr)
        return 2
    try:
        baked = bake(arguments[1])
    except CatalogueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"embedded catalogue: {len(baked.files)} files, hash {baked.hash[:12]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
