"""A remote in S3, or in what speaks its protocol.

Large objects go up in parts and come down from where they stopped, so that an interrupted transfer
goes on. Address and credentials are those of the AWS tools: `AWS_ENDPOINT_URL` (or
`FLOWLOOM_S3_ENDPOINT`), `AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, a pod's role.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import io
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flowloom.lifecycle import remotes
from flowloom.lifecycle.objects import FOLDER, is_digest, md5_of, object_key
from flowloom.lifecycle.remotes import S3, UnreachableError, expect

ATTEMPTS = 5
"""Tries of one request; waits between them double, from under a second."""
TIMEOUT_S = 30.0
"""Seconds without an answer until a request is tried again."""
PART_BYTES = 8 << 20
"""Bytes of a part of an upload; S3 wants at least 5 MiB."""
MAX_PARTS = 10_000
"""S3 takes no more parts of an object."""
CHUNK_BYTES = 1 << 20
REFRESH_S = 3600.0
"""Seconds after which an object that a publisher finds is made young again."""
MAX_COPY_BYTES = 5 << 30
"""S3 copies no larger object in one request."""
MISSING = ("404", "NoSuchKey", "NotFound")
UNFINISHED_UNKNOWN = ("AccessDenied", "NotImplemented", "MethodNotAllowed")
"""Answers of servers that do not tell which uploads are unfinished: a new one is begun."""
_ADVICE = {
    "NoSuchBucket": "no such bucket",
    "AccessDenied": "access denied",
    "403": "access denied",
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key is not the one of the access key",
    "ExpiredToken": "the session token has expired",
}


class S3Remote:
    """Objects below `s3://bucket/prefix`."""

    def __init__(self, name: str, url: str, endpoint: str | None) -> None:
        """Open it; nothing is asked of the server yet.

        Raises:
            ValueError: The address names no bucket, or the endpoint is none.
        """
        self.name = name
        self.place = url
        self._bucket, _, prefix = url.removeprefix(S3).partition("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._stopped = threading.Event()
        if not re.fullmatch(r"[\w.-]+", self._bucket, re.ASCII):
            raise ValueError(f"remote {name!r}: got {url!r}, expected {S3}bucket/prefix")
        self._client = self._connect(endpoint)

    def has(self, digest: str, size: int) -> bool:
        """See `Remote`. S3 guards what it took: its own digest of it, or the size, is enough."""
        with self._errors():
            try:
                found = self._client.head_object(**self._at(digest))
            except self._client.exceptions.ClientError as error:
                if _code(error) in MISSING:
                    return False
                raise
        if not _is_whole(found, digest.removesuffix(FOLDER)) or found["ContentLength"] != size:
            return False
        age_s = time.time() - found["LastModified"].timestamp()
        return self._renew(digest) if age_s > REFRESH_S and size <= MAX_COPY_BYTES else True

    def put(self, digest: str, source: Path) -> None:
        """See `Remote`."""
        size = source.stat().st_size
        if size <= PART_BYTES:
            data = source.read_bytes()
            expect(digest, md5_of(data), source)
            self._put_bytes(digest, data)
            return
        for _ in range(ATTEMPTS):
            with self._errors():
                try:
                    self._put_parts(digest, source, size)
                except self._client.exceptions.ClientError as error:
                    # Another publisher of this object finished first, or the answer to our own
                    # request was lost, or a rule ended the upload.
                    if not self.has(digest, size):
                        if _code(error) != "NoSuchUpload":
                            raise
                        continue
                self._end_others(digest)
                return
        raise UnreachableError(f"{self._said()}: {source}: the upload was ended {ATTEMPTS} times")

    def put_manifest(self, digest: str, data: bytes) -> None:
        """See `Remote`."""
        self._put_bytes(digest, data)

    def get(self, digest: str, target: Path) -> bool:
        """See `Remote`."""
        attempt = 0
        while True:
            start = target.stat().st_size if target.exists() else 0
            with self._errors():
                found = self._open(digest, start)
            if found is None:
                return False
            try:
                with self._errors():
                    self._append(found, target)
                return True
            except UnreachableError:  # it broke off
                attempt = 0 if target.stat().st_size > start else attempt + 1
                if self._stopped.is_set() or attempt >= ATTEMPTS:
                    raise
                time.sleep(0.2 * 2**attempt)

    def read(self, digest: str) -> bytes | None:
        """See `Remote`."""
        for attempt in range(ATTEMPTS):
            try:
                with self._errors():
                    found = self._open(digest)
                    return None if found is None else found.read()
            except UnreachableError:  # it broke off
                if self._stopped.is_set() or attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def digest_of(self, digest: str) -> str | None:
        """See `Remote`."""
        with self._errors():
            found = self._open(digest)
            if found is None:
                return None
            hasher = hashlib.md5(usedforsecurity=False)
            while chunk := found.read(CHUNK_BYTES):
                hasher.update(chunk)
                self._go_on()
        return hasher.hexdigest() + (FOLDER if digest.endswith(FOLDER) else "")

    def listed(self, prefix: str) -> Iterator[tuple[str, int, datetime.datetime]]:
        """Key below the remote's place, bytes and time of change of every object below `prefix`."""
        with self._errors():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    key = item["Key"].removeprefix(self._prefix)
                    yield key, item["Size"], item["LastModified"]

    def remove(self, digest: str, before: datetime.datetime) -> bool:
        """Delete an object unless it was written or renewed since; says whether it did.

        S3 cannot delete on a condition: for the moment between the two requests a publisher could
        renew what is then deleted, so `before` must be long ago.
        """
        with self._errors():
            try:
                found = self._client.head_object(**self._at(digest))
            except self._client.exceptions.ClientError as error:
                if _code(error) in MISSING:
                    return False
                raise
            if found["LastModified"] > before:
                return False
            self._client.delete_object(**self._at(digest))
            return True

    def sweep(self) -> None:
        """See `Remote`. Unfinished uploads are gone on with; a rule of the bucket ends old ones."""

    def stop(self) -> None:
        """See `Remote`."""
        self._stopped.set()

    def _renew(self, digest: str) -> bool:
        """Have an object's age begin anew; `False` if it was deleted meanwhile."""
        at = self._at(digest)
        with self._errors():
            try:
                # S3 copies an object to itself only where something about it changes.
                self._client.copy_object(**at, CopySource=at, MetadataDirective="REPLACE")
            except self._client.exceptions.ClientError as error:
                if _code(error) in MISSING:
                    return False
                if _code(error) != "AccessDenied":  # no right to replace: nor to delete it
                    raise
        return True

    def _put_bytes(self, digest: str, data: bytes) -> None:
        md5 = hashlib.md5(data, usedforsecurity=False)
        with self._errors():
            self._send(self._client.put_object, data, md5.digest(), self._at(digest))

    def _send(
        self, call: Callable[..., dict[str, Any]], data: bytes, md5: bytes, place: dict[str, Any]
    ) -> str:
        """Send bytes until they arrive as they are; returns the server's tag of them."""
        for _ in range(ATTEMPTS):
            self._go_on()
            try:
                answer = call(**place, Body=data, ContentMD5=base64.b64encode(md5).decode())
            except self._client.exceptions.ClientError as error:
                if _code(error) != "BadDigest":
                    raise
                continue
            # Not every server compares what came with Content-MD5.
            if _is_whole(answer, md5.hex()):
                return answer["ETag"]
        raise UnreachableError(f"{self._said()}: {place['Key']}: arrived damaged {ATTEMPTS} times")

    def _put_parts(self, digest: str, source: Path, size: int) -> None:
        at = self._at(digest)
        part_bytes = max(PART_BYTES, math.ceil(size / MAX_PARTS))
        upload = self._unfinished(digest)
        if upload is None:
            upload = self._client.create_multipart_upload(**at)["UploadId"]
        there = self._parts(digest, upload)
        whole, parts = hashlib.md5(usedforsecurity=False), []
        with source.open("rb") as file:
            while data := file.read(part_bytes):
                number = len(parts) + 1
                whole.update(data)
                part = hashlib.md5(data, usedforsecurity=False)
                tag = there.get(number)
                if tag is None or tag.strip('"') != part.hexdigest():
                    place = {**at, "UploadId": upload, "PartNumber": number}
                    tag = self._send(self._client.upload_part, data, part.digest(), place)
                parts.append({"PartNumber": number, "ETag": tag})
        if whole.hexdigest() != digest:
            self._client.abort_multipart_upload(**at, UploadId=upload)
        expect(digest, whole.hexdigest(), source)
        self._client.complete_multipart_upload(
            **at, UploadId=upload, MultipartUpload={"Parts": parts}
        )

    def _unfinished(self, digest: str) -> str | None:
        """The upload of this object that somebody began and did not finish."""
        return next(reversed(self._uploads(digest)), None)

    def _uploads(self, digest: str) -> list[str]:
        at = self._at(digest)
        try:
            found = self._client.list_multipart_uploads(Bucket=at["Bucket"], Prefix=at["Key"])
        except self._client.exceptions.ClientError as error:
            if _code(error) in UNFINISHED_UNKNOWN:
                return []
            raise
        return [u["UploadId"] for u in found.get("Uploads", ()) if u["Key"] == at["Key"]]

    def _end_others(self, digest: str) -> None:
        """End uploads of an object that is there: one may have been begun without our knowing.

        Another publisher that is in one of them finds the object there.
        """
        for upload in self._uploads(digest):
            with contextlib.suppress(self._client.exceptions.NoSuchUpload):
                self._client.abort_multipart_upload(**self._at(digest), UploadId=upload)

    def _parts(self, digest: str, upload: str) -> dict[int, str]:
        pages = self._client.get_paginator("list_parts").paginate(
            **self._at(digest), UploadId=upload
        )
        return {p["PartNumber"]: p["ETag"] for page in pages for p in page.get("Parts", ())}

    def _open(self, digest: str, start: int = 0) -> Any:
        """The stream of an object from byte `start` on, or `None` if there is no such object."""
        part = {"Range": f"bytes={start}-"} if start else {}
        try:
            self._go_on()
            return self._client.get_object(**self._at(digest), **part)["Body"]
        except self._client.exceptions.ClientError as error:
            if _code(error) in MISSING:
                return None
            if start and _code(error) == "InvalidRange":  # it ends where we are
                return io.BytesIO()
            raise

    def _append(self, stream: Any, target: Path) -> None:
        with target.open("ab") as file:
            while chunk := stream.read(CHUNK_BYTES):
                file.write(chunk)
                self._go_on()

    def _at(self, digest: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + object_key(digest)}

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise UnreachableError(f"{self._said()}: stopped")

    def _said(self) -> str:
        return f"remote {self.name!r} ({self.place})"

    def _connect(self, endpoint: str | None) -> Any:
        from boto3.session import Session
        from botocore.config import Config

        given = ("FLOWLOOM_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        endpoint = endpoint or next(filter(None, map(os.environ.get, given)), None)
        config = Config(
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            connect_timeout=TIMEOUT_S / 5,
            read_timeout=TIMEOUT_S,
            max_pool_connections=remotes.WORKERS,
            # Content-MD5 guards what is sent; servers other than AWS do not know newer sums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # Only AWS itself is sure to answer under bucket.host.
            s3={"addressing_style": "path" if endpoint else "auto"},
        )
        with self._errors():
            session = Session()
            try:
                return session.client("s3", endpoint_url=endpoint, config=config)
            except ValueError as error:
                raise ValueError(f"{self._said()}: {error}, expected http://HOST:PORT") from None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what botocore throws into one line for a person."""
        from botocore import exceptions as raised

        said = self._said()
        try:
            yield
        except raised.ClientError as error:
            code = _code(error)
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            message = _ADVICE.get(code) or error.response.get("Error", {}).get("Message") or code
            kind = UnreachableError if status >= 500 or status == 429 else ValueError
            raise kind(f"{said}: {error.operation_name}: {message}") from None
        except (raised.NoCredentialsError, raised.PartialCredentialsError):
            raise ValueError(
                f"{said}: got no credentials, expected AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from None
        except (
            raised.HTTPClientError,
            raised.ConnectionError,
            raised.IncompleteReadError,
        ) as error:
            raise UnreachableError(f"{said}: {error}") from None
        except raised.BotoCoreError as error:
            raise ValueError(f"{said}: {error}") from None


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _is_whole(answer: Mapping[str, Any], md5: str) -> bool:
    """Whether an object or a part is what was sent, as far as its tag can tell.

    That of what came in one piece and is not encrypted with another key is its MD5.
    """
    tag, sealed = answer["ETag"].strip('"'), answer.get("ServerSideEncryption", "AES256")
    return not is_digest(tag) or sealed != "AES256" or tag == md5
