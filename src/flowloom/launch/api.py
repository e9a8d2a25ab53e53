"""The Kubernetes API as plain dictionaries: the only module that imports `kubernetes`.

Of the client it takes what is hard: addresses, certificates and tokens that expire, in a pod or
from a kubeconfig file. Objects stay as the server writes them, so kinds of any version pass.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

NAMESPACE = "flowloom"
"""Where a kubeconfig's context names none."""
GONE = 410
"""Status of a watch that asks for a past the server no longer has."""
_IN_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TIMEOUT_S = (10.0, 60.0)
"""To connect, and between two pieces of an answer."""


class ApiError(ValueError):
    """The Kubernetes API refused, or did not answer."""

    def __init__(self, asked: str, said: str, status: int | None = None):
        """Keep what was `asked`, what the server `said`, and its HTTP `status` if it answered."""
        super().__init__(f"Kubernetes: {asked}: {f'{status} ' if status else ''}{said}")
        self.status = status

    @property
    def passes(self) -> bool:
        """Whether the same call may succeed later: no answer, too many calls, a server in need."""
        return self.status is None or self.status == 429 or self.status >= 500


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of object and where the server keeps it."""

    plural: str
    """Its name in addresses, such as `pods`."""
    version: str
    """Version of its group, such as `v1`."""
    group: str = ""
    """Its group; empty for the core."""
    namespaced: bool = True
    """Whether objects belong to a namespace."""

    def path(self, namespace: str, name: str = "") -> str:
        """Address of the objects, or of one."""
        root = f"/apis/{self.group}" if self.group else "/api"
        place = f"/namespaces/{namespace}" if self.namespaced else ""
        return f"{root}/{self.version}{place}/{self.plural}" + (f"/{name}" if name else "")


PODS = Kind(plural="pods", version="v1")
TRAIN_JOBS = Kind(plural="trainjobs", version="v1alpha1", group="trainer.kubeflow.org")


class Api:
    """Calls to one server, in one namespace unless another is named."""

    def __init__(self, client: ApiClient, namespace: str):
        """Use `client`."""
        self._client = client
        self.namespace = namespace

    def read(self, path: str) -> dict[str, Any]:
        """What the server has at an address such as `/version` or `/apis`."""
        return self._call("GET", path)

    def get(self, kind: Kind, name: str, namespace: str | None = None) -> dict[str, Any] | None:
        """An object, or `None` where there is none of the name."""
        try:
            return self._call("GET", kind.path(namespace or self.namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def list(self, kind: Kind, selector: str = "", namespace: str | None = None) -> dict[str, Any]:
        """The `items` whose labels a selector picks, and `metadata` to watch them from."""
        query = {"labelSelector": selector} if selector else {}
        return self._call("GET", kind.path(namespace or self.namespace), query)

    def create(self, kind: Kind, body: Mapping[str, Any]) -> dict[str, Any]:
        """Make an object; `ApiError` of status 409 where there is one of its name."""
        return self._call("POST", kind.path(self.namespace), body=body)

    def delete(self, kind: Kind, name: str) -> bool:
        """Have an object removed after what belongs to it; whether there was one."""
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Foreground"}
        try:
            self._call("DELETE", kind.path(self.namespace, name), body=body)
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    def watch(
        self, kind: Kind, selector: str, since: str, for_s: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Changes after the resource version `since`: `ADDED`, `MODIFIED`, `DELETED`, object.

        The server ends it after `for_s` seconds. An `ApiError` of status 410 says that `since` is
        too long ago: list again.
        """
        path = kind.path(self.namespace)
        query = {"labelSelector": selector, "resourceVersion": since}
        query |= {"watch": "true", "timeoutSeconds": str(for_s)}
        for line in self._lines(path, query, (10.0, for_s + 10.0)):
            with _said(f"watch {path}"):
                event = json.loads(line)
            if event["type"] == "ERROR":
                said = event["object"]
                raise ApiError(f"watch {path}", said.get("message", "error"), said.get("code"))
            yield event["type"], event["object"]

    def logs(self, pod: str, tail: int | None = None, follow: bool = False) -> Iterator[str]:
        """Lines of a pod's log, each after the time it was written; `follow` waits for more."""
        query = {"timestamps": "true", "follow": str(follow).lower()}
        query |= {"tailLines": str(tail)} if tail is not None else {}
        # A training step may be silent for longer than any call should take.
        timeout_s = (10.0, 3600.0) if follow else _TIMEOUT_S
        yield from self._lines(PODS.path(self.namespace, pod) + "/log", query, timeout_s)

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        with _said(f"{method} {path}"):
            answer = self._client.call_api(
                path, method, query_params=list((query or {}).items()), body=body,
                header_params={"Accept": "application/json", "Content-Type": "application/json"},
                response_type="object", auth_settings=["BearerToken"],
                _return_http_data_only=True, _request_timeout=_TIMEOUT_S,
            )  # fmt: skip
        if not isinstance(answer, dict):
            raise ApiError(f"{method} {path}", f"got {str(answer)[:80]!r}, expected an object")
        return answer

    def _lines(
        self, path: str, query: Mapping[str, str], timeout_s: tuple[float, float]
    ) -> Iterator[str]:
        with _said(f"GET {path}"):
            answer: Any = self._client.call_api(
                path, "GET", query_params=list(query.items()), header_params={"Accept": "*/*"},
                auth_settings=["BearerToken"], _return_http_data_only=True,
                _preload_content=False, _request_timeout=timeout_s,
            )  # fmt: skip
            try:
                left = b""
                for piece in answer.stream(65536, decode_content=False):
                    *lines, left = (left + piece).split(b"\n")
                    for line in lines:
                        yield line.decode(errors="replace")
                if left:
                    yield left.decode(errors="replace")
            finally:
                # Closed rather than given back: nobody may read on where another stopped.
                answer.close()
                answer.release_conn()


