"""Pins docs/deploy.md and its neighbours: blocks `sh` run as they stand, `sh fails` ends in one
clear line, and of blocks that need a network, docker or a cluster all that can be told without it:
syntax, options of our commands, make targets, paths, names of objects. Versions and secrets are
those of `infra/prerequisites.yaml`; the table of sizes is what `benchmarks.sizes` prints."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import sizes
from flowloom.cli.parser import build_parser
from pipelines.parser import build_parser as pipelines_parser
from tests.infra import rendered

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCED = re.compile(r"^```(sh[^\n]*)\n(.*?)^```$", re.M | re.S)
NEEDS = {"network", "docker", "cluster"}
"""Marks of blocks that are not run."""
PIPELINES = sorted(path.parent.name for path in ROOT.glob("pipelines/*/pipeline.py"))
NAMED = re.compile(
    r"\b(deployment|statefulset|cronjob|service|secret|persistentvolumeclaim)[s]?[/ ]"
    r"(flowloom-[a-z-]+)"
)


def blocks(name):
    """(marks, text) of every shell block of a page."""
    found = FENCED.findall((DOCS / name).read_text())
    return [(set(head.split()[1:]), text) for head, text in found]


def commands(text):
    """Words of each command of a block; continued lines are one, assignments before it dropped."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||;|(?<!\|)\|(?!\|)|\$\(|\)|&$", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # half of a quotation, cut at a pipe inside of it
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*|do|export", words[0]):
                words = words[1:]
            if words:
                yield words


PAGES = ("deploy.md", "operations.md")
ALL = [(page, marks, text) for page in PAGES for marks, text in blocks(page)]
ELSEWHERE = [(page, text) for page, marks, text in ALL if marks & NEEDS]
HERE = [text for page, marks, text in ALL if page == "deploy.md" and not marks]


def environment(folder):
    """This environment's programs first, no cluster, and nothing of a person's own set-up."""
    forgotten = ("KUBERNETES_SERVICE_HOST", "MLFLOW_TRACKING_URI", "FLOWLOOM_CLUSTER")
    kept = {key: value for key, value in os.environ.items() if key not in forgotten}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": programs, "KUBECONFIG": str(folder / "none"), "HOME": str(folder)}


def shell(text, folder, cwd=ROOT):
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=cwd,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_every_block_says_what_it_needs():
    assert len(HERE) >= 4
    for page, marks, _ in ALL:
        assert len(marks) <= 1, (page, marks)
        assert marks <= NEEDS | {"fails"}, (page, marks)


