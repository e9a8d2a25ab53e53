"""Facts pinned: every command takes a server's address, behind a path prefix and a proxy that asks
for a header too; whatever a server answers instead of `object_info` is one line and status 2."""

import gzip
import http.server
import json
import threading
from pathlib import Path

import pytest

from flowloom.workflow import Catalogue

OBJECT_INFO = gzip.decompress(Path("data/catalogues/comfyui-0.33.json.gz").read_bytes())
STATS = {
    "system": {"comfyui_version": "0.33.0", "python_version": "3.12.3 (main)"},
    "devices": [{"name": "cpu", "type": "cpu"}],
}
ROUTES = {
    "/object_info": ("application/json", OBJECT_INFO),
    "/system_stats": ("application/json", json.dumps(STATS).encode()),
    "/page/object_info": ("text/html", b"<html>Sign in</html>"),
    "/cut/object_info": ("application/json", OBJECT_INFO[:5000]),
    "/list/object_info": ("application/json", b"[]"),
    "/empty/object_info": ("application/json", b"{}"),
    "/odd/object_info": ("application/json", b'{"KSampler": {"input": 3}}'),
}
ROUTES |= {f"/comfy{path}": ROUTES[path] for path in ("/object_info", "/system_stats")}


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.headers_seen.append(dict(self.headers))
        path = self.path
        if path.startswith("/guarded"):
            path = path.removeprefix("/guarded")
            if self.headers.get("Authorization") != "Bearer token=1":
                self.send_error(401)
                return
        if path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", path.removeprefix("/moved"))
            self.end_headers()
            return
        if path not in ROUTES and path != "/short/object_info":
            self.send_error(404)
            return
        kind, body = ROUTES.get(path, ("application/json", b"{"))
        self.send_response(200)
        self.send_header("Content-Type", kind)
        # One route breaks off before all that it promised.
        self.send_header("Content-Length", str(len(body) + 100 * path.startswith("/short")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    """A server that answers `ROUTES`; gives its address."""
    fake = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    fake.headers_seen = []
    threading.Thread(target=fake.serve_forever, daemon=True).start()
    fake.address = f"http://127.0.0.1:{fake.server_address[1]}"
    yield fake
    fake.shutdown()
    fake.server_close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def test_every_command_takes_an_address(run, run_json, server, good, tmp_path):
    at = ("--catalogue", server.address)
    _, from_server = run_json("validate", good, *at)
    _, from_file = run_json("validate", good, "--catalogue", "comfyui-0.33")
    assert from_server == from_file
    assert run("encode", good, *at)[0] == 0
    assert run("convert", good, "--to", "ui", *at, "--out", tmp_path / "ui")[0] == 0
    status, _, err = run("catalogue", "snapshot", *at, "--out", tmp_path / "snapshot.json.gz")
    assert (status, err.split()[1]) == (0, "633")
    assert run("catalogue", "diff", server.address, "comfyui-0.33")[0] == 0
    assert run("catalogue", "diff", tmp_path / "snapshot.json.gz", server.address)[0] == 0
    status, shown = run_json("catalogue", "show", server.address)
    assert shown["hash"] == Catalogue.load("data/catalogues/comfyui-0.33.json.gz").hash
    # No model is installed there, so nothing can be drawn.
    classes = ("--classes", "KSampler,CheckpointLoaderSimple,SaveImage")
    out = tmp_path / "x.jsonl"
    assert run("sample", *at, "--n", 1, "--out", out, *classes)[0] == 2


@pytest.mark.parametrize("path", ["", "/", "/object_info", "/comfy", "/comfy/"])
def test_prefixes_and_slashes_do_not_matter(run, server, good, path):
    assert run("encode", good, "--catalogue", server.address + path)[0] == 0


def test_headers_reach_the_server(run, server, good):
    address = f"{server.address}/guarded"
    status, _, err = run("encode", good, "--catalogue", address)
    assert status == 2
    assert "got HTTP 401, expected a ComfyUI server, or a header that lets one in" in err
    server.headers_seen.clear()
    command = ("encode", good, "--catalogue", address, "--header")
    assert run(*command, "Authorization=Bearer token=1", "--header", "X-Team=a")[0] == 0
    (seen,) = server.headers_seen
    assert seen["X-Team"] == "a"
    # A browser's header gets another answer.
    assert "Origin" not in seen


def test_headers_do_not_follow_a_redirection(run, server, good):
    server.headers_seen.clear()
    command = ("encode", good, "--catalogue", f"{server.address}/moved")
    assert run(*command, "--header", "Authorization=secret")[0] == 0
    assert [headers.get("Authorization") for headers in server.headers_seen] == ["secret", None]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/nothing", "got HTTP 404, expected a ComfyUI server"),
        ("/page", "got text/html, expected JSON"),
        ("/cut", "got JSON that cannot be read"),
        ("/short", "the answer broke off"),
        ("/list", "expected an object of node classes"),
        ("/empty", "expected an object of node classes"),
        ("/odd", "class KSampler"),
    ],
)
def test_other_answers_are_one_line(run, server, good, path, says):
    status, out, err = run("validate", good, "--catalogue", server.address + path)
    assert (status, out) == (2, "")
    assert says in err
    assert server.address + path in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:1",
        "http://127.0.0.1:none",
        "http://",
        "http://[::1",
        "https://127.0.0.1:1",
    ],
)
def test_addresses_where_nothing_answers_are_one_line(run, good, address):
    status, out, err = run("validate", good, "--catalogue", address)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("flowloom validate: catalogue http")


def test_doctor_tells_what_a_server_has_and_lacks(run_json, run, server):
    status, answer = run_json("doctor", "--catalogue", f"{server.address}/comfy/")
    assert status == 1
    found = {finding["name"]: finding for finding in answer["findings"]}
    expected = f"{server.address}/comfy: comfyui 0.33.0, python 3.12.3, cpu"
    assert (found["server"]["ok"], found["server"]["detail"]) == (True, expected)
    assert found["catalogue"]["ok"]
    assert "633 classes" in found["catalogue"]["detail"]
    assert not found["text to image"]["ok"]
    assert "CheckpointLoaderSimple" in found["text to image"]["detail"]
    status, answer = run_json("doctor", "--catalogue", f"{server.address}/nothing")
    found = {finding["name"]: finding for finding in answer["findings"]}
    assert (found["server"]["ok"], found["catalogue"]["ok"]) == (False, False)
    assert "HTTP 404" in found["server"]["detail"]
    assert "--header" in found["server"]["fix"]


def test_doctor_tells_what_a_file_has(run_json):
    _, answer = run_json("doctor", "--catalogue", "example")
    found = {finding["name"]: finding for finding in answer["findings"]}
    assert "server" not in found
    assert found["text to image"]["ok"]
    assert "example" in found["catalogues"]["detail"]
