"""Telling a webhook how a turn ended, with a real server on loopback.

Facts pinned:
- an event is posted once, as JSON, with an id that the same event told again has too;
- a receiver that is busy or broken is tried again, one that refuses or points elsewhere is not;
- one that hangs, at once or byte by byte, holds the caller up for the deadline at most;
- nothing of the address is said, whatever goes wrong, and nothing is raised;
- a refused candidate's event has every number and the reason, a failed turn's the step and error;
  a turn that ended well, or a decision that was made before, says nothing.
"""

import contextlib
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flowloom.lifecycle import registry, turns, webhook
from flowloom.lifecycle.config import GateConfig
from flowloom.lifecycle.gate import Check, Decision

SECRET = "T0KEN-of-the-hook"
FAILED = webhook.turn_failed("FAILED", "loss: got nan", "train_grpo")
FIELDS = {**dict.fromkeys(turns.KEY_FIELDS, "x"), "pipeline": "tiny", "recipe": "smoke"}


class Receiver:
    """Answers with the statuses it is given, the last one for good; keeps what it was sent."""

    def __init__(self):
        self.statuses = [204]
        self.bodies = []
        self.hold = threading.Event()
        self.hold.set()
        self.drip_s = None

    def handle(self, request):
        self.bodies.append(json.loads(request.rfile.read(int(request.headers["Content-Length"]))))
        self.paths.add(request.path)
        self.hold.wait()
        if self.drip_s is not None:
            for _ in range(40):
                request.wfile.write(b"H")
                request.wfile.flush()
                time.sleep(self.drip_s)
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        request.send_response(status)
        request.send_header("Location", f"{self.url}/elsewhere")
        request.send_header("Content-Length", "0")
        request.end_headers()

    @contextlib.contextmanager
    def serving(self):
        receiver, self.paths = self, set()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    receiver.handle(self)

            do_GET = do_POST

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield self
        finally:
            self.hold.set()
            server.shutdown()
            server.server_close()


@pytest.fixture
def receiver(monkeypatch):
    monkeypatch.setattr(webhook, "PAUSES_S", (0.01, 0.01))
    with Receiver().serving() as serving:
        monkeypatch.setenv(webhook.VARIABLE, f"{serving.url}/{SECRET}\n")
        yield serving


@pytest.fixture
def turn(monkeypatch):
    made = turns.open_turn(FIELDS, lambda: None)
    monkeypatch.setenv("FLOWLOOM_TURN", made.name)
    monkeypatch.setenv("FLOWLOOM_TRACKING", "spool")
    return made


def test_an_event_is_posted_once_and_known_again(receiver, turn, capfd):
    assert webhook.notify(FAILED)
    (body,) = receiver.bodies
    assert receiver.paths == {f"/{SECRET}"}
    scope, rest = body.pop("id").split("/", 1)
    assert (len(scope), rest) == (16, "0001/turn_failed/train_grpo")
    assert body.pop("time").endswith("+00:00")
    assert body == {
        "event": "turn_failed",
        "text": "flowloom turn 0001 (tiny, smoke): failed in train_grpo: loss: got nan",
        "turn": "0001",
        "pipeline": "tiny",
        "recipe": "smoke",
        "state": "FAILED",
        "step": "train_grpo",
        "error": "loss: got nan",
    }
    assert webhook.notify(FAILED)
    assert receiver.bodies[1]["id"] == f"{scope}/{rest}"
    assert capfd.readouterr() == ("", "")


def test_on_a_cluster_the_id_is_the_engines_run(receiver, monkeypatch):
    monkeypatch.setenv("FLOWLOOM_TURN", "run-7")
    turns.close("FAILED", None)  # before its first step could make a record
    (body,) = receiver.bodies
    assert body["id"] == "run-7/turn_failed"
    assert (body["text"], body["pipeline"]) == ("flowloom turn run-7: failed", None)


def test_without_an_address_nothing_happens(monkeypatch, capfd):
    monkeypatch.delenv(webhook.VARIABLE, raising=False)
    assert not webhook.notify(FAILED)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("statuses", "tries", "said"),
    [
        ([503, 429, 200], 3, None),
        ([500], 3, "got status 500"),
        ([404], 1, "got status 404"),
        ([302], 1, "got status 302"),
        ([307], 1, "got status 307"),
    ],
)
def test_only_a_busy_or_broken_receiver_is_tried_again(receiver, statuses, tries, said, capfd):
    receiver.statuses = statuses
    assert webhook.notify(FAILED) is (said is None)
    assert len(receiver.bodies) == tries
    assert receiver.paths == {f"/{SECRET}"}
    error = capfd.readouterr().err
    assert error.count("\n") == (said is not None)
    assert (said or "") in error
    assert SECRET not in error


