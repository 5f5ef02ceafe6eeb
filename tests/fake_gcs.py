"""A bucket in this process: the part of Google Cloud Storage's HTTP interface that the stack's three clients speak.

gcsfs and google-cloud-storage find it by `STORAGE_EMULATOR_HOST`, TensorStore by `TENSORSTORE_GCS_HTTP_URL`.
https://cloud.google.com/storage/docs/json_api/v1
"""

import base64
import contextlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

BUCKET = "bucket"
_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)(?:/(rewriteTo|moveTo)/(?:b/[^/]+/)?o/([^/]+))?")
_LIST = re.compile(r"/(?:upload/)?storage/v1/b/([^/]+)/o")


class Stored(NamedTuple):
    content: bytes
    generation: int
    updated: str


class Bucket:
    """What is in the bucket, and what was asked for.

    Attributes:
      objects: by name.
      calls: of every request: its method and the object's name, or the prefix that was listed.
      status: of a request that shall fail, from its method and the name; None: it is served.
    """

    def __init__(self, url: str):
        self.url = url
        self.objects: dict[str, Stored] = {}
        self.calls: list[tuple[str, str]] = []
        self.status: Callable[[str, str], int | None] = lambda method, name: None
        self.lock = threading.Lock()
        self.uploads: dict[str, tuple[str, dict, bytearray]] = {}
        self.numbers = itertools.count(1)

    def put(self, name: str, content: bytes) -> Stored:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self.objects[name] = Stored(bytes(content), next(self.numbers), now)
        return self.objects[name]

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in list(self.objects) if name.startswith(prefix))

    def remove(self, prefix: str = "") -> None:
        for name in self.names(prefix):
            del self.objects[name]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks what kind of bucket it is, over gRPC
        }


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
    """An empty bucket for as long as the context lives."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.bucket = Bucket(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.bucket
    finally:
        server.shutdown()
        server.server_close()


def _describe(name: str, stored: Stored) -> dict:
    checksum = base64.b64encode(google_crc32c.Checksum(stored.content).digest()).decode()
    return {
        "kind": "storage#object",
        "name": name,
        "bucket": BUCKET,
        "size": str(len(stored.content)),
        "generation": str(stored.generation),
        "metageneration": "1",
        "crc32c": checksum,
        "etag": str(stored.generation),
        "contentType": "application/octet-stream",
        "timeCreated": stored.updated,
        "updated": stored.updated,
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Quiet: gcsfs asks two questions at once and hangs up when one is answered."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self, status: int, content: bytes | dict = b"", **headers) -> None:
        body = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", f"application/{'json' if isinstance(content, dict) else 'octet-stream'}")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int) -> None:
        self._answer(status, {"error": {"code": status, "message": "the bucket says no"}})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _handle(self) -> None:
        bucket: Bucket = self.server.bucket
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        body = self._body()
        path, sent = parts.path, None
        if found := _OBJECT.fullmatch(path):
            name = unquote(found[2])
        elif found := _LIST.fullmatch(path):
            name = query.get("name", query.get("prefix", ""))
            if query.get("uploadType") == "multipart":
                described, sent = _multipart(self.headers["Content-Type"], body)
                name = described.get("name", name)
        else:
            name = ""
        bucket.calls.append((self.command, name))
        if status := bucket.status(self.command, name):
            return self._fail(status)
        if "upload_id" in query:
            return self._continue_upload(bucket, query["upload_id"], body)
        if path == f"/storage/v1/b/{BUCKET}":
            return self._answer(200, {"kind": "storage#bucket", "name": BUCKET})
        if not found or found[1] != BUCKET:
            return self._fail(404)
        with bucket.lock:
            if found.re is _OBJECT:
                self._object(bucket, name, query, found)
            elif self.command == "GET":
                self._list(bucket, query)
            else:
                self._upload(bucket, name, query, sent, body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _handle

    def _list(self, bucket: Bucket, query: dict) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        first = max(query.get("startOffset", ""), query.get("pageToken", ""))
        items, prefixes = [], []
        for name in bucket.names(prefix):
            if name < first:
                continue
            if len(items) + len(prefixes) == int(query.get("maxResults", 1000)):
                return self._answer(200, {"items": items, "prefixes": prefixes, "nextPageToken": name})
            head, separator, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if not separator:
                items.append(_describe(name, bucket.objects[name]))
            elif (folder := prefix + head + separator) not in prefixes:
                prefixes.append(folder)
        self._answer(200, {"items": items, "prefixes": prefixes})

    def _upload(self, bucket: Bucket, name: str, query: dict, sent: bytes | None, body: bytes) -> None:
        if query["uploadType"] == "resumable":
            name = name or json.loads(body)["name"]
            number = str(next(bucket.numbers))
            bucket.uploads[number] = (name, query, bytearray())
            location = f"{bucket.url}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={number}"
            return self._answer(200, Location=location)
        self._store(bucket, name, query, body if sent is None else sent)

    def _continue_upload(self, bucket: Bucket, number: str, body: bytes) -> None:
        name, query, so_far = bucket.uploads[number]
        so_far += body
        total = self.headers.get("Content-Range", "/").rpartition("/")[2]
        if total == "*" or (total and int(total) > len(so_far)):
            return self._answer(308, Range=f"bytes=0-{len(so_far) - 1}")
        with bucket.lock:
            self._store(bucket, name, query, bytes(so_far))

    def _store(self, bucket: Bucket, name: str, query: dict, content: bytes) -> None:
        there = bucket.objects.get(name)
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != (there.generation if there else 0):
            return self._fail(412)
        self._answer(200, _describe(name, bucket.put(name, content)))

    def _object(self, bucket: Bucket, name: str, query: dict, found: re.Match) -> None:
        there = bucket.objects.get(name)
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != (there.generation if there else 0):
            return self._fail(412)
        if there is None or query.get("generation", str(there.generation)) != str(there.generation):
            return self._fail(404)
        if query.get("ifGenerationNotMatch") == str(there.generation):
            return self._answer(304)
        if found[3]:
            target = unquote(found[4])
            if found[3] == "moveTo":
                del bucket.objects[name]
            resource = _describe(target, bucket.put(target, there.content))
            done = {"kind": "storage#rewriteResponse", "done": True, "resource": resource}
            return self._answer(200, done if found[3] == "rewriteTo" else resource)
        if self.command == "DELETE":
            del bucket.objects[name]
            return self._answer(204)
        if query.get("alt") != "media":
            return self._answer(200, _describe(name, there))
        headers = {
            "x_goog_generation": str(there.generation),
            "x_goog_stored_content_length": str(len(there.content)),
            "x_goog_hash": f"crc32c={_describe(name, there)['crc32c']}",
            "ETag": str(there.generation),
        }
        if not (span := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))):
            return self._answer(200, there.content, **headers)
        size = len(there.content)
        begin = int(span[1]) if span[1] else max(size - int(span[2]), 0)
        end = min(int(span[2]) + 1, size) if span[1] and span[2] else size
        if begin >= size:
            return self._fail(416)
        headers["Content_Range"] = f"bytes {begin}-{end - 1}/{size}"
        self._answer(206, there.content[begin:end], **headers)


def _multipart(content_type: str, body: bytes) -> tuple[dict, bytes]:
    """The description and the content of an upload in one request."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)[1].encode()
    _, described, content, _ = re.split(rb"(?:\r?\n)?--" + re.escape(boundary), body)
    parts = [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (described, content)]
    return json.loads(parts[0]), parts[1]
