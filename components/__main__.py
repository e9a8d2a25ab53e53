"""Check or write the interface tables in the components' READMEs.

python -m components --check     exit 1 if a README or metadata.yaml is out of date
python -m components --write     write the tables
"""

import importlib
import re
import sys
from pathlib import Path

import docstring_parser
import yaml
from kfp.dsl.python_component import PythonComponent

FOLDER = Path(__file__).parent
BLOCK = re.compile(r"(<!-- interface: [^>]* -->\n).*?(<!-- end -->)", re.DOTALL)


def names() -> list[str]:
    """The components: folders with a `component.py`."""
    return sorted(path.parent.name for path in FOLDER.glob("*/component.py"))


def load(name: str) -> PythonComponent:
    """The component of that name."""
    return getattr(importlib.import_module(f"components.{name}"), name)


def interface(component: PythonComponent) -> str:
    """Its inputs and outputs as two Markdown tables, and its image."""
    spec = component.component_spec
    docstring = docstring_parser.parse(component.python_func.__doc__)
    meanings = {param.arg_name: param.description for param in docstring.params}
    if docstring.returns:
        meanings["Output"] = docstring.returns.description
    parts = []
    for title, fields in (("Inputs", spec.inputs), ("Outputs", spec.outputs)):
        rows = [f"| {title} | Type | Meaning |", "|---|---|---|"]
        for name, field in (fields or {}).items():
            # A row is one line, however the docstring is broken.
            meaning = " ".join((meanings.get(name) or field.description).split())
            rows.append(f"| `{name}` | {_type(field)} | {meaning} |")
        parts.append("\n".join(rows))
    return "\n" + "\n\n".join(parts) + f"\n\nImage: `{spec.implementation.container.image}`\n\n"


def _type(field) -> str:
    kind = str(field.type).removeprefix("system.").split("@")[0]
    if getattr(field, "is_artifact_list", False):
        kind = f"list of {kind}"
    return f"{kind}, optional" if getattr(field, "optional", False) else kind


def problems(name: str, write: bool) -> list[str]:
    """What is wrong with a component's README and metadata, after writing the table if asked."""
    readme = FOLDER / name / "README.md"
    old = readme.read_text()
    table = interface(load(name))
    new, count = BLOCK.subn(lambda found: found[1] + table + found[2], old)
    if count != 1:
        return [f"{readme}: got {count} interface blocks, expected 1"]
    found = []
    if write and new != old:
        readme.write_text(new)
    elif new != old:
        found.append(f"{readme}: interface table is out of date; `python -m components --write`")
    metadata = yaml.safe_load((FOLDER / name / "metadata.yaml").read_text())
    if metadata["name"] != name:
        found.append(f"{name}/metadata.yaml: name: got {metadata['name']!r}, expected {name!r}")
    return found


def main(arguments: list[str]) -> int:
    """Check or write every component; returns the exit status."""
    if arguments not in (["--check"], ["--write"]):
        print("usage: python -m components {--check,--write}", file=sys.stderr)
        return 2
    found = [line for name in names() for line in problems(name, arguments == ["--write"])]
    print("\n".join(found) if found else f"{len(names())} components: READMEs are up to date")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
