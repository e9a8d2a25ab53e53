"""Publishing to S3 and fetching from it, against moto's server.

Facts pinned:
- `FLOWLOOM_STORE=s3://...` is where stages publish; plain `dvc pull` reads it from there;
- an upload that breaks off goes on: objects that are there are not sent again, nor parts of a
  large one, even where the publisher was killed; the manifest is sent last;
- a download goes on inside an object, in the same call and in the next;
- two publishers of one object, sharing its unfinished upload, both end well;
- damage is named, and mended by publishing again;
- no bucket, no credentials, no server and a wrong address are one line each.
"""

import dataclasses
import functools
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from botocore import session
from botocore.exceptions import ReadTimeoutError

from flowloom import runs
from flowloom.lifecycle import remotes, s3, versioning
from flowloom.lifecycle.objects import md5_of, object_key
from flowloom.lifecycle.pointer import Pointer, dvc_file
from flowloom.lifecycle.remotes import UnreachableError

MIB = 1 << 20
PART_BYTES = 5 * MIB  # the least that S3 takes
LARGE_BYTES = 13 * MIB  # three parts


@pytest.fixture(scope="module")
def endpoint():
    # Reading what a client knows of S3 takes a tenth of a second: once is enough.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "create_loader", functools.cache(session.create_loader))
        yield from serve()


def serve():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint, monkeypatch):
    """An empty bucket; the store is a prefix in it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("FLOWLOOM_STORE", "s3://artifacts/team/store")
    monkeypatch.setattr(s3, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    client = remotes.find("store")._client
    client.create_bucket(Bucket="artifacts")
    yield client
    for upload in client.list_multipart_uploads(Bucket="artifacts").get("Uploads", ()):
        client.abort_multipart_upload(
            Bucket="artifacts", Key=upload["Key"], UploadId=upload["UploadId"]
        )
    for key in keys(client):
        client.delete_object(Bucket="artifacts", Key=key)
    client.delete_bucket(Bucket="artifacts")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "artifact"
    (root / "nested").mkdir(parents=True)
    for k in range(6):
        (root / "nested" / f"{k}.bin").write_bytes(bytes([k]) * 1000)
    (root / "empty").touch()
    return root


@pytest.fixture
def large(folder):
    """The folder with a file of three parts, and the digest of that file."""
    path = folder / "large.bin"
    path.write_bytes(random.Random(0).randbytes(LARGE_BYTES))
    return folder, runs.file_md5(path)


def keys(client):
    found = client.list_objects_v2(Bucket="artifacts").get("Contents", ())
    return [item["Key"] for item in found]


def key_of(digest):
    return f"team/store/{object_key(digest)}"


def contents(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def calls(monkeypatch):
    """Names of the calls of every client, and a way to have the n-th of one break off."""

    class Calls(list):
        fail = ("", 0)

    made = Calls()

    def connect(remote, endpoint, real=s3.S3Remote._connect):
        client = real(remote, endpoint)

        def note(model, **_):
            made.append(model.name)
            name, number = made.fail
            if model.name == name and made.count(name) == number:
                raise ReadTimeoutError(endpoint_url="broken off")

        client.meta.events.register("before-call.s3", note)
        return client

    monkeypatch.setattr(s3.S3Remote, "_connect", connect)
    return made


def test_dvc_pulls_from_s3_what_was_published(bucket, endpoint, folder, tmp_path):
    repo = tmp_path / "repo"
    (repo / ".dvc").mkdir(parents=True)
    (repo / ".dvc" / "config").write_text(
        "[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n"
        "['remote \"store\"']\n    url = s3://artifacts/team/store\n"
        f"    endpointurl = {endpoint}\n"
    )
    pointer = versioning.publish(folder)
    (repo / "artifact.dvc").write_text(dvc_file(pointer, "artifact"))
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "pull", "artifact.dvc"],
        cwd=repo,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert contents(repo / "artifact") == contents(folder)


def test_publish_and_fetch(bucket, large, tmp_path, calls, monkeypatch):
    folder, _ = large
    pointer = versioning.publish(folder)
    assert pointer == Pointer(runs.folder_digest(folder), LARGE_BYTES + 6000, 8, remote="store")
    assert len(keys(bucket)) == 9
    assert calls.count("UploadPart") == 3
    calls.clear()
    assert versioning.publish(folder) == pointer
    assert set(calls) == {"HeadObject"}
    versioning.fetch(pointer, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    monkeypatch.setenv("FLOWLOOM_STORE", "s3://artifacts/team/store/")
    assert versioning.verify_remote(pointer) == []


def test_an_upload_that_breaks_off_goes_on(bucket, large, calls, tmp_path):
    folder, _ = large
    calls.fail = ("UploadPart", 3)
    with pytest.raises(UnreachableError, match=r"remote 'store' \(s3://artifacts/team/store\): "):
        versioning.publish(folder)
    assert not any(key.endswith(".dir") for key in keys(bucket))
    sent = len(keys(bucket))
    calls.clear()
    calls.fail = ("PutObject", 7 - sent + 1)  # the manifest's
    with pytest.raises(UnreachableError):
        versioning.publish(folder)
    assert calls.count("UploadPart") == 1
    assert "CreateMultipartUpload" not in calls
    assert len(keys(bucket)) == 8
    calls.clear()
    calls.fail = ("", 0)
    pointer = versioning.publish(folder)
    assert calls.count("PutObject") == 1
    assert calls.count("UploadPart") == 0
    versioning.fetch(pointer, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


KILLED = """
import os, signal, sys
from pathlib import Path
from flowloom.lifecycle import s3, versioning
s3.PART_BYTES = int(sys.argv[2])
real, parts = s3.S3Remote._connect, 0
def connect(remote, endpoint):
    client = real(remote, endpoint)
    def note(model, **_):
        global parts
        parts += model.name == "UploadPart"
        if parts == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    client.meta.events.register("before-call.s3", note)
    return client
