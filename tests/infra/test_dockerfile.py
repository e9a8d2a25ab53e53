"""Facts of `infra/Dockerfile`:

- the steps of `cpu` run in a clean environment: the wheel is built and installed, components and
  pipelines import, `flowloom doctor` passes, without git (`tests/infra/replay.py` says what stands
  in for the base image and for downloads, which are replaced here); the wheel's code has the
  checkout's digest, so that runs of an image are found by one and the same key;
- both targets are made alike, by other packages; a step of another's stage is not built;
- the base image is pinned, no password enters, each ends as a user other than root, by number;
- torch comes first and the rest from the lock, without resolving;
- COPY sources exist, and what `.dockerignore` lets through is what they name, nothing more;
- an instruction that the replay does not know, an empty COPY and a step that fails are errors."""

import dataclasses
import re
import subprocess
import sys

import pytest

from components import images
from flowloom.runs import code_digest
from tests.infra import dockerfile, replay

STAGES = dockerfile.read(replay.FILE)
TARGETS = {"cpu": images.CPU_IMAGE, "gpu": images.GPU_IMAGE}


def steps(name, kind):
    """Instructions of a stage and of those it starts from."""
    chain = dockerfile.chain(STAGES, name)
    return [step for stage in chain for step in stage.steps if step.kind == kind]