@pytest.mark.parametrize("text", HERE, ids=[text.splitlines()[0][:40] for text in HERE])
def test_what_needs_no_cluster_runs(text, tmp_path):
    if ("kubectl" in text or "make manifests" in text) and (why := rendered.reason()):
        pytest.skip(why)
    done = shell(text.replace(". .venv/bin/activate\n", ""), tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", [text for _, marks, text in ALL if "fails" in marks])
def test_what_fails_without_a_cluster_says_so_in_one_line(text, tmp_path):
    done = shell(text, tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"flowloom doctor: Kubernetes: [^\n]+\n", done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize(("page", "text"), ELSEWHERE)
def test_what_is_not_run_could_be(page, text, tmp_path):
    """Syntax, and whatever of it can be looked up."""
    done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words in commands(text):
        if words[0] == "flowloom":
            parses(build_parser().parse_args, words[1:])
        elif words[:3] == ["python", "-m", "pipelines"]:
            parses(pipelines_parser(PIPELINES).parse_args, words[3:])
        elif words[:2] == ["python", "-m"]:
            assert any((folder / f"{words[2].replace('.', '/')}.py").is_file()
                       for folder in (ROOT, ROOT / "src")), words  # fmt: skip
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
            for name in re.findall(r"CLUSTER=(\S+)", " ".join(words)):
                assert (ROOT / "infra" / "overlays" / name).is_dir(), words
        elif words[0] == "kubectl":
            for option in {"-k", "-f"} & set(words):
                path = words[words.index(option) + 1]
                assert path == "-" or "://" in path or (ROOT / path).exists(), words


def parses(parse, words):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            parse(words)
        except SystemExit as stop:
            raise AssertionError(f"{words}: {said.getvalue()}") from stop


@pytest.mark.parametrize(("page", "text"), ELSEWHERE)
def test_objects_that_are_named_are_there(page, text):
    declared = (ROOT / "infra" / "prerequisites.yaml").read_text()
    known = declared + "".join(path.read_text() for path in (ROOT / "infra").rglob("*.yaml"))
    for kind, name in NAMED.findall(text):
        assert re.search(rf"\bname: {name}\b|claim: {name}\b", known), (page, kind, name)


def test_images_are_made_as_far_as_an_engine(tmp_path):
    """The commands that make would run: the last one finds no engine, and nothing else to mend."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("git", "sh"):
        (programs / name).symlink_to(shutil.which(name))
    lines = [text for _, text in ELSEWHERE if "make images" in text]
    targets = [
        words for text in lines for words in commands(text) if words[:2] == ["make", "images"]
    ]
    assert len(targets) >= 2
    for words in targets:
        given = [word for word in words[2:] if word != "PUSH=1"]  # this checkout may be changed
        given += [] if len(given) == len(words) - 2 else ["CLUSTER="]
        printed = subprocess.run(
            ["make", "-n", "images", *given], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.replace("\\\n", " ")
        made = [line for line in printed.splitlines() if "-m infra.images" in line]
        command = made[-1].replace(".venv/bin/python", sys.executable)
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=ROOT,
            env={"PATH": str(programs)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert "docker: got no engine" in done.stderr


def test_the_pod_for_a_look_around_is_valid_and_as_restricted_as_others():
    page = (DOCS / "operations.md").read_text()
    pod = yaml.safe_load(re.search(r"<<'POD'\n(.*?)^POD$", page, re.M | re.S)[1])
    import kubernetes_validate

    for version in ("1.31", "1.37"):
        kubernetes_validate.validate(pod, version, strict=True)
    (container,) = pod["spec"]["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    assert not pod["spec"]["automountServiceAccountToken"]


def test_versions_are_those_declared():
    declared = yaml.safe_load((ROOT / "infra" / "prerequisites.yaml").read_text())
    page = (DOCS / "deploy.md").read_text()
    kubernetes = declared["kubernetes"]
    assert f"| Kubernetes | {kubernetes['min']} to {kubernetes['max']} |" in page
    for part in declared["components"]:
        assert re.search(rf"^\| {part['name']}\b[^|]*\| {re.escape(part['version'])}\b", page, re.M)
        if part["name"] != "karpenter":  # which every provider installs in its own way
            assert re.search(rf"=v?{re.escape(part['version'])}$", page, re.M), part["name"]
    assert f"Ours are written for {declared['time_zone']}" in page


def test_each_secret_is_listed_with_its_keys():
    declared = yaml.safe_load((ROOT / "infra" / "prerequisites.yaml").read_text())
    page = (DOCS / "deploy.md").read_text()
    for secret in declared["secrets"]:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{secret['name']}`"))
        assert {*re.findall(r"`([A-Z_]+)`", row)} == {*secret["keys"], *secret["optional"]}
        made = secret["name"].removeprefix("flowloom-")
        assert re.search(rf"^for name in .*\b{made}\b", page, re.M)
        for key in secret["keys"]:
            assert re.search(rf"^    {key}=", page, re.M)


def test_links_lead_somewhere():
    for name in ("deploy.md", "operations.md", "security.md"):
        for target in re.findall(r"\]\(([^)#]+)", (DOCS / name).read_text()):
            assert "://" in target or (DOCS / target).exists(), (name, target)


def test_files_and_tests_that_are_named_exist():
    """Of `docs/security.md`: what it says of the code can be looked up where it says."""
    page = (DOCS / "security.md").read_text()
    named = re.findall(r"`((?:[\w/]+/)?[\w]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 15
    for path, test in named:
        found = [
            base / path for base in (ROOT, ROOT / "src" / "flowloom") if (base / path).is_file()
        ]
        assert found, path
        assert not test or f"def {test}(" in found[0].read_text(), (path, test)
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for test in re.findall(r"`(?:::)?(test_\w+)`", page):
        assert f"def {test}(" in tests, test


def test_the_table_of_sizes_is_what_the_script_prints(capsys):
    page = (DOCS / "deploy.md").read_text()
    table = re.search(r"<!-- sizes -->\n(.*)<!-- /sizes -->", page, re.S)
    assert sizes.main([]) == 0
    assert table is not None
    assert table[1] == capsys.readouterr().out


def test_sizes_by_hand():
    """3,600 renders of 8 s and 1 s to score at .9 of bare speed: 10 GPU hours, in 4 hours on 3."""
    given = sizes.Assumptions(
        seconds_per_render=8.0,
        seconds_per_score=1.0,
        stage_frac=0.9,
        window_hours=4.0,
        gpus_per_node=2,
        training_gpu_hours=5.0,
        price=3.0,
        row_bytes=100.0,
        picture_mb=2.0,
        database_rows=7,
    )
    row = sizes.sizes(3600, given)
    assert row["GPU hours"] == pytest.approx(10.0)
    assert (row["GPUs"], row["nodes"]) == (3, 2)
    assert row["hours"] == pytest.approx(10 / 3)
    assert row["renders/s"] == pytest.approx(0.3)
    assert row["cost"] == pytest.approx(45.0)
    assert (row["rows MB"], row["pictures GB"]) == (pytest.approx(0.36), pytest.approx(7.2))


@pytest.mark.parametrize("option", ["--window-hours=0", "--price=-1", "--stage-frac=nan"])
def test_sizes_refuse_what_is_no_size(option, capsys):
    with pytest.raises(SystemExit):
        sizes.main([option])
    assert "expected a number" in capsys.readouterr().err
