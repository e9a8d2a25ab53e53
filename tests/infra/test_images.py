"""Facts of `make images`, with a `docker` that writes down what it is asked and answers by script:

- one build per target, from the repository root, with its two tags and the build arguments that are
  its own; names and version are those of `components/images.py`; buildx where there is one;
- a push sends both tags and takes the digest that belongs to the pushed name, and no other's;
- without a word on which, all are built, or those that the cluster's overlay runs;
- an overlay gets name and digest, or without a push the tag with the commit; what it says of images
  that were not built stays; what is written is what pipelines read back;
- refused with one line, before a build: no docker, no engine, a push of a changed checkout or
  without a registry, an overlay by digest without a push, an unknown cluster or target;
- a build or push that fails ends it, and the overlay stays as it was;
- a changed checkout gets a tag that says so, and no commit inside."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from components import images as named
from flowloom import __version__
from infra import images
from pipelines import clusters

DIGEST = "sha256:" + "a1" * 32
ZEROS = "sha256:" + "0" * 64

FAKE = f"""#!{sys.executable}
import json, os, pathlib, sys
home = pathlib.Path(os.environ["FAKE_DOCKER"])
with (home / "calls").open("a") as calls:
    calls.write(json.dumps([os.getcwd(), sys.argv[1:]]) + "\\n")
for given, answer in json.loads((home / "script").read_text()):
    if sys.argv[1:][:len(given)] == given:
        print(answer["out"])
        print(answer["err"], file=sys.stderr)
        sys.exit(answer["status"])