def written(tmp_path, text):
    path = tmp_path / "Dockerfile"
    path.write_text(text)
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_steps_of_cpu_run_in_a_clean_environment(tmp_path):
    work = replay.Replay(tmp_path, installed=True)
    tree = work.build("cpu")
    ran = [step.text for _, step, _ in work.ran if step.kind == "RUN"]
    assert "flowloom doctor" in ran[-1]
    (installed,) = (tree / "opt" / "venv").glob("lib/python3*/site-packages/flowloom")
    assert not installed.is_symlink()
    # Its digest as its own code counts it; the place is gone, so by this interpreter.
    asked = "from flowloom.runs import code_digest; print(code_digest())"
    done = subprocess.run(
        [sys.executable, "-c", asked],
        env={"PYTHONPATH": str(installed.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == code_digest()


def test_targets_are_the_images_of_components():
    text = replay.FILE.read_text()
    for target, image in TARGETS.items():
        assert f"--target {target} -t {image} ." in text


def test_targets_differ_in_their_packages_alone():
    def said(name):
        return [
            dataclasses.replace(
                step, line=0, text=step.text.replace(f"{name}-packages", "packages")
            )
            for step in STAGES[name].steps
        ]

    assert said("cpu") == said("gpu")
    assert STAGES["cpu"].parent == STAGES["gpu"].parent
    for other, name in (("gpu", "cpu"), ("cpu", "gpu")):
        assert not [stage for stage in needed(name) if stage.startswith(other)]


def needed(name):
    stage = STAGES[name]
    found = {name}
    for origin in replay._needs(stage, STAGES):
        found |= needed(origin)
    return found


def test_the_base_image_is_pinned():
    outside = {stage.parent for stage in STAGES.values()} - set(STAGES)
    assert len(outside) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", outside.pop())


@pytest.mark.parametrize("target", TARGETS)
def test_steps_run_as_a_user_by_number(target):
    *_, last = steps(target, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last.text)
    # The check at the end runs as that user.
    kinds = [step.kind for step in STAGES[target].steps]
    assert kinds.index("USER") < len(kinds) - 1 - kinds[::-1].index("RUN")


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_ends_with_its_check(target):
    last = steps(target, "RUN")[-1].text
    for name in ("torch", "kfp", "mlflow", "transformers", "peft", "flowloom", "components"):
        assert re.search(rf"\b{name}\b", last)
    assert "pipelines" in last
    assert "flowloom doctor" in last


@pytest.mark.parametrize("target", TARGETS)
def test_threads_that_wait_sleep(target):
    env = {}
    for step in steps(target, "ENV"):
        env |= dockerfile.pairs(step.text)
    assert env["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize("target", TARGETS)
def test_torch_first_then_the_lock_without_resolving(target):
    torch, lock = [step.text for step in STAGES[f"{target}-packages"].steps if step.kind == "RUN"]
    assert torch == "pip install ${TORCH_ARGS} ${TORCH}"
    assert lock == "pip install --no-deps --requirement requirements.lock"
    makefile = (replay.CHECKOUT / "Makefile").read_text()
    (version,) = re.findall(r"^TORCH \?= (\S+)$", makefile, re.MULTILINE)
    args = [s.text for s in STAGES[f"{target}-packages"].steps if s.kind == "ARG"]
    assert f"TORCH={version}" in args


def test_no_secret_enters():
    for stage in STAGES.values():
        for step in stage.steps:
            if step.kind in ("ENV", "ARG"):
                for name in dockerfile.pairs(step.text):
                    assert not re.search("(?i)secret|passw|token|key|credential|user", name)
            if step.kind == "RUN":
                assert "://" not in step.text


def sources():
    copies = [dockerfile.copied(s) for st in STAGES.values() for s in st.steps if s.kind == "COPY"]
    return {name for origin, names, _ in copies if origin is None for name in names}


def test_every_source_exists_and_nothing_else_reaches_the_builder():
    for source in sources():
        assert (replay.CHECKOUT / source).exists(), source
        assert not replay.ignored(source)
    kept = {path.name for path in replay.CHECKOUT.iterdir() if not replay.ignored(path.name)}
    assert kept == sources()


@pytest.mark.parametrize(
    "name", [".env", ".git/config", ".flowloom/mlflow.db", "src/flowloom/__pycache__/runs.pyc"]
)
def test_what_no_image_should_hold_is_left_out(name):
    assert replay.ignored(name)


def test_what_is_installed_here_is_the_lock():
    assert replay.differing(replay.CHECKOUT / "requirements.lock") == []


def test_another_version_is_named(tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text("kfp==0.1 \\\n    --hash=sha256:0\nno-such-package==2\n")
    first, second = replay.differing(lock)
    assert re.fullmatch(r"kfp: got 2\.\S+, expected 0\.1", first)
    assert second == "no-such-package: got none, expected 2"


def test_lines_are_joined_and_variables_replaced(tmp_path):
    text = 'ARG A=x:1\n# no\nFROM ${A} AS one\nENV B=/opt \\\n    C="a b"\nRUN echo $B\n'
    (stage,) = dockerfile.read(written(tmp_path, text)).values()
    assert stage.parent == "x:1"
    env, run = stage.steps
    assert dockerfile.pairs(env.text) == {"B": "/opt", "C": "a b"}
    assert run == dockerfile.Step("RUN", "echo $B", 6)
    assert dockerfile.replaced("${B}/$C/$D", {"B": "1", "C": "2"}) == "1/2/"


def test_an_unknown_instruction_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Dockerfile:2: got 'ADD', expected one of FROM"):
        dockerfile.read(written(tmp_path, "FROM x AS y\nADD a b\n"))


def test_a_source_that_is_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"COPY data-seed: got nothing of the checkout"):
        replay.context("data-seed")


def scripted(tmp_path, monkeypatch, text):
    monkeypatch.setattr(replay, "FILE", written(tmp_path, text))
    return replay.Replay(tmp_path / "work", installed=True)


def test_steps_see_their_folder_variables_and_files_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKED", "1")
    text = """FROM x AS a
WORKDIR /opt/a
COPY LICENSE ./
ENV WHERE=/opt/a/LICENSE
RUN env > /opt/a/env && [ -f "$WHERE" ] && ! command -v git
FROM x AS b
COPY --from=a /opt/a /opt/b
RUN rm /opt/b/LICENSE
"""
    work = scripted(tmp_path, monkeypatch, text)
    tree = work.build("b")
    assert [path.name for path in (tree / "opt" / "b").iterdir()] == ["env"]
    seen = (tree / "opt" / "b" / "env").read_text()
    assert f"WHERE={work.root}/opt/a/LICENSE" in seen
    assert "LEAKED" not in seen


def test_a_step_that_fails_is_named_with_what_it_said(tmp_path, monkeypatch):
    work = scripted(tmp_path, monkeypatch, "FROM x AS a\nRUN echo no such thing >&2 && exit 3\n")
    with pytest.raises(ValueError, match=r"Dockerfile:2: RUN .* status 3, expected 0\nno such"):
        work.build("a")