def connect(context: str | None = None) -> Api:
    """The server of the cluster that this pod runs in, else of the kubeconfig file.

    Args:
        context: Name of a context of the kubeconfig file; else the one in use.

    Raises:
        ApiError: There is neither.
    """
    import yaml
    from kubernetes import client, config

    settings = client.Configuration()
    settings.retries = False  # pyright: ignore[reportAttributeAccessIssue]
    # Said here too: the client reads the variable only once, when it is imported.
    file = os.environ.get("KUBECONFIG")
    try:
        if context is None and os.environ.get("KUBERNETES_SERVICE_HOST") and _IN_POD.is_file():
            config.load_incluster_config(client_configuration=settings)
            namespace = _IN_POD.read_text().strip()
        else:
            config.load_kube_config(file, context, client_configuration=settings)
            contexts, used = cast("Any", config.list_kube_config_contexts(file))
            chosen: Any = next((item for item in contexts if item["name"] == context), used)
            namespace = chosen["context"].get("namespace") or NAMESPACE
    except (config.ConfigException, OSError) as error:
        raise ApiError("connect", f"no cluster to talk to: {error}") from error
    except (yaml.YAMLError, TypeError) as error:
        said = " ".join(str(error).split())
        where = file or config.KUBE_CONFIG_DEFAULT_LOCATION
        raise ApiError("connect", f"{where}: got {said}, expected a kubeconfig") from error
    return Api(client.ApiClient(settings), namespace)


@contextlib.contextmanager
def _said(asked: str) -> Iterator[None]:
    """Say whatever the client and its transport raise as one kind of error."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        said = _message(error.body) or str(error.reason)
        raise ApiError(asked, said, error.status or None) from error
    except (HTTPError, OSError) as error:
        raise ApiError(asked, f"no answer: {error}") from error
    except json.JSONDecodeError as error:
        raise ApiError(asked, f"half an answer: {error}") from error


def _message(body: str | bytes | None) -> str:
    """What a `Status` object says, which the server sends with a refusal."""
    try:
        status = json.loads(body or "")
    except json.JSONDecodeError:
        return ""
    return str(status.get("message", "")) if isinstance(status, dict) else ""
