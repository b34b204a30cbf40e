"""Buckets on loopback: the calls of Cloud Storage's JSON API that gcsfs, tensorstore and google-cloud-storage make.

Objects with generations, whole, multipart and resumable uploads, ranges, listings, preconditions; what is not listed
below answers 501, so that nothing passes by not being looked at. It is no judge of permissions: buckets "none-*" don't
exist, "closed-*" are forbidden, and all others are there.
"""

import base64
import contextlib
import datetime
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from fot import bucket

HOST = "127.0.0.1"


class Object(NamedTuple):
    content: bytes
    generation: int
    updated: str


class Refused(Exception):
    """An answer that is an error; its arguments are status and message."""


class Server(http.server.ThreadingHTTPServer):
    """Attributes: objects: (bucket, name) -> its newest generation; losing: answers to uploads that get lost;
    closed: buckets that are forbidden from now on.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__((HOST, 0), Handler)
        self.objects: dict[tuple[str, str], Object] = {}
        self.losing = 0
        self.closed: set[str] = set()
        self.uploads: dict[str, tuple[str, str, dict, bytearray]] = {}
        self.turn = threading.RLock()
        self.numbers = itertools.count(1)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What has the three clients talk to this server, and look for no credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "NO_GCE_CHECK": "true",
        }

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        with self.turn:
            return sorted(name for where, name in self.objects if where == bucket and name.startswith(prefix))

    def put(self, bucket: str, name: str, content: bytes) -> Object:
        with self.turn:
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            self.objects[bucket, name] = Object(content, next(self.numbers), now)
            return self.objects[bucket, name]

    def handle_error(self, *_) -> None:
        """Clients are killed in these tests; the connections that break then are no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_) -> None:
        pass

    def handle_method(self) -> None:
        # The body is read whatever the answer is: what is left of it would be taken for the next request.
        body = self._body()
        parts = urllib.parse.urlsplit(self.path)
        self.query = {name: values[0] for name, values in urllib.parse.parse_qs(parts.query).items()}
        try:
            for method, pattern, answer in ROUTES:
                if method == self.command and (found := re.fullmatch(pattern, parts.path)):
                    names = [urllib.parse.unquote(name) for name in found.groups()]
                    self.check_bucket(names[0])
                    with self.server.turn:
                        answer(self, *names, body)
                    return
            raise Refused(501, f"{self.command} {parts.path} is not among the calls of this server")
        except Refused as refused:
            status, message = refused.args
            self.send(status, b"" if status == 304 else {"error": {"code": status, "message": message}})

    do_GET = do_POST = do_PUT = do_DELETE = handle_method

    def check_bucket(self, name: str) -> None:
        if name.startswith("none-"):
            raise Refused(404, "The specified bucket does not exist.")
        if name.startswith("closed-") or name in self.server.closed:
            raise Refused(403, "someone@example.com does not have storage.buckets.get access to the bucket.")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            sizes = iter(lambda: int(self.rfile.readline().strip() or b"0", 16), 0)
            content = b"".join(self.rfile.read(size + 2)[:size] for size in sizes)
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, content: dict | bytes, headers: dict[str, str] | None = None) -> None:
        if self.server.losing and self.command == "POST":
            self.server.losing -= 1
            self.close_connection = True
            return
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json; charset=UTF-8"
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def about(self, bucket: str, name: str) -> dict[str, str]:
        """Returns the object's resource, as the API has it."""
        found = self.found(bucket, name)
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "size": str(len(found.content)),
            "generation": str(found.generation),
            "metageneration": "1",
            "updated": found.updated,
            "timeCreated": found.updated,
            "md5Hash": base64.b64encode(hashlib.md5(found.content).digest()).decode(),
        }

    def found(self, bucket: str, name: str) -> Object:
        if (bucket, name) not in self.server.objects:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return self.server.objects[bucket, name]

    def check(self, bucket: str, name: str, conditions: dict[str, str]) -> None:
        """Refuses what the preconditions rule out; generation 0 is that of no object."""
        there = self.server.objects.get((bucket, name))
        generation = there.generation if there else 0
        if "ifGenerationMatch" in conditions and int(conditions["ifGenerationMatch"]) != generation:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if "ifGenerationNotMatch" in conditions and int(conditions["ifGenerationNotMatch"]) == generation:
            raise Refused(304 if self.command == "GET" else 412, "not modified")

    def get_bucket(self, bucket: str, _: bytes) -> None:
        self.send(200, {"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US"})

    def listing(self, bucket: str, _: bytes) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        start, end = self.query.get("startOffset", ""), self.query.get("endOffset") or chr(0x10FFFF)
        names, folders = [], []
        for name in self.server.names(bucket, prefix):
            if start <= name < end and name > self.query.get("pageToken", ""):
                head, mark, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                names.append(name) if not mark else folders.append(prefix + head + mark)
        most = int(self.query.get("maxResults", 1000))
        answer = {"kind": "storage#objects", "items": [self.about(bucket, name) for name in names[:most]]}
        if folders:
            answer["prefixes"] = sorted(set(folders))
        if len(names) > most:
            answer["nextPageToken"] = names[most - 1]
        self.send(200, answer)

    def get(self, bucket: str, name: str, _: bytes) -> None:
        found = self.found(bucket, name)
        self.check(bucket, name, self.query)
        if int(self.query.get("generation", found.generation)) != found.generation:
            raise Refused(404, f"No such object: {bucket}/{name}")
        if self.query.get("alt") != "media":
            return self.send(200, self.about(bucket, name))
        headers = {"x-goog-generation": str(found.generation), "x-goog-stored-content-length": str(len(found.content))}
        size = len(found.content)
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = asked.groups()
            begin = int(first) if first else max(size - int(last), 0)
            end = min(int(last) + 1, size) if first and last else size
            if begin >= size:
                raise Refused(416, "The requested range cannot be satisfied.")
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
            return self.send(206, found.content[begin:end], headers)
        return self.send(200, found.content, headers)

    def delete(self, bucket: str, name: str, _: bytes) -> None:
        self.found(bucket, name)
        self.check(bucket, name, self.query)
        del self.server.objects[bucket, name]
        self.send(204, b"")

    def insert(self, bucket: str, body: bytes) -> None:
        kind, name = self.query.get("uploadType"), self.query.get("name")
        if kind == "media":
            return self.finish(bucket, name, self.query, body)
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, first, second, _ = re.split(rb"(?:\r?\n)?--" + re.escape(boundary), body)
            described, content = (
                re.split(rb"\r?\n\r?\n", part.lstrip(b"\r\n"), maxsplit=1)[1] for part in (first, second)
            )
            return self.finish(bucket, json.loads(described)["name"], self.query, content)
        if kind == "resumable" and "upload_id" not in self.query:
            name = name or json.loads(body)["name"]
            number = str(next(self.server.numbers))
            self.server.uploads[number] = (bucket, name, self.query, bytearray())
            return self.send(200, b"", {"Location": f"{self.server.url}{self.path}&upload_id={number}"})
        if kind == "resumable":
            return self.upload(body)
        raise Refused(501, f"uploadType={kind}")

    def upload(self, body: bytes) -> None:
        """Takes a piece of a resumable upload; the last one says how long the whole is."""
        bucket, name, conditions, content = self.server.uploads[self.query["upload_id"]]
        first, whole = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"]).groups()
        content[int(first) if first else len(content) :] = body
        if whole == "*" or len(content) < int(whole):
            return self.send(308, b"", {"Range": f"bytes=0-{len(content) - 1}"})
        del self.server.uploads[self.query["upload_id"]]
        return self.finish(bucket, name, conditions, bytes(content))

    def finish(self, bucket: str, name: str, conditions: dict[str, str], content: bytes) -> None:
        self.check(bucket, name, conditions)
        self.server.put(bucket, name, content)
        self.send(200, self.about(bucket, name))


_BUCKET = "/storage/v1/b/([^/]+)"
ROUTES = (
    ("GET", _BUCKET, Handler.get_bucket),
    ("GET", f"{_BUCKET}/o", Handler.listing),
    ("GET", f"(?:/download)?{_BUCKET}/o/([^/]+)", Handler.get),
    ("DELETE", f"{_BUCKET}/o/([^/]+)", Handler.delete),
    ("POST", f"/upload{_BUCKET}/o", Handler.insert),
    ("PUT", f"/upload{_BUCKET}/o", Handler.insert),
)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Gives a server that runs during the block."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def connected() -> Iterator[Server]:
    """Gives a server that this process, and what it starts, takes for Cloud Storage during the block."""
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        bucket._opened.cache_clear()
        yield server
        bucket._opened.cache_clear()
