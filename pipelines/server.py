"""A Kubeflow Pipelines server: calls that time out, are repeated where safe, and fail in one line.

Reading, deleting and switching are repeated. A creation whose outcome is unknown is looked up
before it is repeated; one that timed out, and so may still come to pass, is only looked up.
"""

import http
import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from typing import Any, Optional

PAUSES_S = (1.0, 2.0, 4.0)
"""Seconds before each repetition."""
TIMEOUTS_S = (5.0, 60.0)
"""Seconds to connect, and to wait for an answer."""
PAGE = 100
TOO_LATE = (408, 504)
"""Statuses of a gateway that waited no longer; the server behind it may still be at it."""


class ServerError(ValueError):
    """The server refused; the message says what and why."""

    status = 0
    """Of its answer; 0 without one."""


class NoAnswerError(ServerError):
    """The server was not reached, or failed: what was asked may have been done or not."""

    may_follow = False
    """Whether it may still be done."""


class AlreadyThereError(ServerError):
    """What was to be created exists."""


class Server:
    """A connection, and the real client of its API as `client`."""

    def __init__(self, host: Optional[str], namespace: Optional[str], default: str):
        """Connect to `host`, or to what the environment names.

        Args:
            host: URL; else `KFP_HOST` or `KF_PIPELINES_ENDPOINT`.
            namespace: Of a server with several users; else `KFP_NAMESPACE`.
            default: Else this one, if the server says that it has several users.

        Raises:
            ServerError: If there is none, or if it does not answer.
        """
        host = host or os.environ.get("KFP_HOST") or os.environ.get("KF_PIPELINES_ENDPOINT")
        if not host:
            raise ServerError(
                "server: got none, expected --host URL or KFP_HOST; `run` needs no server"
            )
        self.host = (host if "://" in host else f"https://{host}").rstrip("/")
        self.client = self.ask("connecting", _client(self.host, namespace))
        several = self.client.health is not None and self.client.health.multi_user
        self.namespace = self.client.get_user_namespace() or (default if several else None)

    def link(self, kind: str, ident: str) -> str:
        """The page of a run (`runs`) or of a schedule (`recurringrun`)."""
        pages = os.environ.get("KF_PIPELINES_UI_ENDPOINT", self.host).rstrip("/")
        return f"{pages}/#/{kind}/details/{ident}"

    def ask(self, what: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Make a call that may be repeated; returns its answer.

        Raises:
            ServerError: If the server refuses, or fails too often.
        """
        for pause_s in PAUSES_S:
            try:
                return self._once(what, call, *arguments, **options)
            except NoAnswerError:
                time.sleep(pause_s)
        return self._once(what, call, *arguments, **options)

    def create(
        self,
        what: str,
        find: Callable[[], Any],
        call: Callable[..., Any],
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """Create a thing once; returns it.

        Args:
            what: For messages.
            find: Gives the thing if it is there.
            call: Creates it.
            *arguments: Of `call`.
            **options: Of `call`.

        Raises:
            ServerError: If the server refuses, or if the outcome stays unknown.
        """
        for pause_s in (*PAUSES_S, None):
            try:
                return self._once(what, call, *arguments, **options)
            except AlreadyThereError:
                found = find()
                if found is None:
                    raise
                return found
            except NoAnswerError as error:
                found = self._looked_up(find, pause_s or 0.0, error.may_follow)
                if found is not None:
                    return found
                if error.may_follow or pause_s is None:
                    raise
        raise AssertionError("unreachable")

    def _looked_up(self, find: Callable[[], Any], pause_s: float, may_follow: bool) -> Any:
        """What `find` finds after the pause; where it may still come, after every pause."""
        for seconds in PAUSES_S if may_follow else (pause_s,):
            time.sleep(seconds)
            found = find()
            if found is not None:
                return found
        return None

    def listed(
        self, what: str, call: Callable[..., Any], field: str, *arguments: Any, **options: Any
    ) -> list[Any]:
        """Everything that a listing gives, page after page, in `field` of its answers."""
        found: list[Any] = []
        token = ""
        while True:
            page = self.ask(what, call, *arguments, page_size=PAGE, page_token=token, **options)
            found += getattr(page, field) or []
            token = page.next_page_token
            if not token:
                return found

    def _once(self, what: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        import kfp_server_api
        import urllib3

        try:
            return call(*arguments, _request_timeout=TIMEOUTS_S, **options)
        except kfp_server_api.ApiException as error:
            raise _refusal(f"server {self.host}: {what}", error) from error
        except urllib3.exceptions.HTTPError as error:
            cause = getattr(error, "reason", None) or error
            lost = NoAnswerError(f"server {self.host}: {what}: {_one_line(cause)}")
            # A timeout to connect is no such: nothing was sent.
            lost.may_follow = isinstance(cause, urllib3.exceptions.ReadTimeoutError)
            raise lost from error


def predicate(key: str, value: str, operation: str = "EQUALS") -> str:
    """A filter of a listing."""
    test = {"operation": operation, "key": key, "stringValue": value}
    return json.dumps({"predicates": [test]})


def _client(host: str, namespace: Optional[str]) -> Callable[..., Any]:
    """What makes the client; it asks the server for its health."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import kfp
        import urllib3

    logging.getLogger("urllib3").setLevel(logging.ERROR)

    class Client(kfp.Client):
        """kfp's, whose own repetitions (each with a traceback in the log) are left to `Server`."""

        health = None
        """What the server said of itself; it is asked where no namespace is given."""

        def _load_config(self, *arguments: Any, **options: Any) -> Any:
            config = super()._load_config(*arguments, **options)
            config.retries = urllib3.Retry(total=3, connect=0, read=0)
            return config

        def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
            call = self._healthz_api.healthz_service_get_healthz
            self.health = call(_request_timeout=TIMEOUTS_S)
            return self.health

    def make(_request_timeout: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Client(
                host=host,
                namespace=namespace or os.environ.get("KFP_NAMESPACE") or "kubeflow",
                existing_token=os.environ.get("KFP_TOKEN"),
            )

    return make


def _refusal(what: str, error: Any) -> ServerError:
    """The error for a status that is no success."""
    refusal = _typed_refusal(what, error)
    refusal.status = error.status or 0
    return refusal


def _typed_refusal(what: str, error: Any) -> ServerError:
    status = error.status or 0
    if status >= 500 or status in (408, 429):
        lost = NoAnswerError(f"{what}: {_reason(error)}")
        lost.may_follow = status in TOO_LATE
        return lost
    if status == 409:
        return AlreadyThereError(f"{what}: {_reason(error)}")
    hints = {
        401: "; expected a token that it knows in KFP_TOKEN",
        403: "; expected a token (KFP_TOKEN) and a --namespace that allow it",
        404: "; expected a Kubeflow Pipelines server with API v2beta1",
    }
    return ServerError(f"{what}: {_reason(error)}{hints.get(status, '')}")


def _reason(error: Any) -> str:
    """Status and message of an answer, in a line."""
    if not error.status:
        return _one_line(error.reason)
    message = ""
    try:
        answer = json.loads(error.body)
        message = answer.get("message") or answer.get("error") or ""
    except (TypeError, ValueError, AttributeError):
        pass  # a gateway's page, which says no more than the status
    known = {status.value: status.phrase for status in http.HTTPStatus}
    status = f"{error.status} {error.reason or known.get(error.status, '')}".strip()
    return _one_line(f"{status}: {message}" if message else status)


def _one_line(value: Any, width: int = 300) -> str:
    text = " ".join(str(value).split()) or type(value).__name__
    return text if len(text) <= width else text[: width - 3] + "..."
