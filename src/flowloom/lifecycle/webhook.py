"""Tell a webhook how a turn ended: with a failure, a refused candidate, or a new champion.

`FLOWLOOM_WEBHOOK_URL` says where to (http or https); without it nothing is sent. One POST of a JSON
object, whose keys stay. Every event has

    id        turn, event, and what it is about: an event told again, such as by a step that is
              tried again, has the same
    event     `turn_failed`, `gate_refused` or `promoted`
    text      the event in a line, which chat services show
    time      when it was sent: ISO 8601, UTC
    turn      its number; on a cluster the id of the engine's run
    pipeline, recipe    of the turn; null where it did not come to have a record

and beside these

    turn_failed             state (FAILED or CANCELLED), step (null where only the engine knows),
                            error (null if the engine says nothing)
    gate_refused, promoted  model, version, champion (the version it was compared with, or null),
                            opponent, reason, checks (name, value, bound, rule, holds of each),
                            link (to the version; null where the tracker has no address)

Whoever calls this neither fails nor waits for long: an event is delivered once or more within
`DEADLINE_S`, or a line on standard error says that it was not. The address is a secret; nothing
that is said or raised holds any of it.
"""

from __future__ import annotations

import datetime
import http.client
import json
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowloom.lifecycle import spool
from flowloom.runs import home

if TYPE_CHECKING:
    from flowloom.lifecycle.gate import Decision

VARIABLE = "FLOWLOOM_WEBHOOK_URL"
TIMEOUT_S = 5.0
"""For a connection, and for each silence of the receiver."""
PAUSES_S = (1.0, 3.0)
"""Before each further try, where the receiver is down or busy."""
DEADLINE_S = 20.0
"""For all tries together, whatever the network does."""
MAX_TEXT = 2000
"""Characters of an error or a reason."""
_BUSY = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS)


def turn_failed(state: str, error: str | None, step: str | None = None) -> dict[str, Any]:
    """The event of a turn whose steps did not all end well.

    Args:
        state: `FAILED` or `CANCELLED`.
        error: What the engine, or the last line of the step's log, says of it.
        step: The step that stopped the turn.
    """
    error = _told(error) if error else None
    where = f" in {step}" if step else ""
    text = f"{state.lower()}{where}" + (f": {error}" if error else "")
    return {"event": "turn_failed", "text": text, "state": state, "step": step, "error": error}


def decided(model: str, version: str, champion: str | None, decision: Decision) -> dict[str, Any]:
    """The event of a gate's decision.

    Args:
        model: Name of the registered model.
        version: The candidate.
        champion: Version that it was compared with, if any.
        decision: The gate's.
    """
    reason = _told(decision.reason)
    verdict = "is the champion" if decision.promoted else "was refused"
    return {
        "event": "promoted" if decision.promoted else "gate_refused",
        "text": f"{model} version {version} {verdict}: {reason}",
        "model": model,
        "version": version,
        "champion": champion,
        "opponent": decision.opponent,
        "reason": reason,
        "checks": decision.rows(),
        "link": _link(model, version),
    }


def notify(event: Mapping[str, Any]) -> bool:
    """Send an event, as `turn_failed` or `decided` make it, if there is somewhere to send it.

    Returns:
        Whether it was delivered.
    """
    url = os.environ.get(VARIABLE, "").strip()
    if not url:
        return False
    outcome = [f"no answer within {DEADLINE_S:.0f} s"]

    def deliver() -> None:
        try:
            outcome[0] = _send(url, event)
        except Exception as error:  # a traceback would show the address
            outcome[0] = type(error).__name__

    # A thread: looking up a name, or an answer byte by byte, heeds no timeout.
    thread = threading.Thread(target=deliver, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    said = outcome[0]
    if said:
        line = f"[webhook] {event['event']} was not delivered: got {said}"
        print(f"{line}, expected an http(s) address in {VARIABLE} that takes it", file=sys.stderr)
    return not said


def _send(url: str, event: Mapping[str, Any]) -> str:
    """Try to deliver; returns what went wrong, or nothing."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "another address"
    data = json.dumps(_payload(event)).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "flowloom"}
    request = urllib.request.Request(url, data, headers, method="POST")
    opener = urllib.request.build_opener(_NoRedirect)
    found, again = _once(opener, request)
    for pause_s in PAUSES_S:
        if not again:
            break
        time.sleep(pause_s)
        found, again = _once(opener, request)
    return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A receiver that points elsewhere is an error: the event is for the address given."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _once(
    opener: urllib.request.OpenerDirector, request: urllib.request.Request
) -> tuple[str, bool]:
    """What went wrong, if anything, and whether another try may help."""
    try:
        opener.open(request, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        error.close()
        return f"status {error.code}", error.code >= 500 or error.code in _BUSY
    except (OSError, http.client.HTTPException) as error:
        # By its kind alone: some texts of urllib hold the address.
        cause = getattr(error, "reason", error)
        return type(cause).__name__, not isinstance(error, http.client.InvalidURL)
    return "", False


def _payload(event: Mapping[str, Any]) -> dict[str, Any]:
    """What is sent: the event, and which turn it belongs to."""
    turn = os.environ.get("FLOWLOOM_TURN") or None
    path = home() / "turns" / (turn or "") / "turn.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    about = event.get("version") or event.get("step")
    # Turns of this machine are numbers, which another machine has too.
    names = (turn and spool.scope(turn), turn, event["event"], about)
    who = ", ".join(filter(None, (record.get("pipeline"), record.get("recipe"))))
    return {
        **event,
        "id": "/".join(filter(None, names)),
        "text": f"flowloom turn {turn or 'none'}{f' ({who})' if who else ''}: {event['text']}",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "turn": turn,
        "pipeline": record.get("pipeline"),
        "recipe": record.get("recipe"),
    }


def _told(text: str) -> str:
    """A text in a line, without what precedes the host in addresses: it may be a password."""
    line = re.sub(r"//[^/@\s]+@", "//", " ".join(text.split()))
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 3] + "..."


def _link(model: str, version: str) -> str | None:
    """The version's page on the tracking server."""
    parts = urllib.parse.urlsplit(spool.tracking_uri())
    if parts.scheme not in ("http", "https"):
        return None
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}/#/models/{model}/versions/{version}"
