"""MLflow's server behind a token; dumps in the store.

Facts pinned:
- whoever sends the token, as a bearer token or as the password of any user, is let through, and
  nobody else; probes are; no token at all stops the server;
- a dump comes back under its name, the latest unless another is named; an empty one is not kept,
  and a store that is not in S3 is refused.
"""

import asyncio
import base64
import datetime

import pytest

from flowloom.lifecycle import backups
from flowloom.lifecycle.mlflow_app import TOKEN, app, guard

DAY = datetime.datetime(2026, 3, 1, 2, 17, tzinfo=datetime.UTC)


def asked(path="/api", kind="http", **headers):
    """What the guard sends, `["inner"]` for a request that it lets through."""
    sent = []

    async def inner(scope, receive, send):
        sent.append("inner")

    async def send(message):
        sent.append(message.get("status", message["type"]))

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": kind, "path": path, "headers": raw}
    asyncio.run(guard(inner, "se:cret")(scope, None, send))
    return sent


def basic(text):
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize("given", ["Bearer se:cret", "bearer se:cret", basic("me:se:cret")])
def test_the_token_opens(given):
    assert asked(authorization=given) == ["inner"]


@pytest.mark.parametrize(
    "given",
    [
        "",
        "Bearer ",
        "Bearer se:cre",
        "Bearer se:cret2",
        "se:cret",
        "Digest se:cret",
        basic("se:cret"),
        basic("me:"),
        "Basic se:cret",
        "Bearer caf\xe9",
    ],
)
def test_nothing_else_does(given):
    assert asked(authorization=given) == [401, "http.response.body"]


def test_no_header_is_refused_and_probes_are_not():
    assert asked() == [401, "http.response.body"]
    assert asked("/health") == ["inner"]
    assert asked("/health/x") == [401, "http.response.body"]
    assert asked(kind="lifespan") == ["inner"]
    assert asked(kind="websocket") == ["websocket.close"]


def test_no_token_no_server(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(ValueError, match=f"{TOKEN}: got nothing"):
        app()
    monkeypatch.setenv(TOKEN, "")
    with pytest.raises(ValueError, match=f"{TOKEN}: got nothing"):
        app()


@pytest.fixture
def store(monkeypatch):
    import boto3
    from moto import mock_aws

    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("FLOWLOOM_STORE", "s3://bucket/team")
    with mock_aws():
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield client


def test_dumps_come_back(store, tmp_path):
    for days, data in ((1, b"second"), (0, b"first")):
        (tmp_path / "dump").write_bytes(data)
        name = backups.keep(tmp_path / "dump", DAY + datetime.timedelta(days=days))
    assert name == "mlflow-20260301T021700Z.dump"
    keys = [item["Key"] for item in store.list_objects_v2(Bucket="bucket")["Contents"]]
    assert keys == [f"team/backup/mlflow-2026030{day}T021700Z.dump" for day in (1, 2)]
    store.put_object(Bucket="bucket", Key="team/backup/notes.txt", Body=b"no dump")
    assert backups.fetch(tmp_path / "back") == "mlflow-20260302T021700Z.dump"
    assert (tmp_path / "back").read_bytes() == b"second"
    assert backups.fetch(tmp_path / "back", name) == name
    assert (tmp_path / "back").read_bytes() == b"first"
    with pytest.raises(ValueError, match=r"got other, expected one of: mlflow-20260301T021700Z"):
        backups.fetch(tmp_path / "back", "other")


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3://bucket/a/b/"])
def test_where_they_lie(store, tmp_path, monkeypatch, url):
    monkeypatch.setenv("FLOWLOOM_STORE", url)
    (tmp_path / "dump").write_bytes(b"x")
    name = backups.keep(tmp_path / "dump", DAY)
    (item,) = store.list_objects_v2(Bucket="bucket")["Contents"]
    below = "a/b/backup/" if "a/b" in url else "backup/"
    assert item["Key"] == below + name


def test_what_is_no_dump_and_no_store(store, tmp_path, monkeypatch):
    (tmp_path / "dump").touch()
    with pytest.raises(ValueError, match="got an empty file"):
        backups.keep(tmp_path / "dump", DAY)
    with pytest.raises(ValueError, match="got latest, expected one of: none"):
        backups.fetch(tmp_path / "back")
    for url in ("", "/var/lib/store", "s3://"):
        monkeypatch.setenv("FLOWLOOM_STORE", url)
        with pytest.raises(ValueError, match=r"expected s3://BUCKET/PREFIX"):
            backups.fetch(tmp_path / "back")


def test_what_goes_wrong_is_one_line(store, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWLOOM_STORE", "s3://nowhere")
    (tmp_path / "dump").write_bytes(b"x")
    for command, said in (
        (["fetch", str(tmp_path / "back")], "The specified bucket does not exist"),
        (["keep", str(tmp_path / "dump")], "The specified bucket does not exist"),
        (["keep", str(tmp_path / "none")], "No such file or directory"),
        (["prune"], "usage: "),
    ):
        with pytest.raises(SystemExit, match=said) as stop:
            backups.main(command)
        assert "\n" not in stop.value.code
