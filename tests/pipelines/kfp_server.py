"""A Kubeflow Pipelines server in memory: API v2beta1 over HTTP, with faults by script.

It keeps experiments, pipelines, versions, runs and recurring runs as the real one does (names of
pipelines and of versions are unique, those of runs are not), counts what was asked, and remembers
whether two schedules of the same name were ever enabled at once.
"""

import email
import email.policy
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import yaml

API = "/apis/v2beta1"
NAME = "continuous_training"
LABEL = "continuous_training-demo"
SUBMIT = ["submit", NAME]
SCHEDULE = ["schedule", NAME, "--cron", "0 3 * * *"]

FAULTS = {
    "failed": {},
    "failed after it was done": {"done": True},
    "failed twice": {"times": 2},
    "cut off": {"drop": True},
    "cut off after it was done": {"drop": True, "done": True},
    "gateway timed out after it was done": {"status": 504, "done": True},
    "slow, and done after the client left": {"delay_s": 1.0, "done": True},
}
"""Ways in which a call may fail, for `KfpServer.fault`."""


class Fault:
    """What happens to the next request that matches, instead of or after what it asks for."""

    def __init__(self, method, path, status=500, done=False, delay_s=0.0, drop=False, times=1):
        self.method, self.path = method, re.compile(path)
        self.status, self.done, self.delay_s, self.drop = status, done, delay_s, drop
        self.times = times

    def matches(self, method, path):
        return self.times > 0 and method == self.method and bool(self.path.search(path))


class KfpServer:
    """State, scripts and counts; `url` while it serves."""

    def __init__(self):
        self.experiments, self.pipelines, self.versions = {}, {}, {}
        self.runs, self.recurring, self.packages = {}, {}, {}
        self.faults, self.asked, self.states = [], [], {}
        self.two_enabled, self.delayed = False, 0
        self.page = 100
        self.token = None
        self.multi_user = False
        self._lock, self._count = threading.Lock(), 0

    def __enter__(self):
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    def count(self, method, path):
        """How often that was asked."""
        return sum(m == method and bool(re.search(path, p)) for m, p in self.asked)

    def fault(self, *arguments, **options):
        """Script a fault."""
        self.faults.append(Fault(*arguments, **options))

    def settle(self):
        """Wait for what is still to be done for clients that left."""
        while self.delayed:
            time.sleep(0.01)

    def script(self, *states):
        """States that every run goes through, one at each look; the last stays."""
        self.states["next"] = list(states)

    def answer(self, method, path, query, body):
        """Status and JSON of a request."""
        with self._lock:
            for pattern, verb, act in self._routes():
                matched = re.fullmatch(API + pattern, path)
                if matched and verb == method:
                    status, answer = act(query, body, *matched.groups())
                    self._watch()
                    return status, answer
        return 404, {"code": 5, "message": f"Not Found: {path}"}

    def _routes(self):
        text = r"/([\w-]+)"
        return [
            ("/healthz", "GET", lambda q, b: (200, {"multi_user": self.multi_user})),
            ("/experiments", "GET", self._list(self.experiments, "experiments")),
            ("/experiments", "POST", self._make_experiment),
            ("/pipelines", "GET", self._list(self.pipelines, "pipelines")),
            ("/pipelines", "POST", self._make(self.pipelines, "pipeline_id", unique=True)),
            ("/pipelines/upload_version", "POST", self._upload),
            (f"/pipelines{text}/versions", "GET", self._list_versions),
            ("/runs", "GET", self._list(self.runs, "runs")),
            ("/runs", "POST", self._make_run),
            (f"/runs{text}", "GET", self._get_run),
            ("/recurringruns", "GET", self._list(self.recurring, "recurringRuns")),
            ("/recurringruns", "POST", self._make(self.recurring, "recurring_run_id")),
            (f"/recurringruns{text}", "DELETE", self._delete),
            (f"/recurringruns{text}:(enable|disable)", "POST", self._switch),
        ]

    def _ident(self):
        self._count += 1
        return f"id-{self._count:04d}"

    def _make(self, things, key, unique=False):
        def act(query, body):
            name = body["display_name"]
            if unique and any(thing["display_name"] == name for thing in things.values()):
                return 409, {"code": 6, "message": f"The name {name} already exists"}
            ident = self._ident()
            created = f"2026-01-01T00:00:00.{self._count:06d}Z"
            things[ident] = {**body, key: ident, "created_at": created}
            return 200, things[ident]

        return act

    def _list(self, things, field, keep=lambda thing: True):
        def act(query, body):
            found = [thing for thing in things.values() if keep(thing)]
            if "experiment_id" in query:
                found = [x for x in found if x["experiment_id"] == query["experiment_id"]]
            for test in json.loads(query.get("filter") or '{"predicates": []}')["predicates"]:
                found = [thing for thing in found if _holds(test, thing)]
            start = int(query.get("page_token") or 0)
            end = start + min(self.page, int(query.get("page_size", 10)))
            answer = {"total_size": len(found)}
            if found[start:end]:  # the real server leaves out what is empty
                answer[field] = found[start:end]
            if end < len(found):
                answer["next_page_token"] = str(end)
            return 200, answer

        return act

    def _list_versions(self, query, body, pipeline):
        keep = lambda version: version["pipeline_id"] == pipeline  # noqa: E731
        return self._list(self.versions, "pipeline_versions", keep)(query, body)

    def _make_experiment(self, query, body):
        if ("namespace" in body) != self.multi_user:
            return 400, {"code": 3, "message": "InvalidInputError: namespace"}
        return self._make(self.experiments, "experiment_id", unique=True)(query, body)

    def _upload(self, query, body):
        things = {k: v for k, v in self.versions.items() if v["pipeline_id"] == query["pipelineid"]}
        assert query["name"] == query["display_name"]
        made = {"display_name": query["name"], "pipeline_id": query["pipelineid"]}
        made["description"] = query.get("description", "")
        status, version = self._make(things, "pipeline_version_id", unique=True)(query, made)
        if status == 200:
            self.versions[version["pipeline_version_id"]] = version
            self.packages[version["pipeline_version_id"]] = body
        return status, version

    def _make_run(self, query, body):
        reference = body["pipeline_version_reference"]
        if reference["pipeline_version_id"] not in self.versions:
            return 400, {"code": 3, "message": "InvalidInputError: no such version"}
        status, run = self._make(self.runs, "run_id")(query, {**body, "state": "PENDING"})
        self.states[run["run_id"]] = list(self.states.get("next", []))
        return status, run

    def _get_run(self, query, body, ident):
        if ident not in self.runs:
            return 404, {"code": 5, "message": f"Run {ident} not found"}
        states = self.states[ident]
        if states:
            state = states.pop(0)
            self.runs[ident].update(state if isinstance(state, dict) else {"state": state})
        return 200, self.runs[ident]

    def _delete(self, query, body, ident):
        if self.recurring.pop(ident, None) is None:
            return 404, {"code": 5, "message": f"Job {ident} not found"}
        return 200, {}

    def _switch(self, query, body, ident, verb):
        if ident not in self.recurring:
            return 404, {"code": 5, "message": f"Job {ident} not found"}
        self.recurring[ident]["mode"] = verb.upper()
        return 200, {}

    def _watch(self):
        enabled = [
            job["display_name"]
            for job in self.recurring.values()
            if job["mode"] == "ENABLE" and (job.get("description") or "").startswith("flowloom")
        ]
        self.two_enabled |= len(set(enabled)) != len(enabled)

    def documents(self):
        """The documents of the only package that was uploaded."""
        (package,) = self.packages.values()
        return list(yaml.safe_load_all(package))


