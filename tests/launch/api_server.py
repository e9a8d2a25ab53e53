"""A Kubernetes API server over loopback that keeps TrainJobs, their pods and logs, as told.

It knows what the launcher asks of a real one: create (409 on a name), get, list and watch by label
from a resource version, delete, logs that follow. A script is called for each job that is made, in
a thread, and plays the trainer's and the cluster's part. Faults spoil requests.
"""

import json
import re
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

JOB_LABEL = "jobset.sigs.k8s.io/jobset-name"


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match."""

    matches: str
    status: int | None = None
    """Answered with instead; `None` where the connection is closed."""
    lost: bool = False
    """Whether the request is carried out all the same."""
    times: int = 1


class ApiServer:
    """The server; `with ApiServer(script) as server`, then `KUBECONFIG` names `server.config`."""

    def __init__(self, folder, script=lambda server, job: None):
        self.script, self.config = script, folder / "kubeconfig"
        self.objects = {"trainjobs": {}, "pods": {}}
        self.logs, self.events, self.asked, self.faults = {}, [], [], []
        self.port = 0
        self.made, self.gone, self.version, self.compacted = 0, 0, 100, 0
        self.changed = threading.Condition()
        self.open = set()

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def handle_one_request(self):
                with server._listed(self.connection):
                    super().handle_one_request()

            def answer(self):
                server._answer(self)

            do_GET = do_POST = do_DELETE = answer

        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_port  # the same again after it was away
        self.http.daemon_threads = True
        self.http.block_on_close = False
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        name = {"name": "test"}
        self.config.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "contexts": [name | {"context": {"cluster": "test", "user": "test"}}],
                    "clusters": [name | {"cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
                    "users": [name | {"user": {"token": "of-a-test"}}],
                }
            )
        )
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()
        self.cut()

    @contextmanager
    def away(self):
        """Refuse connections for a while; what goes on inside does so all the same."""
        self.__exit__()
        yield
        self.__enter__()

    def cut(self):
        """Close every connection."""
        for connection in list(self.open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                self.open.discard(connection)

    @contextmanager
    def _listed(self, connection):
        self.open.add(connection)
        try:
            yield
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            self.open.discard(connection)

    # What a script does.

    def put(self, plural, item, event="MODIFIED"):
        """Store an object and tell the watchers."""
        with self.changed:
            self.version += 1
            item["metadata"]["resourceVersion"] = str(self.version)
            kept = self.objects[plural]
            if event == "DELETED":
                kept.pop(item["metadata"]["name"], None)
            else:
                kept[item["metadata"]["name"]] = item
            self.events.append((self.version, plural, event, json.loads(json.dumps(item))))
            self.changed.notify_all()

    def forget(self):
        """Compact: a watch that begins before the next change is told that its past is gone."""
        with self.changed:
            self.compacted = self.version + 1

    def pod(self, job, index=0, restart=0, **status):
        """A pod of a job with a status."""
        name = f"{job['metadata']['name']}-node-0-{index}-r{self.made}{restart}"
        before = self.objects["pods"].get(name)
        self.logs.setdefault(name, [])
        labels = {
            JOB_LABEL: job["metadata"]["name"],
            "jobset.sigs.k8s.io/restart-attempt": str(restart),
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        item = {
            "kind": "Pod",
            "apiVersion": "v1",
            "metadata": {"name": name, "uid": f"uid-of-{name}", "labels": labels},
            "status": status,
        }
        self.put("pods", item, "MODIFIED" if before else "ADDED")
        return name

    def say(self, pod, *lines, at="2026-01-01T00:00:00"):
        """Add lines to a pod's log."""
        with self.changed:
            log = self.logs.setdefault(pod, [])
            log.extend(f"{at}.{len(log) + k:03d}Z {line}" for k, line in enumerate(lines))
            self.changed.notify_all()

    def end(self, job, kind, reason="", message=""):
        """Give a job its last condition."""
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        self.put("trainjobs", job | {"status": {"conditions": [condition]}})

    def current(self, name):
        return self.objects["trainjobs"].get(name)

    # What a client sees.

    def _answer(self, request):
        url = urlsplit(request.path)
        size = int(request.headers.get("Content-Length") or 0)
        body = json.loads(request.rfile.read(size) or "null")
        assert request.headers["Authorization"] == "Bearer of-a-test"
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        watch = " watch" if query.get("watch") else ""
        line = f"{request.command} {url.path}{watch}"
        self.asked.append(line)
        fault = self._fault(line)
        if fault and fault.status and not fault.lost:
            return self._send(request, fault.status, {"message": f"status {fault.status}"})
        if fault and not fault.lost:
            return self._close(request)
        found = re.fullmatch(r".*/namespaces/flowloom/(\w+)(?:/([^/]+))?(/log)?", url.path)
        assert found, url.path
        plural, name, log = found.groups()
        if log:
            return self._log(request, name, query)
        if watch:
            return self._watch(request, plural, query)
        status, answer = self._carry_out(request.command, plural, name, query, body)
        if fault:
            return self._close(request)
        return self._send(request, status, answer)

    def _fault(self, line):
        for fault in self.faults:
            if fault.times and re.search(fault.matches, line):
                fault.times -= 1
                return fault
        return None

    def _carry_out(self, method, plural, name, query, body):
        kept = self.objects[plural]
        if method == "POST":
            name = body["metadata"]["name"]
            if name in kept:
                return 409, {"message": f'{plural} "{name}" already exists'}
            self.made += 1
            body["metadata"]["uid"] = f"uid-{self.made}"
            self.put(plural, body, "ADDED")
            threading.Thread(target=self.script, args=(self, body), daemon=True).start()
            return 201, body
        if name is None:
            items = [item for item in kept.values() if _chosen(item, query)]
            return 200, {"items": items, "metadata": {"resourceVersion": str(self.version)}}
        if name not in kept:
            return 404, {"message": f'{plural} "{name}" not found'}
        item = kept[name]
        if method == "DELETE":
            assert body["propagationPolicy"] == "Foreground"
            for pod in list(self.objects["pods"].values()):
                if pod["metadata"]["labels"][JOB_LABEL] == name:
                    self.put("pods", pod, "DELETED")
            self.put(plural, item, "DELETED")
        return 200, item

    def _watch(self, request, plural, query):
        since, left_s = int(query["resourceVersion"]), float(query["timeoutSeconds"])
        self._head(request)
        if since < self.compacted:
            self.gone += 1
            said = {"kind": "Status", "code": 410, "message": "too old resource version"}
            self._piece(request, json.dumps({"type": "ERROR", "object": said}) + "\n")
            return self._piece(request, "")
        while True:
            with self.changed:
                news = [e for e in self.events if e[0] > since and e[1] == plural]
                if not news and not self.changed.wait(left_s):
                    break
            for version, _, event, item in news:
                since = version
                if _chosen(item, query):
                    self._piece(request, json.dumps({"type": event, "object": item}) + "\n")
        return self._piece(request, "")

    def _log(self, request, pod, query):
        if pod not in self.logs:
            return self._send(request, 404, {"message": f'pods "{pod}" not found'})
        self._head(request)
        shown = 0
        tail = int(query.get("tailLines", 10**6))
        while True:
            with self.changed:
                lines = self.logs[pod][-tail:][shown:]
                item = self.objects["pods"].get(pod)
                going = item and item["status"]["phase"] == "Running" and query["follow"] == "true"
                if not lines and going:
                    self.changed.wait(0.1)
            if lines:
                self._piece(request, "".join(f"{line}\n" for line in lines))
                shown += len(lines)
            elif not going:
                return self._piece(request, "")

    def _send(self, request, status, answer):
        data = json.dumps({"kind": "Status"} | answer).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _head(self, request):
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()

    def _piece(self, request, text):
        data = text.encode()
        request.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        request.wfile.flush()

    def _close(self, request):
        request.close_connection = True
        request.connection.shutdown(socket.SHUT_RDWR)


def _chosen(item, query):
    """Whether an object's labels are those of a selector."""
    wanted = dict(pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair)
    return wanted.items() <= item["metadata"].get("labels", {}).items()
