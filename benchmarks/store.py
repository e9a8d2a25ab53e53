"""How fast artifacts are published and fetched, and what interruptions cost, beside plain `dvc`.

    python -m benchmarks.store [--quick] [--json]

5 MB in 20 files, to a folder and to S3 (moto's server, in a process of its own): seconds of the
best of some repeats, and of one command, whose ratio to `dvc push` or `dvc pull` is printed.
Then a publisher is killed: at random moments of the 5 MB, and in the middle of one large file, of
which what is sent and read again is counted. Last, two publishers work at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flowloom.lifecycle import remotes, versioning
from flowloom.lifecycle.pointer import Pointer, dvc_file
from flowloom.runs import file_md5, folder_digest

NUM_FILES, FILE_BYTES = 20, 250_000
BUCKET = "benchmark"
MB = 1_000_000
PUBLISH = """
import sys; from pathlib import Path; from flowloom.lifecycle import versioning
print("ready", flush=True); sys.stdin.readline()
for path in sys.argv[1:]: versioning.publish(Path(path))
"""
FETCH = """
import json, sys; from pathlib import Path; from flowloom.lifecycle import versioning
from flowloom.lifecycle.pointer import read_pointer
print("ready", flush=True); sys.stdin.readline()
versioning.fetch(read_pointer(sys.argv[1]), Path(sys.argv[2]))
"""


def serve(connection) -> None:
    """Run moto's server; sends its address."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection.send(f"http://{host}:{port}")
    threading.Event().wait()


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of an S3 server with an empty bucket, for this process and its children."""
    os.environ.update(
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(theirs,), daemon=True
    )
    process.start()
    try:
        os.environ["AWS_ENDPOINT_URL"] = ours.recv()
        import boto3

        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield os.environ["AWS_ENDPOINT_URL"]
    finally:
        process.kill()


def make_folder(folder: Path, num_files: int, file_bytes: int, seed: int) -> Path:
    """A folder of random bytes."""
    draw = random.Random(seed)
    for k in range(num_files):
        path = folder / f"part-{k % 4}" / f"{k}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw.randbytes(file_bytes))
    return folder


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds of a call."""
    return timed(function)[0]


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock seconds of a call, and CPU seconds of this process: other load matters less."""
    began, began_cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - began, time.process_time() - began_cpu


def speed(work: Path, repeats: int) -> dict[str, float]:
    """Best seconds to publish, publish again, and fetch 5 MB: in this process, and as commands."""
    rows: dict[str, float] = {}
    for name, place in (("local", str(work / "store")), ("s3", f"s3://{BUCKET}/store")):
        os.environ["FLOWLOOM_STORE"] = place
        times: dict[str, list[tuple[float, float]]] = {
            "publish": [],
            "publish_again": [],
            "fetch": [],
        }
        for k in range(repeats):
            folder = make_folder(work / f"{name}-{k}", NUM_FILES, FILE_BYTES, 100 + k)
            times["publish"].append(timed(lambda f=folder: versioning.publish(f)))
            times["publish_again"].append(timed(lambda f=folder: versioning.publish(f)))
            pointer = versioning.publish(folder)
            into = work / f"{name}-{k}-again"
            times["fetch"].append(timed(lambda p=pointer, i=into: versioning.fetch(p, i)))
            assert folder_digest(into) == pointer.md5
        folder = make_folder(work / f"{name}-command", NUM_FILES, FILE_BYTES, 99)
        dvc_path, into = work / f"{name}.dvc", work / f"{name}-command-again"
        rows[f"{name}_publish_command_s"] = seconds(
            lambda f=folder, p=dvc_path: flowloom("publish", f, "--out", p)
        )
        rows[f"{name}_fetch_command_s"] = seconds(
            lambda p=dvc_path, i=into: flowloom("fetch", p, "--into", i)
        )
        for step, found in times.items():
            rows[f"{name}_{step}_s"], rows[f"{name}_{step}_cpu_s"] = map(
                min, zip(*found, strict=True)
            )
    return rows


def flowloom(action: str, *arguments: object) -> None:
    """Run `flowloom artifact` in a process of its own."""
    command = [sys.executable, "-m", "flowloom", "artifact", action, *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def dvc_speed(work: Path, endpoint: str) -> dict[str, float]:
    """Seconds of `dvc push` and of `dvc pull` of as much, to a folder and to S3."""
    repo = work / "repo"
    make_folder(repo / "artifact", NUM_FILES, FILE_BYTES, 7)
    (repo / ".dvc").mkdir()
    (repo / ".dvc" / "config").write_text(
        "[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n"
        f"['remote \"local\"']\n    url = {work / 'dvc-store'}\n"
        f"['remote \"s3\"']\n    url = s3://{BUCKET}/dvc\n    endpointurl = {endpoint}\n"
    )

    def dvc(*arguments: str) -> None:
        command = [sys.executable, "-m", "dvc", *arguments, "--quiet"]
        subprocess.run(command, cwd=repo, check=True)

    dvc("add", "artifact")
    rows = {}
    for name in ("local", "s3"):
        rows[f"dvc_{name}_push_s"] = seconds(lambda n=name: dvc("push", "--remote", n))
        shutil.rmtree(repo / "artifact")
        shutil.rmtree(repo / ".dvc" / "cache")
        rows[f"dvc_{name}_pull_s"] = seconds(lambda n=name: dvc("pull", "--remote", n))
    return rows


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that has imported what it needs and waits for `go`."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def go(process: subprocess.Popen[str]) -> None:
    """Let it begin."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def killed(work: Path, kills: int) -> dict[str, float]:
    """Kill publishers at random moments; every object they leave must be whole."""
    os.environ["FLOWLOOM_STORE"] = str(work / "killed")
    folder = make_folder(work / "many", 40, FILE_BYTES, 1)
    draw, died = random.Random(0), 0
    for _ in range(kills):
        process = start(PUBLISH, folder)
        go(process)
        time.sleep(draw.uniform(0.0, 0.05))
        process.kill()
        died += process.wait() == -signal.SIGKILL
        for path in (work / "killed" / "files").glob("*/*/*"):
            digest = path.parent.name + path.name.removesuffix(".dir")
            assert file_md5(path) == digest, f"{path} is damaged"
    pointer = versioning.publish(folder)
    assert not any((work / "killed" / "partial").iterdir())
    versioning.fetch(pointer, work / "killed-again")
    return {"kills": died, "damaged_after_kills": 0}


