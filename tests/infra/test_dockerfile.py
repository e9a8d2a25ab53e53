"""Facts of `infra/Dockerfile`:

- the steps of `cpu` run in a clean environment: the wheel is built and installed, components and
  pipelines import, `flowloom doctor` passes, without git (`tests/infra/replay.py` says what stands
  in for the base image and for downloads, which are replaced here); the wheel's code has the
  checkout's digest, so that runs of an image are found by one and the same key;
- `cpu` and `gpu` are the same steps; `gpu` looks at its torch; no target builds another's stages;
- each target: base image pinned, no password enters, ends with its check as a user other than root,
  by number; what libraries write goes to /tmp; commit and version come after the last layer;
- what serves, and nothing else, has a port and a health check;
- torch comes first and the rest from the lock, without resolving;
- the render server is fetched by commit and version, its open requirements are constrained, and of
  this repository it gets those constraints alone;
- COPY sources exist, and what `.dockerignore` lets through is what they name, nothing more;
- an instruction that the replay does not know (ADD), an empty COPY, a failing step are errors."""

import json
import re
import subprocess
import sys

import pytest

from components import images
from flowloom.runs import code_digest
from tests.infra import dockerfile, replay

STAGES = dockerfile.read(replay.FILE)
STEPS = {"cpu": images.CPU_IMAGE, "gpu": images.GPU_IMAGE}
TARGETS = {**STEPS, "render": images.RENDER_IMAGE}


def everything(name):
    """Instructions of a stage and of those it starts from."""
    return [step for stage in dockerfile.chain(STAGES, name) for step in stage.steps]


def steps(name, *kinds):
    return [step for step in everything(name) if step.kind in kinds]


def variables(name):
    env = {}
    for step in steps(name, "ENV"):
        env |= dockerfile.pairs(step.text)
    return env


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
    assert (installed / "cli" / "prerequisites.yaml").read_text()
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


def test_gpu_is_cpu_and_a_look_at_its_torch():
    assert STAGES["cpu"].parent == STAGES["gpu"].parent == "step"
    assert STAGES["cpu"].steps == ()
    (look,) = STAGES["gpu"].steps
    assert look.text.startswith('python -c "import torch; assert torch.version.cuda')


def needed(name):
    found = {name}
    for origin in replay._needs(STAGES[name], STAGES):
        found |= needed(origin)
    return found


def test_no_target_builds_stages_of_another():
    shared = {"base", "builder"}
    of_steps = {"packages", "wheel", "step"}
    assert needed("cpu") == {"cpu", *shared, *of_steps}
    assert needed("gpu") == {"gpu", *shared, *of_steps}
    assert needed("render") == {"render", "render-packages", "comfyui", *shared}


def test_base_images_are_pinned():
    outside = {stage.parent for stage in STAGES.values()} - set(STAGES)
    assert outside == {STAGES["base"].parent, STAGES["comfyui"].parent}
    for image in outside:
        assert re.fullmatch(r"python:3\.11\.\d+(-slim)?-bookworm", image)
    assert STAGES["base"].parent == STAGES["comfyui"].parent.replace("-b", "-slim-b")
    assert replay.GIT_IMAGE.fullmatch(STAGES["comfyui"].parent)
    assert not replay.GIT_IMAGE.fullmatch(STAGES["base"].parent)


@pytest.mark.parametrize("target", TARGETS)
def test_steps_run_as_a_user_by_number(target):
    *_, last = steps(target, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last.text)
    # The check at the end runs as that user.
    kinds = [step.kind for step in everything(target)]
    assert kinds.index("USER") < len(kinds) - 1 - kinds[::-1].index("RUN")


