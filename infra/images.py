"""Build the images of `infra/Dockerfile`, name them, push them, and have an overlay run them.

    python -m infra.images [cpu gpu render] [--registry HOST/PATH] [--push] [--cluster NAME]

Each gets two tags: the package's version, and that with the commit, which no later build takes
away. A pushed image has a digest, which is printed at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from flowloom import __version__

ROOT = Path(__file__).parents[1]
DOCKERFILE = "infra/Dockerfile"
TARGETS = ("cpu", "gpu", "render")
HEADER = (
    "# Which images this cluster runs; `make images CLUSTER={cluster}` writes the file whole.\n"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What to build, and what becomes of it."""

    targets: tuple[str, ...] = ()
    """Stages of the Dockerfile; none: those that the cluster runs, or all."""
    registry: str | None = None
    """Comes before the names, as `registry.example.com/team`."""
    push: bool = False
    """Send the images to where their names say."""
    cluster: str | None = None
    """Overlay that is to run them."""
    torch: str | None = None
    """As pip understands it; else the Dockerfile's."""
    torch_args: str = ""
    """Further pip arguments for `cpu`'s torch."""
    gpu_torch_args: str = ""
    """The same for the others'."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Image:
    """One that was built."""

    plain: str
    """Its name in manifests, without registry and tag."""
    name: str
    """Its name with the registry."""
    tags: tuple[str, str]
    """Version, and version with commit."""
    digest: str | None = None
    """What pulls exactly this; None unless it was pushed."""

    @property
    def entry(self) -> dict[str, str]:
        """What an overlay's `images:` says of it."""
        chosen = {"digest": self.digest} if self.digest else {"newTag": self.tags[1]}
        renamed = {} if self.name == self.plain else {"newName": self.name}
        return {"name": self.plain, **renamed, **chosen}


def make(order: Order, root: Path) -> list[Image]:
    """Build, push and write what an order says; the images in its order.

    Raises:
        ValueError: Nothing can be built, pushed or written; nothing was begun unless docker failed.
    """
    commit, changed = checkout(root)
    if changed and order.push:
        raise ValueError(
            f"checkout: got {len(changed)} changed or new files ({changed[0]}, ...), expected none "
            "with a push: the tag names a commit"
        )
    if order.push and not order.registry:
        raise ValueError(
            "registry: got none, expected one to push to, as registry.example.com/team"
        )
    overlay = overlay_file(root, order.cluster) if order.cluster else None
    if overlay and not order.push and by_digest(overlay):
        raise ValueError(
            f"{overlay.relative_to(root)}: got images by digest and no push, expected PUSH=1: "
            "only a pushed image has one"
        )
    build = engine()
    suffix = f"{commit[:12]}-changed" if changed else commit[:12]
    made = []
    for target in order.targets or (run_by(overlay) if overlay else TARGETS):
        plain = f"flowloom/{target}"
        name = f"{order.registry.rstrip('/')}/{plain}" if order.registry else plain
        image = Image(plain=plain, name=name, tags=(__version__, f"{__version__}-{suffix}"))
        run(build_command(build, target, image, order, "" if changed else commit), root)
        made.append(pushed(image, root) if order.push else image)
    if overlay and order.cluster:
        write_overlay(overlay, order.cluster, made)
    return made


def checkout(root: Path) -> tuple[str, list[str]]:
    """Commit of a checkout, and the files that differ from it or are not in it."""
    commit = said(["git", "-C", str(root), "rev-parse", "HEAD"]).strip()
    status = said(["git", "-C", str(root), "status", "--porcelain"])
    return commit, [line[3:] for line in status.splitlines()]


def engine() -> list[str]:
    """The command that builds.

    Raises:
        ValueError: No docker, or none that answers.
    """
    try:
        said(["docker", "version", "--format", "{{.Server.Version}}"])
    except (OSError, ValueError) as error:
        last = str(error).splitlines()[-1]
        raise ValueError(f"docker: got no engine ({last}), expected one that answers") from error
    try:
        said(["docker", "buildx", "version"])
    except ValueError:
        return ["docker", "build"]
    return ["docker", "buildx", "build", "--load"]


