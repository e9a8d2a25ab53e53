"""What a Dockerfile says, of the instructions that this project's uses.

Variables are replaced as an engine replaces them: from ENV and ARG in all but RUN, where the shell
does it.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

CHANGE = ("FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER")
"""What later steps see."""
DESCRIBE = ("CMD", "ENTRYPOINT", "EXPOSE", "HEALTHCHECK", "LABEL")
"""What an engine keeps beside the files, for when it starts the image."""
KNOWN = (*CHANGE, *DESCRIBE)


@dataclasses.dataclass(frozen=True)
class Step:
    """One instruction."""

    kind: str
    """Its word, in capitals."""
    text: str
    """What follows, continued lines joined."""
    line: int
    """Where it starts, from 1."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A FROM and what follows it."""

    name: str
    """As `AS` gives it."""
    parent: str
    """An earlier stage, or the image of another's."""
    steps: tuple[Step, ...]
    """Its instructions, without the FROM."""


def read(path: Path) -> dict[str, Stage]:
    """The stages of a Dockerfile by name, in order.

    Raises:
        ValueError: An instruction that is not known here, or a stage without a name.
    """
    given: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for step in _steps(path):
        where = f"{path.name}:{step.line}"
        if step.kind not in KNOWN:
            raise ValueError(f"{where}: got {step.kind!r}, expected one of {', '.join(KNOWN)}")
        if step.kind == "FROM":
            parent, separator, name = replaced(step.text, given).partition(" AS ")
            if not separator:
                raise ValueError(f"{where}: got {step.text!r}, expected IMAGE AS NAME")
            stages[name] = Stage(name, parent, ())
        elif not stages:
            # ARG before the first FROM: for FROM lines, and for stages that name it alone.
            given |= pairs(step.text)
        else:
            if step.kind == "ARG" and "=" not in step.text and step.text in given:
                step = dataclasses.replace(step, text=f"{step.text}={given[step.text]}")
            last = list(stages.values())[-1]
            stages[last.name] = dataclasses.replace(last, steps=(*last.steps, step))
    return stages


def chain(stages: dict[str, Stage], name: str) -> list[Stage]:
    """A stage after the stages that it starts from."""
    stage = stages[name]
    return [*(chain(stages, stage.parent) if stage.parent in stages else ()), stage]


def pairs(text: str) -> dict[str, str]:
    """Of `NAME=VALUE ...`, as ENV and ARG have it."""
    return {
        name: value
        for name, _, value in (word.partition("=") for word in shlex.split(text, posix=True))
    }


def replaced(text: str, variables: dict[str, str]) -> str:
    """`text` with `$NAME` and `${NAME}` replaced; an unknown name is empty."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda m: variables.get(m[1] or m[2], ""), text)


def copied(step: Step) -> tuple[str | None, list[str], str]:
    """Stage or None, sources and target of a COPY."""
    words = shlex.split(step.text)
    options = [word for word in words if word.startswith("--")]
    *sources, target = words[len(options) :]
    stage = None
    for option in options:
        name, _, value = option.partition("=")
        if name != "--from":
            raise ValueError(f"COPY: got {option!r}, expected --from=STAGE")
        stage = value
    return stage, sources, target


def _steps(path: Path) -> list[Step]:
    steps, parts, start = [], [], 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        start = start if parts else number
        parts.append(line.rstrip().removesuffix("\\").strip())
        if not line.rstrip().endswith("\\"):
            kind, _, text = " ".join(parts).partition(" ")
            steps.append(Step(kind, text.strip(), start))
            parts = []
    return steps