@pytest.mark.parametrize("target", TARGETS)
def test_what_libraries_write_goes_to_tmp(target):
    env = variables(target)
    assert env["HOME"] == "/tmp"
    assert env["DVC_SITE_CACHE_DIR"].startswith("/tmp/")
    assert env["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize("target", STEPS)
def test_a_step_image_ends_with_its_check(target):
    last = [step.text for step in steps("step", "RUN")][-1]
    for name in ("torch", "kfp", "mlflow", "transformers", "peft", "flowloom", "components"):
        assert re.search(rf"\b{name}\b", last)
    assert "pipelines" in last
    assert "flowloom doctor" in last


def test_the_render_server_ends_with_its_check():
    last = [step.text for step in steps("render", "RUN")][-1]
    assert "python main.py --cpu --quick-test-for-ci" in last


@pytest.mark.parametrize("target", TARGETS)
def test_version_and_commit_are_said_after_the_last_layer(target):
    (label,) = steps(target, "LABEL")
    said = dockerfile.pairs(label.text)
    assert said["org.opencontainers.image.version"] == "${VERSION}"
    assert said["org.opencontainers.image.revision"] == "${COMMIT}"
    every = steps("step" if target in STEPS else target, "RUN", "COPY", "ARG")
    declared = [step for step in every if step.kind == "ARG"]
    assert [step.text for step in declared] == ["VERSION=", "COMMIT="]
    assert every[-2:] == declared


@pytest.mark.parametrize("target", TARGETS)
def test_what_serves_has_a_health_check_and_nothing_else(target):
    served = ["EXPOSE", "HEALTHCHECK", "ENTRYPOINT"]
    kinds = [step.kind for step in steps(target, *served)]
    assert kinds == (served if target == "render" else [])


def test_the_health_check_asks_the_port_that_is_served():
    (port,), (health,), (start,) = (
        steps("render", kind) for kind in ("EXPOSE", "HEALTHCHECK", "ENTRYPOINT")
    )
    assert f":{port.text}/system_stats" in health.text
    words = json.loads(start.text)
    assert words[words.index("--port") + 1] == port.text
    assert "--disable-api-nodes" in words
    assert "--disable-all-custom-nodes" in words


@pytest.mark.parametrize("target", TARGETS)
def test_threads_that_wait_sleep(target):
    assert variables(target)["OMP_WAIT_POLICY"] == "passive"


def test_torch_first_then_the_lock_without_resolving():
    torch, lock = [step.text for step in STAGES["packages"].steps if step.kind == "RUN"]
    assert torch == "pip install ${TORCH_ARGS} ${TORCH}"
    assert lock == "pip install --no-deps --requirement requirements.lock"
    makefile = (replay.CHECKOUT / "Makefile").read_text()
    (version,) = re.findall(r"^TORCH \?= (\S+)$", makefile, re.MULTILINE)
    for name in ("packages", "render-packages"):
        args = [step.text for step in STAGES[name].steps if step.kind == "ARG"]
        assert args == [f"TORCH={version}", "TORCH_ARGS="]


def test_the_render_server_is_fetched_by_its_commit():
    said = {}
    for step in steps("comfyui", "ARG"):
        said |= dockerfile.pairs(step.text)
    assert re.fullmatch(r"[0-9a-f]{40}", said["COMFYUI_COMMIT"])
    assert said["COMFYUI_SOURCE"].startswith("https://")
    (fetch,) = [step.text for step in steps("comfyui", "RUN")]
    assert "fetch --quiet --depth 1 ${COMFYUI_SOURCE} ${COMFYUI_COMMIT} " in fetch
    # Another commit than that of the version is found out.
    assert fetch.endswith('grep -F "\\"${COMFYUI_VERSION}\\"" comfyui_version.py')
    # The version whose nodes the catalogue describes.
    (catalogue,) = (replay.CHECKOUT / "data" / "catalogues").glob("comfyui-*.json.gz")
    assert said["COMFYUI_VERSION"].startswith(
        catalogue.name.removeprefix("comfyui-").removesuffix("json.gz")
    )


def test_the_render_servers_open_requirements_are_constrained():
    installs = [step.text for step in STAGES["render-packages"].steps if step.kind == "RUN"]
    assert len(installs) == 2
    assert all("--constraint render.txt" in text for text in installs)
    lines = (replay.CHECKOUT / "infra" / "render.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {"torchvision", "torchaudio", "transformers", "numpy"} <= set(pins)
    # torch is TORCH's to say, and the server pins its own packages.
    assert not [name for name in pins if name == "torch" or name.startswith("comfy")]


def test_the_render_server_gets_nothing_of_flowloom():
    stages = needed("render")
    copies = [
        dockerfile.copied(step)
        for name in stages
        for step in STAGES[name].steps
        if step.kind == "COPY"
    ]
    assert [names for origin, names, _ in copies if origin is None] == [["infra/render.txt"]]


def test_no_secret_enters():
    for stage in STAGES.values():
        for step in stage.steps:
            if step.kind in ("ENV", "ARG"):
                for name in dockerfile.pairs(step.text):
                    assert not re.search("(?i)secret|passw|token|key|credential|user", name)
            if step.kind == "RUN":
                assert not re.search("https?://", step.text)


def sources():
    copies = [dockerfile.copied(s) for st in STAGES.values() for s in st.steps if s.kind == "COPY"]
    return {name for origin, names, _ in copies if origin is None for name in names}


def test_every_source_exists_and_nothing_else_reaches_the_builder():
    for source in sources():
        assert (replay.CHECKOUT / source).exists(), source
        assert not replay.ignored(source)
    beside = {path.name for path in replay.CHECKOUT.iterdir()}
    infra = {f"infra/{path.name}" for path in (replay.CHECKOUT / "infra").iterdir()}
    assert {name for name in beside | infra if not replay.ignored(name)} == sources()


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        ".git/config",
        ".flowloom/mlflow.db",
        "infra/overlays/prod/kustomization.yaml",
        "src/flowloom/__pycache__/runs.pyc",
    ],
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


def test_an_argument_from_before_the_first_stage_serves_those_that_name_it(tmp_path):
    text = "ARG A=1\nFROM x AS one\nARG A\nRUN a\nFROM x AS two\nARG A=2\nFROM x AS three\nRUN a\n"
    stages = dockerfile.read(written(tmp_path, text)).values()
    args = [[step.text for step in stage.steps if step.kind == "ARG"] for stage in stages]
    assert args == [["A=1"], ["A=2"], []]


def test_an_unknown_instruction_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Dockerfile:2: got 'ADD', expected one of FROM"):
        dockerfile.read(written(tmp_path, "FROM x AS y\nADD a b\n"))


def test_a_link_stays_a_link(tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "CHECKOUT", tmp_path)
    (tmp_path / ".dockerignore").write_text("*\n!src\n")
    (tmp_path / "src").mkdir()
    (tmp_path / "outside").touch()
    (tmp_path / "src" / "link").symlink_to("../outside")
    work = scripted(tmp_path, monkeypatch, "FROM x AS a\nCOPY src /opt/src\n")
    link = work.build("a") / "opt" / "src" / "link"
    assert link.is_symlink()
    assert not link.exists()


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


def test_arguments_of_a_build_replace_those_that_a_stage_declares(tmp_path, monkeypatch):
    text = "FROM x AS a\nARG GIVEN=1\nARG OWN=1\nRUN echo $GIVEN$OWN$OTHER > /opt/said\n"
    monkeypatch.setattr(replay, "FILE", written(tmp_path, text))
    work = replay.Replay(tmp_path / "work", installed=True, args={"GIVEN": "2", "OTHER": "2"})
    assert (work.build("a") / "opt" / "said").read_text() == "21\n"


def test_git_is_there_where_the_image_has_it(tmp_path, monkeypatch):
    text = "FROM python:3.11.13-bookworm AS a\nRUN command -v git\n"
    scripted(tmp_path, monkeypatch, text).build("a")