def _holds(test, thing):
    value = thing.get(test["key"]) or ""
    if test["operation"] == "IS_SUBSTRING":
        return test["stringValue"] in value
    assert test["operation"] == "EQUALS"
    return test["stringValue"] == value


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else 40 ms pass between head and body of an answer

        def _serve(self):
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            body = self._body()
            server.asked.append((self.command, url.path))
            if server.token and self.headers["authorization"] != f"Bearer {server.token}":
                return self._send(401, {"code": 16, "message": "no valid token"})
            found = [f for f in server.faults if f.matches(self.command, url.path)]
            if not found:
                return self._send(*server.answer(self.command, url.path, query, body))
            fault = found[0]
            fault.times -= 1
            server.delayed += 1
            time.sleep(fault.delay_s)
            if fault.done:
                server.answer(self.command, url.path, query, body)
            server.delayed -= 1
            if fault.drop:
                self.close_connection = True
                return None
            return self._send(fault.status, {"code": 13, "message": "scripted\nfault"})

        def _body(self):
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            kind = self.headers.get("content-type") or ""
            if not kind.startswith("multipart/"):
                return json.loads(raw) if raw else None
            head = f"content-type: {kind}\r\n\r\n".encode()
            message = email.message_from_bytes(head + raw, policy=email.policy.HTTP)
            (part,) = [p for p in message.iter_parts() if "uploadfile" in p["content-disposition"]]
            return part.get_payload(decode=True)

        def _send(self, status, answer):
            data = json.dumps(answer).encode()
            try:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except ConnectionError:
                pass  # the client waited no longer

        do_GET = do_POST = do_DELETE = _serve

        def log_message(self, *_):
            pass

    return Handler


def only(things):
    """The one thing that there is."""
    (thing,) = things.values()
    return thing