@pytest.mark.parametrize("drip_s", [None, 0.05])
def test_a_receiver_that_hangs_is_left(receiver, drip_s, monkeypatch, capfd):
    monkeypatch.setattr(webhook, "DEADLINE_S", 0.4)
    if drip_s is None:
        receiver.hold.clear()
    else:
        receiver.drip_s = drip_s  # every read is within its timeout
    started_s = time.perf_counter()
    assert not webhook.notify(FAILED)
    assert time.perf_counter() - started_s < 1.0
    assert "not delivered: got no answer within" in capfd.readouterr().err


def test_a_silence_counts_as_a_try(receiver, monkeypatch, capfd):
    monkeypatch.setattr(webhook, "TIMEOUT_S", 0.05)
    receiver.hold.clear()
    assert not webhook.notify(FAILED)
    assert "got TimeoutError" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"file:///etc/{SECRET}", "got another address"),
        (f"ftp://127.0.0.1/{SECRET}", "got another address"),
        (SECRET, "got another address"),
        (f"http:///{SECRET}", "got another address"),
        (f"http://127.0.0.1:1/{SECRET}", "got ConnectionRefusedError"),
        (f"http://127.0.0.1:1/{SECRET} x", "got InvalidURL"),
        (f"http://127.0.0.1:{SECRET}/", "got InvalidURL"),
        (f"http://[{SECRET}/", "got ValueError"),
        (f"http://127.0.0.1:1/{SECRET}\N{GREEK SMALL LETTER ALPHA}", "got UnicodeEncodeError"),
    ],
)
def test_nothing_of_the_address_is_said(url, said, monkeypatch, capfd):
    monkeypatch.setattr(webhook, "PAUSES_S", (0.0,))
    monkeypatch.setenv(webhook.VARIABLE, url)
    assert not webhook.notify(FAILED)
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert SECRET.lower() not in error.lower()


def test_passwords_in_addresses_are_left_out_of_an_error():
    event = webhook.turn_failed("FAILED", "tracker https://me:pa55@mlflow.example.com/x:\n down")
    assert event["error"] == "tracker https://mlflow.example.com/x: down"
    assert len(webhook.turn_failed("FAILED", "x" * 9000)["error"]) == webhook.MAX_TEXT


def test_a_decision_has_its_numbers(receiver, monkeypatch):
    checks = (
        Check("paired difference to champion, lower end", 0.02, 0.0, ">", True),
        Check("change on counting", float("nan"), -0.1, ">=", False),
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:pa55@mlflow.example.com/track/")
    refused = Decision(opponent="champion", checks=checks)
    event = webhook.decided(registry.NAME, "12", "11", refused)
    assert webhook.notify(event)
    (body,) = receiver.bodies
    assert body["id"] == "gate_refused/12"
    assert body["reason"] == "change on counting: +nan >= -0.1000: FAILS"
    assert body["text"].endswith(f"version 12 was refused: {body['reason']}")
    assert (body["version"], body["champion"], body["opponent"]) == ("12", "11", "champion")
    assert body["checks"][0]["value"] == 0.02
    assert (body["checks"][1]["value"], body["checks"][1]["holds"]) == ("nan", False)
    page = "https://mlflow.example.com/track/#/models/flow-designer/versions/12"
    assert body["link"] == page


def test_the_stage_tells_its_decision(receiver, turn, tracked, make_parts, evaluation):
    parts = make_parts()
    _, version = registry.register(parts)
    for _ in range(2):  # the second finds the decision
        registry.decide(GateConfig(), version, parts["evaluation"])
    strict = GateConfig(min_prompts=1000)
    registry.decide(strict, version, parts["evaluation"])
    promoted, refused = receiver.bodies
    assert (promoted["event"], promoted["version"]) == ("promoted", "1")
    assert promoted["text"].endswith(
        f"flow-designer version 1 is the champion: {promoted['reason']}"
    )
    assert promoted["link"] is None  # a file has no address
    assert refused["event"] == "gate_refused"
    assert "held-out prompts: 160 >= 1000: FAILS" in refused["reason"]
    (failed,) = [check for check in refused["checks"] if not check["holds"]]
    assert (failed["name"], failed["value"]) == ("held-out prompts", 160)


def test_a_failed_turn_is_told_with_its_step(receiver, turn):
    failure = {"step": "train_sft", "error": "ValueError: x", "log": "/log"}
    (turn.dir / "failure.json").write_text(json.dumps(failure))
    turns.close("FAILED", "Task turn failed.")
    (body,) = receiver.bodies
    assert (body["step"], body["error"]) == ("train_sft", "ValueError: x")
    assert turns.load("0001").record["status"] == "failed"


def test_a_turn_that_ended_well_says_nothing(receiver, turn):
    turns.close("SUCCEEDED", None)
    assert receiver.bodies == []


def test_a_broken_receiver_changes_no_record(receiver, turn, capfd):
    receiver.statuses = [500]
    turns.close("FAILED", "Task turn failed.")
    assert turns.load("0001").record["outcome"]["state"] == "FAILED"
    assert SECRET not in capfd.readouterr().err
    for path in turn.dir.rglob("*"):
        assert path.is_dir() or SECRET not in path.read_text()
    assert SECRET in os.environ[webhook.VARIABLE]
