"""Publishing to S3 and fetching from it over a line that fails, against moto's server.

Facts pinned:
- requests refused, answered late or never, lost after they were carried out, broken off in the
  middle of a part or of an answer, or damaged on the way, each at each kind of request: one call of
  `publish` or `fetch` gets over it;
- with a third of all requests so treated, repeated calls end with the objects of an undisturbed
  publication: none lost, none twice, none damaged, no upload left unfinished;
- a line that fails for good is one error, after which the same call goes on.
"""

import functools
import http.client
import random
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from botocore import session

from flowloom import runs
from flowloom.lifecycle import remotes, s3, versioning
from flowloom.lifecycle.objects import md5_of, object_key
from flowloom.lifecycle.remotes import UnreachableError

MIB = 1 << 20
PART_BYTES = 5 * MIB  # the least that S3 takes
LARGE_BYTES = 11 * MIB  # three parts
LATE_S = 2.0
REQUESTS = ("list", "create", "part", "complete", "object", "head")
ANSWERS = ("get", "manifest")
FAULTS = ("500", "503", "reset", "lost", "damaged")


class Line(BaseHTTPRequestHandler):
    """Passes requests on to the server, but for those that its plan spoils."""

    protocol_version = "HTTP/1.1"
    server_address: tuple
    plan = None

    def log_message(self, *_):
        pass

    def do_GET(self):
        fault = type(self).plan(self._kind())
        length = int(self.headers.get("Content-Length", 0))
        if fault == "reset":
            self.rfile.read(length // 2)
            # Closing with this set sends a reset, not an end.
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length)
        if fault in ("500", "503"):
            return self._answer(int(fault), {"Content-Type": "application/xml"}, b"")
        if fault == "damaged" and body:
            body = spoiled(body)
        status, headers, data = self._pass_on(body)
        if fault == "late":
            threading.Event().wait(LATE_S * 1.2)
        if fault in ("late", "lost"):
            self.close_connection = True
        elif fault == "cut":
            self._answer(status, headers, data, data[: len(data) // 2])
            self.close_connection = True
        else:
            spoil = fault == "damaged" and self.command == "GET"
            self._answer(status, headers, spoiled(data) if spoil else data)

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _kind(self):
        path, _, query = self.path.partition("?")
        if self.command == "PUT":
            return "part" if "partNumber" in query else "object"
        if self.command == "POST":
            return "complete" if "uploadId" in query else "create"
        if self.command == "HEAD":
            return "head"
        if query:
            return "list"
        return "manifest" if path.endswith(".dir") else "get"

    def _pass_on(self, body):
        server = http.client.HTTPConnection(*self.server_address)
        server.request(self.command, self.path, body, dict(self.headers))
        answer = server.getresponse()
        data = answer.read()
        server.close()
        return answer.status, dict(answer.getheaders()), data

    def _answer(self, status, headers, data, sent=None):
        self.send_response(status)
        for key, value in headers.items():
            if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(key, value)
        length = headers.get("Content-Length", 0) if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if sent is None else sent)


def spoiled(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data


@pytest.fixture(scope="module")
def moto():
    from moto.server import ThreadedMotoServer

    # Reading what a client knows of S3 takes a tenth of a second: once is enough.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "create_loader", functools.cache(session.create_loader))
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        yield server.get_host_and_port()
        server.stop()


@pytest.fixture
def line(moto, monkeypatch):
    """An empty bucket behind a line; its `plan` maps a kind of request to a fault, or None."""
    handler = type("Handler", (Line,), {"server_address": moto, "plan": lambda kind: None})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*moto))
    monkeypatch.setenv("FLOWLOOM_STORE", "s3://artifacts/store")
    handler.direct = remotes.find("store")._client
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setattr(s3, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    handler.direct.create_bucket(Bucket="artifacts")
    yield handler
    proxy.shutdown()
    proxy.server_close()
    for upload in uploads(handler.direct):
        handler.direct.abort_multipart_upload(
            Bucket="artifacts", Key=upload["Key"], UploadId=upload["UploadId"]
        )
    for key in stored(handler.direct):
        handler.direct.delete_object(Bucket="artifacts", Key=key)
    handler.direct.delete_bucket(Bucket="artifacts")


class Once:
    """A plan: the first request of each of these kinds has a fault."""

    def __init__(self, kinds, fault):
        self.left, self._fault, self._lock = list(kinds), fault, threading.Lock()

    def __call__(self, kind):
        with self._lock:
            if kind not in self.left:
                return None
            self.left.remove(kind)
            return self._fault


def uploads(client):
    return client.list_multipart_uploads(Bucket="artifacts").get("Uploads", [])


def stored(client):
    """Bytes by key of every object there is."""
    found = client.list_objects_v2(Bucket="artifacts").get("Contents", ())
    return {
        item["Key"]: client.get_object(Bucket="artifacts", Key=item["Key"])["Body"].read()
        for item in found
    }


def contents(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("artifact") / "artifact"
    (root / "nested").mkdir(parents=True)
    for k in range(4):
        (root / "nested" / f"{k}.bin").write_bytes(bytes([k]) * 1000)
    (root / "large.bin").write_bytes(random.Random(0).randbytes(LARGE_BYTES))
    return root


def expect_published(line, folder, pointer):
    assert pointer.md5 == runs.folder_digest(folder)
    keys = {f"store/{object_key(e['md5'])}" for e in runs.folder_entries(folder)}
    found = stored(line.direct)
    assert set(found) == keys | {f"store/{object_key(pointer.md5)}"}
    for key, data in found.items():
        assert key.removesuffix(".dir").replace("/", "").endswith(md5_of(data))
    assert uploads(line.direct) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_requests_of_each_kind_that_fail_once_cost_nothing(line, folder, fault):
    line.plan = plan = Once(REQUESTS, fault)
    expect_published(line, folder, versioning.publish(folder))
    assert plan.left == []


def test_answers_that_fail_once_cost_nothing(line, folder, tmp_path):
    pointer = versioning.publish(folder)
    for fault in (*FAULTS, "cut"):
        line.plan = plan = Once(ANSWERS, fault)
        versioning.fetch(pointer, tmp_path / fault)
        assert plan.left == []
        assert contents(tmp_path / fault) == contents(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((*FAULTS, "cut"))


def test_an_answer_that_is_late_is_not_waited_for(line, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(s3, "TIMEOUT_S", LATE_S)
    line.plan = Once(("part", "complete"), "late")
    pointer = versioning.publish(folder)
    expect_published(line, folder, pointer)
    line.plan = plan = Once(("get",), "late")
    versioning.fetch(pointer, tmp_path / "again")
    assert plan.left == []
    assert contents(tmp_path / "again") == contents(folder)


@pytest.mark.parametrize("seed", range(2))
def test_a_line_on_which_a_third_fails(line, folder, tmp_path, seed):
    chance = random.Random(seed)
    faults = [*FAULTS, "cut"]
    lock = threading.Lock()

    def plan(kind):
        with lock:
            return chance.choice(faults) if chance.random() < 1 / 3 else None

    line.plan = staticmethod(plan)
    pointer = until_done(lambda: versioning.publish(folder))
    expect_published(line, folder, pointer)
    until_done(lambda: versioning.fetch(pointer, tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def until_done(call):
    for _ in range(30):
        try:
            return call()
        except ValueError as error:
            if not isinstance(error, UnreachableError) and "damaged" not in str(error):
                raise
    raise AssertionError("never done")


@pytest.mark.parametrize("fault", ["503", "reset", "damaged"])
def test_a_line_that_fails_for_good_is_one_error(line, folder, fault):
    line.plan = staticmethod(lambda kind: fault if kind in ("part", "complete") else None)
    with pytest.raises(UnreachableError, match="remote 'store'") as caught:
        versioning.publish(folder)
    assert len(str(caught.value).splitlines()) == 1
    found = stored(line.direct)
    assert not any(key.endswith(".dir") for key in found)
    line.plan = staticmethod(lambda kind: None)
    expect_published(line, folder, versioning.publish(folder))