s3.S3Remote._connect = connect
versioning.publish(Path(sys.argv[1]))
"""


def test_a_killed_publisher_is_gone_on_with(bucket, large, calls, tmp_path):
    folder, _ = large
    command = [sys.executable, "-c", KILLED, folder, str(PART_BYTES)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    for key in keys(bucket):
        data = bucket.get_object(Bucket="artifacts", Key=key)["Body"].read()
        assert key == key_of(md5_of(data))
    pointer = versioning.publish(folder)
    assert calls.count("UploadPart") == 1
    versioning.fetch(pointer, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_a_part_that_is_not_ours_is_sent_again(bucket, large, calls):
    folder, digest = large
    at = {"Bucket": "artifacts", "Key": key_of(digest)}
    upload = bucket.create_multipart_upload(**at)["UploadId"]
    bucket.upload_part(**at, UploadId=upload, PartNumber=1, Body=b"x" * PART_BYTES)
    versioning.publish(folder)
    assert calls.count("UploadPart") == 3
    data = bucket.get_object(**at)["Body"].read()
    assert hashlib.md5(data).hexdigest() == digest


def test_two_publishers_share_an_unfinished_upload(bucket, large, calls, monkeypatch):
    """One finishes while the other is between its parts."""
    folder, digest = large
    remote, other = remotes.find("store"), remotes.find("store")
    path = folder / "large.bin"
    began = threading.Event()

    def note(model, **_):
        if model.name == "UploadPart" and not began.is_set():
            began.set()
            other.put(digest, path)

    remote._client.meta.events.register("before-call.s3", note)
    remote.put(digest, path)
    assert remote.has(digest, LARGE_BYTES)
    assert remote.digest_of(digest) == digest
    assert "Uploads" not in bucket.list_multipart_uploads(Bucket="artifacts")


def test_two_processes_publish_at_once(bucket, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for k in range(6):
        (other / f"{k}.bin").write_bytes(bytes([k + 3]) * 1000)
    program = (
        "import sys; from pathlib import Path; from flowloom.lifecycle import versioning\n"
        "for path in sys.argv[1:]: versioning.publish(Path(path))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", program, *paths])
        for paths in ((folder, other), (other, folder))
    ]
    assert [process.wait() for process in both] == [0, 0]
    for path in (folder, other):
        pointer = Pointer(runs.folder_digest(path), 0, len(contents(path)))
        versioning.fetch(pointer, tmp_path / "again" / path.name)
        assert contents(tmp_path / "again" / path.name) == contents(path)


class Broken:
    """A stream that breaks off after some bytes."""

    def __init__(self, stream, after):
        self._stream, self._left = stream, after

    def read(self, size=-1):
        if self._left <= 0:
            raise ReadTimeoutError(endpoint_url="broken off")
        data = self._stream.read(size)
        self._left -= len(data)
        return data


def test_a_download_goes_on_inside_an_object(bucket, large, tmp_path, monkeypatch):
    folder, digest = large
    pointer = versioning.publish(folder)
    starts = []
    real = s3.S3Remote._open

    def broken(remote, asked, start=0):
        stream = real(remote, asked, start)
        if asked != digest:
            return stream
        starts.append(start)
        return Broken(stream, 2 * MIB)

    monkeypatch.setattr(s3.S3Remote, "_open", broken)
    versioning.fetch(pointer, tmp_path / "again")
    # Tries that got on do not count: there are more of them than ATTEMPTS.
    assert starts == [k * MIB for k in range(0, 14, 2)]
    assert contents(tmp_path / "again") == contents(folder)

    # Without an end the tries are bounded; what came stays for the next call.
    def dead(remote, asked, start=0):
        return Broken(real(remote, asked, start), 0 if start else 4 * MIB)

    monkeypatch.setattr(s3.S3Remote, "_open", dead)
    with pytest.raises(UnreachableError, match="broken off"):
        versioning.fetch(pointer, tmp_path / "new" / "other")
    (partial,) = (tmp_path / "new").iterdir()
    assert (partial / digest).stat().st_size == 4 * MIB
    starts.clear()
    monkeypatch.setattr(s3.S3Remote, "_open", broken)
    versioning.fetch(pointer, tmp_path / "new" / "other")
    assert starts[0] == 4 * MIB
    assert contents(tmp_path / "new" / "other") == contents(folder)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["other"]


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * 5000, b"\1" * 1000])
def test_a_partial_that_is_not_its_beginning_is_given_up(bucket, folder, tmp_path, left):
    pointer = versioning.publish(folder)
    partial = tmp_path / f"again.{pointer.md5[:12]}.partial"
    partial.mkdir()
    (partial / runs.file_md5(folder / "nested" / "1.bin")).write_bytes(left)
    versioning.fetch(pointer, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_damage_is_named(bucket, folder, tmp_path):
    pointer = versioning.publish(folder)
    digest = runs.file_md5(folder / "nested" / "3.bin")
    at = {"Bucket": "artifacts", "Key": key_of(digest)}
    bucket.put_object(**at, Body=b"other")
    said = f"nested/3.bin: object {digest}: got 5 bytes of digest {md5_of(b'other')}"
    with pytest.raises(ValueError, match=re.escape(said)):
        versioning.fetch(pointer, tmp_path / "new" / "again")
    bucket.put_object(**at, Body=b"x" * 1000)  # of the right size
    assert len(versioning.verify_remote(pointer)) == 1
    versioning.publish(folder)
    assert versioning.verify_remote(pointer) == []
    bucket.delete_object(**at)
    with pytest.raises(ValueError, match=rf"nested/3.bin: got no object {digest}"):
        versioning.fetch(pointer, tmp_path / "new" / "again")
    assert list((tmp_path / "new").iterdir()) == []
    assert versioning.verify_remote(pointer) == [
        versioning.Difference("nested/3.bin", digest, None)
    ]
    bucket.delete_object(Bucket="artifacts", Key=key_of(pointer.md5))
    with pytest.raises(ValueError, match=f"got no manifest {pointer.md5}"):
        versioning.fetch(pointer, tmp_path / "again")
    assert versioning.publish(folder) == pointer
    versioning.fetch(pointer, tmp_path / "again")


def test_a_large_file_that_changes_while_it_is_published_is_named(bucket, large):
    folder, digest = large
    (folder / "large.bin").write_bytes(b"x" * LARGE_BYTES)
    with pytest.raises(ValueError, match=r"large.bin: got digest .*: changed meanwhile"):
        remotes.find("store").put(digest, folder / "large.bin")
    assert keys(bucket) == []
    assert "Uploads" not in bucket.list_multipart_uploads(Bucket="artifacts")


def test_what_is_wrong_with_a_remote_is_one_line(bucket, folder, tmp_path, monkeypatch):
    pointer = dataclasses.replace(versioning.publish(folder))

    def refused(said):
        for call in (
            lambda: versioning.publish(folder),
            lambda: versioning.fetch(pointer, tmp_path / "new" / "again"),
        ):
            with pytest.raises(ValueError, match=said) as caught:
                call()
            assert len(str(caught.value).splitlines()) == 1
            assert str(caught.value).startswith("remote 'store'")
        assert not (tmp_path / "new").exists()

    monkeypatch.setenv("FLOWLOOM_STORE", "s3://elsewhere/store")
    refused("no such bucket")
    monkeypatch.setenv("FLOWLOOM_STORE", "s3:///store")
    refused("got 's3:///store', expected s3://bucket/prefix")
    monkeypatch.setenv("FLOWLOOM_STORE", "s3://a b/store")
    refused("got 's3://a b/store', expected s3://bucket/prefix")
    monkeypatch.setenv("FLOWLOOM_STORE", "s3://artifacts/store")
    monkeypatch.setenv("FLOWLOOM_S3_ENDPOINT", "http://127.0.0.1:9")
    refused("Could not connect to the endpoint URL")
    monkeypatch.setenv("FLOWLOOM_S3_ENDPOINT", "nonsense")
    refused("Invalid endpoint: nonsense")
    monkeypatch.delenv("FLOWLOOM_S3_ENDPOINT")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    refused("got no credentials, expected AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    refused(r"The config profile \(nobody\) could not be found")