def build_command(
    build: list[str], target: str, image: Image, order: Order, commit: str
) -> list[str]:
    """The whole command for one target."""
    args = {
        "VERSION": image.tags[0],
        "COMMIT": commit,
        "TORCH": order.torch,
        "TORCH_ARGS": order.torch_args if target == "cpu" else order.gpu_torch_args,
    }
    given = [f"--build-arg={name}={value}" for name, value in args.items() if value]
    tags = [f"--tag={image.name}:{tag}" for tag in image.tags]
    return [*build, f"--file={DOCKERFILE}", f"--target={target}", *given, *tags, "."]


def pushed(image: Image, root: Path) -> Image:
    """Send an image under both its tags.

    Raises:
        ValueError: Docker refused, or knows no digest afterwards.
    """
    for tag in image.tags:
        run(["docker", "push", f"{image.name}:{tag}"], root)
    ask = ["docker", "image", "inspect", "--format={{json .RepoDigests}}"]
    found = said([*ask, f"{image.name}:{image.tags[1]}"])
    for known in json.loads(found) or []:
        name, _, digest = known.partition("@")
        if name == image.name:
            return dataclasses.replace(image, digest=digest)
    raise ValueError(f"{image.name}: got digests {found.strip()}, expected one of its own")


def overlay_file(root: Path, cluster: str) -> Path:
    """Where an overlay says which images it runs.

    Raises:
        ValueError: There is no such overlay.
    """
    overlays = root / "infra" / "overlays"
    if not (overlays / cluster).is_dir():
        known = ", ".join(sorted(path.name for path in overlays.iterdir()))
        raise ValueError(f"cluster: got {cluster!r}, expected one of {known}")
    return overlays / cluster / "images" / "kustomization.yaml"


def entries(overlay: Path) -> list[dict[str, str]]:
    """What an overlay says now."""
    return yaml.safe_load(overlay.read_text())["images"] if overlay.is_file() else []


def by_digest(overlay: Path) -> bool:
    """Whether an overlay pulls by digest; it goes on doing so."""
    return any("digest" in entry for entry in entries(overlay))


def run_by(overlay: Path) -> list[str]:
    """Targets of which an overlay runs the images."""
    names = {entry["name"] for entry in entries(overlay)}
    return [target for target in TARGETS if f"flowloom/{target}" in names]


def write_overlay(overlay: Path, cluster: str, made: list[Image]) -> None:
    """Have an overlay run the images that were made; what it says of others stays."""
    said_now = {entry["name"]: entry for entry in entries(overlay)}
    listed = list((said_now | {image.plain: image.entry for image in made}).values())
    body = {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component", "images": listed}
    overlay.parent.mkdir(parents=True, exist_ok=True)
    overlay.write_text(HEADER.format(cluster=cluster) + yaml.safe_dump(body, sort_keys=False))


def said(command: list[str]) -> str:
    """What a command prints.

    Raises:
        ValueError: Another status than 0.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip() or f"{command[0]}: exit status {done.returncode}")
    return done.stdout


def run(command: list[str], folder: Path) -> None:
    """Run a command in front of the person who asked.

    Raises:
        ValueError: Another status than 0.
    """
    print(f"+ {shlex.join(command)}", file=sys.stderr)
    status = subprocess.run(command, cwd=folder, check=False).returncode
    if status:
        raise ValueError(f"{shlex.join(command)}: got exit status {status}, expected 0")


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="infra.images", description=__doc__.splitlines()[0])
    parser.add_argument(
        "targets", nargs="*", help=f"of {' '.join(TARGETS)}; default: all of the cluster"
    )
    parser.add_argument("--registry", help="comes before the names, as registry.example.com/team")
    parser.add_argument("--push", action="store_true", help="send the images to where they belong")
    parser.add_argument("--cluster", help="overlay that is to run them")
    parser.add_argument("--torch", help="as pip understands it")
    parser.add_argument("--torch-args", default="", help="further pip arguments for cpu's torch")
    parser.add_argument("--gpu-torch-args", default="", help="the same for the others' torch")
    options = vars(parser.parse_args(argv))
    targets = tuple(options.pop("targets"))
    if unknown := [name for name in targets if name not in TARGETS]:
        parser.error(f"targets: got {unknown[0]!r}, expected some of {', '.join(TARGETS)}")
    try:
        made = make(Order(targets=targets, **options), ROOT)
    except (ValueError, OSError) as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    for image in made:
        names = " ".join(f"{image.name}:{tag}" for tag in image.tags)
        print(names, image.digest or "(no digest: not pushed)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
