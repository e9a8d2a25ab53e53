"""MLflow's server, for those who know the token: `mlflow server --app-name flowloom`.

MLflow itself asks nobody who they are. Its clients send `MLFLOW_TRACKING_TOKEN` as a bearer token,
and this app answers 401 to whoever does not. A browser is asked for a user (any) and a password,
which is the token.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

TOKEN = "MLFLOW_TRACKING_TOKEN"
_OPEN = "/health"
"""Answers "OK" to probes, which know no token."""


def app() -> ASGIApp:
    """The server's app, made once in each of its processes.

    Raises:
        ValueError: If there is no token: a server without one would be open to everybody.
    """
    token = os.environ.get(TOKEN, "")
    if not token:
        raise ValueError(f"{TOKEN}: got nothing, expected the token that clients have to send")
    from mlflow.server.fastapi_app import app as mlflow_app

    return guard(mlflow_app, token)


def guard(inner: ASGIApp, token: str) -> ASGIApp:
    """`inner`, for requests that send `token`."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan" or scope["path"] == _OPEN or _knows(scope, token):
            await inner(scope, receive, send)
        elif kind == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [
                (b"www-authenticate", b'Basic realm="flowloom"'),
                (b"content-type", b"text/plain"),
            ]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": f"expected {TOKEN}\n".encode()})

    return guarded


def _knows(scope: Scope, token: str) -> bool:
    given = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, credentials = given.partition(b" ")
    if scheme.lower() == b"basic":
        try:
            credentials = base64.b64decode(credentials, validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif scheme.lower() != b"bearer":
        return False
    return hmac.compare_digest(credentials, token.encode())