"""


class Docker:
    """What it was asked, and what it answers: the latest whose words a command starts with."""

    def __init__(self, home):
        self.home = home
        self.script = []

    def answer(self, *words, out="", err="", status=0):
        self.script.insert(0, (words, {"out": out, "err": err, "status": status}))
        (self.home / "script").write_text(json.dumps(self.script))

    def asked(self, *words):
        lines = self.home / "calls"
        calls = [json.loads(line) for line in lines.read_text().splitlines()]
        return [argv for _, argv in calls if tuple(argv[: len(words)]) == words]


@pytest.fixture
def docker(tmp_path, monkeypatch):
    home = tmp_path / "docker"
    home.mkdir()
    (home / "calls").touch()
    (home / "docker").write_text(FAKE)
    (home / "docker").chmod(0o755)
    monkeypatch.setenv("FAKE_DOCKER", str(home))
    monkeypatch.setenv("PATH", str(home), prepend=os.pathsep)
    fake = Docker(home)
    repositories = [f"other/cpu@{ZEROS}", f"registry.example.com/team/flowloom/cpu@{DIGEST}"]
    fake.answer("image", "inspect", out=json.dumps(repositories))
    return fake


@pytest.fixture
def root(tmp_path):
    """A checkout with one commit and the overlay of one cluster, by digest."""
    root = tmp_path / "checkout"
    overlay = root / "infra" / "overlays" / "prod" / "images"
    overlay.mkdir(parents=True)
    (root / "infra" / "overlays" / "kind").mkdir()
    listed = [{"name": f"flowloom/{name}", "digest": ZEROS} for name in images.TARGETS]
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump({"images": listed}))
    for words in (
        ("init", "--quiet"),
        ("add", "."),
        ("-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "--quiet", "-m", "one"),
    ):
        subprocess.run(["git", "-C", root, *words], check=True)
    return root


def commit_of(root):
    asked = ["git", "-C", root, "rev-parse", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def order(**said):
    return images.Order(**{"targets": ("cpu",), **said})


PUSH = {"push": True, "registry": "registry.example.com/team/"}


def listed(root, cluster):
    path = root / "infra" / "overlays" / cluster / "images" / "kustomization.yaml"
    body = yaml.safe_load(path.read_text())
    assert (body["kind"], body["apiVersion"]) == (
        "Component",
        "kustomize.config.k8s.io/v1alpha1",
    )
    return body["images"]


def test_names_are_those_that_components_ask_for(docker, root):
    made = images.make(images.Order(), root)
    assert [f"{image.plain}:{image.tags[0]}" for image in made] == [
        named.CPU_IMAGE,
        named.GPU_IMAGE,
        named.RENDER_IMAGE,
    ]


def test_a_build_has_its_target_tags_and_arguments(docker, root):
    said = {"torch": "torch==9", "torch_args": "--index-url a", "gpu_torch_args": "--index-url b"}
    images.make(images.Order(targets=("cpu", "render"), **said), root)
    commit = commit_of(root)
    tag = f"{__version__}-{commit[:12]}"
    expected = [
        [
            *("buildx", "build", "--load", "--file=infra/Dockerfile", f"--target={target}"),
            *(f"--build-arg=VERSION={__version__}", f"--build-arg=COMMIT={commit}"),
            *("--build-arg=TORCH=torch==9", f"--build-arg=TORCH_ARGS=--index-url {letter}"),
            *(f"--tag=flowloom/{target}:{__version__}", f"--tag=flowloom/{target}:{tag}", "."),
        ]
        for target, letter in (("cpu", "a"), ("render", "b"))
    ]
    assert docker.asked("buildx", "build") == expected
    assert docker.asked("push") == []


def test_a_cluster_says_which_it_runs(docker, root):
    overlay = images.overlay_file(root, "kind")
    overlay.parent.mkdir()
    overlay.write_text("images: [{name: postgres, newTag: '17'}, {name: flowloom/gpu}]")
    (made,) = images.make(images.Order(cluster="kind"), root)
    assert made.plain == "flowloom/gpu"
    assert listed(root, "kind") == [{"name": "postgres", "newTag": "17"}, made.entry]


def test_it_is_built_from_the_root_of_the_repository(docker, root):
    images.make(order(), root)
    folders = {
        folder
        for folder, argv in map(json.loads, (docker.home / "calls").read_text().splitlines())
        if "build" in argv
    }
    assert folders == {str(root)}


def test_without_buildx_docker_builds(docker, root):
    docker.answer("buildx", status=1, err="docker: unknown command: docker buildx")
    images.make(order(), root)
    ((_, *words),) = docker.asked("build")
    assert "--load" not in words
    assert words[-1] == "."


def test_a_push_sends_both_tags_and_takes_the_digest_of_its_own_name(docker, root):
    (made,) = images.make(order(**PUSH), root)
    name = "registry.example.com/team/flowloom/cpu"
    assert docker.asked("push") == [["push", f"{name}:{tag}"] for tag in made.tags]
    assert made.digest == DIGEST


def test_a_push_that_leaves_no_digest_is_an_error(docker, root):
    docker.answer("image", "inspect", out=json.dumps([f"other/cpu@{DIGEST}"]))
    with pytest.raises(ValueError, match=r"team/flowloom/cpu: got digests .*other.*, expected one"):
        images.make(order(**PUSH), root)


def test_an_overlay_by_digest_gets_the_pushed_one(docker, root):
    images.make(order(**PUSH, cluster="prod"), root)
    name = "registry.example.com/team/flowloom/cpu"
    assert listed(root, "prod") == [
        {"name": "flowloom/cpu", "newName": name, "digest": DIGEST},
        {"name": "flowloom/gpu", "digest": ZEROS},
        {"name": "flowloom/render", "digest": ZEROS},
    ]


def test_another_overlay_gets_the_tag_with_the_commit(docker, root):
    (made,) = images.make(order(cluster="kind"), root)
    assert listed(root, "kind") == [{"name": "flowloom/cpu", "newTag": made.tags[1]}]


@pytest.mark.parametrize("how", [{"cluster": "kind"}, {"cluster": "kind", **PUSH}])
def test_pipelines_read_what_is_written(docker, root, monkeypatch, how):
    (made,) = images.make(order(**how), root)
    monkeypatch.setattr(clusters, "OVERLAYS", root / "infra" / "overlays")
    read = clusters.image_of(clusters.CLUSTERS["kind"], named.CPU_IMAGE)
    assert read == (f"{made.name}@{DIGEST}" if "push" in how else f"flowloom/cpu:{made.tags[1]}")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"push": True}, "registry: got none, expected one to push to"),
        ({"cluster": "prod"}, r"prod/images/kustomization.yaml: got images by digest and no push"),
        ({"cluster": "moon"}, "cluster: got 'moon', expected one of kind, prod"),
    ],
)
def test_what_cannot_end_well_is_not_begun(docker, root, said, message):
    with pytest.raises(ValueError, match=message):
        images.make(order(**said), root)
    assert docker.asked() == []


def test_a_changed_checkout_is_not_pushed(docker, root):
    (root / "new.py").touch()
    with pytest.raises(ValueError, match=r"checkout: got 1 changed or new files \(new.py, ...\)"):
        images.make(order(**PUSH), root)
    assert docker.asked() == []


def test_a_changed_checkout_is_tagged_as_such_and_names_no_commit(docker, root):
    (root / "new.py").touch()
    (made,) = images.make(order(), root)
    assert made.tags[1] == f"{__version__}-{commit_of(root)[:12]}-changed"
    assert not [word for word in docker.asked("buildx", "build")[0] if "COMMIT" in word]


def test_an_engine_that_does_not_answer_is_one_line(docker, root):
    docker.answer("version", status=1, err="a\nCannot connect to the Docker daemon")
    with pytest.raises(ValueError, match=r"docker: got no engine \(Cannot connect .*\), expected"):
        images.make(order(), root)


def test_a_missing_docker_or_git_is_one_line(root, tmp_path, monkeypatch, capsys):
    only = tmp_path / "bin"
    only.mkdir()
    (only / "git").symlink_to(shutil.which("git"))
    monkeypatch.setenv("PATH", str(only))
    with pytest.raises(ValueError, match=r"docker: got no engine \(.*'docker'\), expected"):
        images.make(order(), root)
    (only / "git").unlink()
    assert images.main(["cpu"]) == 1
    assert capsys.readouterr().err.endswith("No such file or directory: 'git'\n")


@pytest.mark.parametrize("failing", [("buildx", "build"), ("push",)])
def test_what_fails_ends_it_and_leaves_the_overlay(docker, root, failing):
    docker.answer(*failing, status=7)
    before = listed_text(root)
    with pytest.raises(ValueError, match=r"docker .*: got exit status 7, expected 0"):
        images.make(images.Order(**PUSH, cluster="prod"), root)
    assert listed_text(root) == before
    assert len(docker.asked(*failing)) == 1


def listed_text(root):
    return (root / "infra" / "overlays" / "prod" / "images" / "kustomization.yaml").read_text()


def test_the_command_line_says_names_and_digests(docker, root, monkeypatch, capfd):
    monkeypatch.setattr(images, "ROOT", root)
    assert images.main(["cpu", "--registry", "registry.example.com/team", "--push"]) == 0
    (line,) = [at for at in capfd.readouterr().out.splitlines() if at.startswith("registry")]
    name, tag = "registry.example.com/team/flowloom/cpu", commit_of(root)[:12]
    assert line == f"{name}:{__version__} {name}:{__version__}-{tag} {DIGEST}"
    assert images.main(["cpu", "--push"]) == 1
    assert capfd.readouterr().err == (
        "images: registry: got none, expected one to push to, as registry.example.com/team\n"
    )
    with pytest.raises(SystemExit):
        images.main(["sun"])
    assert "targets: got 'sun', expected some of cpu, gpu, render" in capfd.readouterr().err