def resumed(work: Path, large_bytes: int) -> dict[str, float]:
    """Kill a publisher and a fetcher of one large file in S3 halfway; count what is moved again."""
    os.environ["FLOWLOOM_STORE"] = f"s3://{BUCKET}/large"
    folder = make_folder(work / "large", 1, large_bytes, 2)
    digest = file_md5(next(folder.rglob("*.bin")))
    remote = remotes.find("store")
    process = start(PUBLISH, folder)
    go(process)
    there = 0
    while there < large_bytes / 2:
        time.sleep(0.01)
        there = unfinished_bytes(f"large/{remotes.object_key(digest)}")
    process.kill()
    process.wait()
    there = unfinished_bytes(f"large/{remotes.object_key(digest)}")
    rows: dict[str, float] = {"large_mb": large_bytes / MB, "sent_before_kill_mb": there / MB}
    rows["publish_resumed_s"] = seconds(lambda: versioning.publish(folder))
    assert remote.has(digest, large_bytes)
    pointer = versioning.publish(folder)

    into = work / "large-again"
    partial = work / f"large-again.{pointer.md5[:12]}.partial" / digest
    (work / "p.dvc").write_text(dvc_file(pointer, "large"))
    process = start(FETCH, work / "p.dvc", into)
    go(process)
    while not partial.exists() or partial.stat().st_size < large_bytes / 2:
        time.sleep(0.001)
    process.kill()
    process.wait()
    rows["read_before_kill_mb"] = partial.stat().st_size / MB if partial.exists() else 0.0
    rows["fetch_resumed_s"] = seconds(lambda: versioning.fetch(pointer, into))
    assert folder_digest(into) == pointer.md5
    return rows


def unfinished_bytes(key: str) -> int:
    """Bytes of the parts of an unfinished upload."""
    import boto3

    client = boto3.client("s3")
    uploads = client.list_multipart_uploads(Bucket=BUCKET, Prefix=key).get("Uploads", ())
    parts = [
        client.list_parts(Bucket=BUCKET, Key=key, UploadId=upload["UploadId"]).get("Parts", ())
        for upload in uploads
    ]
    return sum(part["Size"] for found in parts for part in found)


def two_at_once(work: Path, rounds: int) -> dict[str, float]:
    """Two processes publish overlapping folders, to a folder and to S3; count what is lost."""
    lost = 0
    for place in (str(work / "shared"), f"s3://{BUCKET}/shared"):
        os.environ["FLOWLOOM_STORE"] = place
        name = "s3" if place.startswith("s3") else "local"
        folders = [make_folder(work / f"{name}-both-{k}", 8, 20_000, k) for k in range(rounds)]
        publishers = [start(PUBLISH, *folders), start(PUBLISH, *reversed(folders))]
        for process in publishers:
            go(process)
        assert [process.wait() for process in publishers] == [0, 0]
        for folder in folders:
            pointer = Pointer(folder_digest(folder), 0, 8)
            lost += len(versioning.verify_remote(pointer))
    return {"two_publishers_artifacts": 2 * rounds, "two_publishers_lost": lost}


def main() -> None:
    """Print a table; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, kills and bytes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, s3_server() as endpoint:
        work = Path(name)
        rows = speed(work, 3 if options.quick else 7)
        rows |= dvc_speed(work, endpoint)
        for where in ("local", "s3"):
            for ours, theirs in (("publish", "push"), ("fetch", "pull")):
                rows[f"{where}_{ours}_ratio"] = (
                    rows[f"dvc_{where}_{theirs}_s"] / rows[f"{where}_{ours}_command_s"]
                )
        rows |= killed(work, 5 if options.quick else 20)
        rows |= resumed(work, (60 if options.quick else 100) * MB)
        rows |= two_at_once(work, 5 if options.quick else 30)
    rows = {name: round(value, 4) for name, value in rows.items()}
    for name, value in rows.items():
        print(f"{name:28} {value}")
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
