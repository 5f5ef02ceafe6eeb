"""Files from paths, from a web server and from a hub, both of them on this machine."""

import concurrent.futures
import contextlib
import gzip
import hashlib
import http.server
import itertools
import json
import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from vitpyramid.weights import fetch as module
from vitpyramid.weights.fetch import fetch

BODY = np.random.default_rng(0).bytes(1_000_000)
OTHER = np.random.default_rng(1).bytes(900_000)
SHA = hashlib.sha256(BODY).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Answers every GET with `body`, in the manner that the attributes say; keeps the headers of the requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.body, self.headers, self.requests = BODY, {"ETag": '"one"'}, []
        self.statuses, self.cuts = iter(()), iter(())  # of the next answers
        self.ranges, self.started, self.go = True, threading.Event(), threading.Event()
        self.go.set()
        self.hub = {}  # (repository, revision): {file: content}, or None: not for everybody


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, dict(self.headers)
        server.requests.append(asked)
        server.started.set()
        server.go.wait(10)
        if status := next(server.statuses, None):
            return self.send_error(status)
        version = asked.get("If-Range") in (server.headers.get("ETag"), server.headers.get("Last-Modified"))
        start = int(asked["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in asked else 0
        resumes = start and version and server.ranges
        content = server.body[start:] if resumes else server.body
        self.send_response(206 if resumes else 200)
        self.send_header("Content-Length", len(content))
        if resumes:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        for key, value in server.headers.items():
            if not (resumes and key == "Last-Modified"):  # which such an answer need not have
                self.send_header(key, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the other side may have read enough
            self.wfile.write(content[: next(server.cuts, None)])

    def log_message(self, *args):
        pass


class Hub(Handler):
    """As much of the Hugging Face hub's protocol as downloads need."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        content, error, tag = None, "RepoNotFound", "none"
        for (repo, revision), files in self.server.hub.items():
            if path == f"/api/models/{repo}/tree/{revision}":
                tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
                content, tag = json.dumps(tree).encode(), "tree"
            elif path.startswith(f"/{repo}/resolve/"):
                at, _, name = path.removeprefix(f"/{repo}/resolve/").partition("/")
                found = unquote(at) == revision
                error = "GatedRepo" if files is None else "EntryNotFound" if found else "RevisionNotFound"
                content, tag = (files or {}).get(name) if found else None, hashlib.sha1(name.encode()).hexdigest()
            if content is not None:
                break
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", error)
            content = b""
        for key, value in {"ETag": f'"{tag}"', "X-Repo-Commit": "c" * 40, "Content-Length": len(content)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "_WAITS", (0.0, 0.0, 0.0))
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def asked_from(server) -> list[str | None]:
    return [request.get("Range") for request in server.requests]


def stopped_once(server, cache, monkeypatch, name="w.pth") -> int:
    """A download of which all attempts but the first are yet to come: bytes that are there."""
    server.cuts = iter([700_000])
    with monkeypatch.context() as patch:
        patch.setattr(module, "_WAITS", ())
        with pytest.raises(OSError, match=rf"{server.url}/{name}: .*(700000|300000).*last"):
            fetch(f"{server.url}/{name}", cache)
    (part,) = cache.rglob("*.part")
    assert 500_000 < part.stat().st_size <= 700_000
    return part.stat().st_size


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pth").write_bytes(b"1")
    assert fetch("~/w.pth") == fetch(tmp_path / "w.pth") == tmp_path / "w.pth"
    assert fetch(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match=r"absent\.pth: no such file or folder"):
        fetch(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://bucket/w.pth", "s3://bucket/w.pth: expected a path, gs://.* or https://"),
        ("hf://owner", r"hf://owner: expected hf://owner/repo\[/file\]"),
        ("https://example.org/", "expected a URL that ends in the name of a file"),
        ("https://example.org/a/..", "expected a URL that ends in the name of a file"),
        ("https://example.org/w.pth#sha256=12", "expected #sha256= and 64 hexadecimal digits"),
        ("https://example.org/w.pth#md5=12", "expected #sha256= and 64 hexadecimal digits"),
        ("http://example.org/w.pth", "expected https://, or #sha256="),
        ("http://localhost:99999999/w.pth", "http://localhost:99999999/w.pth: "),
    ],
)
def test_sources_that_make_no_sense(source, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        fetch(source, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_second_time_it_comes_from_the_cache(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    path = fetch(f"{server.url}/some%20folder/my%2F..%2Fw%201.pth")
    assert path.name == "w_1.pth"
    assert path.is_relative_to(tmp_path / "vitpyramid" / "weights")
    assert path.read_bytes() == BODY
    assert {file.name for file in path.parent.iterdir()} <= {"w_1.pth", "lock"}
    told = capsys.readouterr().err
    assert f"downloading {server.url}" in told
    assert "1.00M/1.00M" in told  # the bar
    assert fetch(f"{server.url}/some%20folder/my%2F..%2Fw%201.pth") == path
    assert f"from the cache, {path}" in capsys.readouterr().err
    assert len(server.requests) == 1
    assert fetch(f"{server.url}/elsewhere/w_1.pth") != path  # another URL is another file


def test_a_cut_connection_goes_on_by_itself(server, tmp_path, capsys):
    server.cuts = iter([700_000, 200_000])
    assert fetch(f"{server.url}/w.pth", tmp_path).read_bytes() == BODY
    first, *others = asked_from(server)
    offsets = [int(asked.removeprefix("bytes=").rstrip("-")) for asked in others]
    assert first is None
    assert 500_000 < offsets[0] <= 700_000 < offsets[1] <= offsets[0] + 200_000
    assert [request["If-Range"] for request in server.requests[1:]] == ['"one"'] * 2
    assert capsys.readouterr().err.count("again in 0 s") == 2


def test_a_later_call_goes_on(server, tmp_path, monkeypatch, capsys):
    size = stopped_once(server, tmp_path, monkeypatch)
    assert fetch(f"{server.url}/w.pth", tmp_path).read_bytes() == BODY
    assert asked_from(server) == [None, f"bytes={size}-"]
    assert "100%" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.part*"))


@pytest.mark.parametrize(
    ("headers", "if_range"),
    [
        ({"ETag": 'W/"weak"', "Last-Modified": "Sat, 21 Nov 2020 00:00:00 GMT"}, "Sat, 21 Nov 2020 00:00:00 GMT"),
        ({}, None),
    ],
)
def test_only_what_is_surely_the_same_file_is_resumed(headers, if_range, server, tmp_path, monkeypatch):
    server.headers = headers
    stopped_once(server, tmp_path, monkeypatch)
    server.cuts = iter([150_000])
    assert fetch(f"{server.url}/w.pth", tmp_path).read_bytes() == BODY
    for request in server.requests[1:]:
        assert request.get("If-Range") == if_range
        assert ("Range" in request) == (if_range is not None)
    assert len(server.requests) == 3


def test_a_server_without_ranges(server, tmp_path, monkeypatch):
    server.ranges = False
    stopped_once(server, tmp_path, monkeypatch)
    assert fetch(f"{server.url}/w.pth", tmp_path).read_bytes() == BODY


def test_a_file_that_changed_meanwhile(server, tmp_path, monkeypatch):
    stopped_once(server, tmp_path, monkeypatch)
    server.body, server.headers = OTHER, {"ETag": '"two"'}
    server.cuts = iter([800_000])  # the rest of the new one must be asked for by its own tag
    assert fetch(f"{server.url}/w.pth", tmp_path).read_bytes() == OTHER
    assert [request["If-Range"] for request in server.requests[1:]] == ['"one"', '"two"']


@pytest.mark.parametrize("answer", ["416", "another range"])
def test_a_server_that_answers_with_something_else(answer, server, tmp_path, monkeypatch):
    stopped_once(server, tmp_path, monkeypatch)
    if answer == "416":
        server.statuses = iter([416])
    else:
        (part,) = tmp_path.rglob("*.part")
        with part.open("ab") as file:  # longer than what this server takes its ranges from
            file.write(b"x" * 10)
        monkeypatch.setattr(Handler, "send_header", shifted(Handler.send_header))
    assert fetch(f"{server.url}/w.pth", tmp_path).read_bytes() == BODY
    assert len(server.requests) == 3
    assert asked_from(server)[2] is None


def shifted(send_header):
    def send(self, key, value):
        send_header(self, key, value.replace("bytes ", "bytes 1") if key == "Content-Range" else value)

    return send


def test_compressed_on_the_way(server, tmp_path, monkeypatch):
    server.body = gzip.compress(BODY)
    server.headers |= {"Content-Encoding": "gzip"}
    server.cuts = iter([700_000])
    assert fetch(f"{server.url}/w.pth", tmp_path).read_bytes() == BODY
    assert asked_from(server) == [None, None]
    assert server.requests[0]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("name", [f"w.pth#sha256={SHA}", f"w.pth#sha256={SHA.upper()}", f"w-{SHA[:8]}.pth.tar"])
def test_right_checksums(name, server, tmp_path):
    for _ in range(2):  # downloaded, and from the cache
        assert fetch(f"{server.url}/{name}", tmp_path).read_bytes() == BODY
    assert len(server.requests) == 1


@pytest.mark.parametrize("name", ["w-20210305.pth", "w-abcdefg.pth", "w_0123abcd.pth", "w-0123abc.pth"])
def test_names_without_a_checksum(name, server, tmp_path):
    assert fetch(f"{server.url}/{name}", tmp_path).read_bytes() == BODY


@pytest.mark.parametrize(
    "name", [f"w.pth#sha256={SHA[::-1]}", "w-0123abcd.pth.tar", f"w-0123abcd.pth#sha256={SHA[::-1]}"]
)
def test_wrong_checksums(name, server, tmp_path):
    digest = SHA[::-1] if "#" in name else "0123abcd"
    with pytest.raises(ValueError, match=f"{name}: expected a file with SHA-256 {digest}.*{SHA}"):
        fetch(f"{server.url}/{name}", tmp_path)
    assert [file.name for file in tmp_path.rglob("*.p*") if file.suffix != ".version"] == []
    if "#" not in name:  # the way out that the message offers
        assert fetch(f"{server.url}/{name}#sha256={SHA}", tmp_path).read_bytes() == BODY


def test_a_failed_download_replaces_nothing(server, tmp_path):
    path = fetch(f"{server.url}/w.pth", tmp_path)
    newer = f"{server.url}/w.pth#sha256={hashlib.sha256(OTHER).hexdigest()}"
    with pytest.raises(ValueError, match="SHA-256"):
        fetch(newer, tmp_path)
    server.cuts = itertools.repeat(1000)
    with pytest.raises(OSError, match="last"):
        fetch(newer, tmp_path)
    assert path.read_bytes() == BODY
    server.body, server.cuts = OTHER, iter(())
    assert fetch(newer, tmp_path) == path
    assert path.read_bytes() == OTHER


def test_servers_that_refuse(server, tmp_path):
    server.statuses = iter([404, 503, 429])
    with pytest.raises(OSError, match=rf"^{server.url}/w.pth: expected a file, got HTTP 404 Not Found$"):
        fetch(f"{server.url}/w.pth", tmp_path)
    assert len(server.requests) == 1
    assert fetch(f"{server.url}/w.pth", tmp_path).read_bytes() == BODY  # after two more
    server.statuses = itertools.repeat(503)
    with pytest.raises(OSError, match=r"HTTP 503 Service Unavailable \(attempt 4, the last\)"):
        fetch(f"{server.url}/v.pth", tmp_path)
    server.statuses, server.headers = iter(()), {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(ValueError, match="u.pth: expected a file of weights, got a web page"):
        fetch(f"{server.url}/u.pth", tmp_path)


def test_nobody_answers(server, tmp_path, capsys):
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match=rf"^{server.url}/w.pth: .*refused \(attempt 4, the last\)$"):
        fetch(f"{server.url}/w.pth", tmp_path)
    assert capsys.readouterr().err.count("refused; again") == 3


def test_too_little_space(server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=600_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"w.pth: expected space for 1.0 MB in .*, 0.6 MB are free"):
        fetch(f"{server.url}/w.pth", tmp_path)
    usage = usage._replace(free=1_000_000)
    assert fetch(f"{server.url}/w.pth", tmp_path).read_bytes() == BODY


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_the_space_runs_out(server, tmp_path, monkeypatch):
    stopped_once(server, tmp_path, monkeypatch)
    (part,) = tmp_path.rglob("*.part")
    part.unlink()
    part.symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"\] {server.url}/w.pth: no space for it in {part.parent}$"):
        fetch(f"{server.url}/w.pth", tmp_path)


def test_of_two_at_once_one_downloads(server, tmp_path):
    server.go.clear()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(fetch, f"{server.url}/w.pth", tmp_path) for _ in range(2)]
        assert server.started.wait(10)
        server.go.set()
        assert len({call.result().read_bytes() for call in calls}) == 1
    assert len(server.requests) == 1


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    server.RequestHandlerClass = Hub
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return server


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        ({"model.safetensors", "pytorch_model.bin", "other.pth"}, "model.safetensors"),
        ({"pytorch_model.bin", "other.pth"}, "pytorch_model.bin"),
        ({"config.json", "pvt.pth", "deep/down.pth"}, "pvt.pth"),
    ],
)
def test_hub_chooses(files, chosen, hub):
    hub.hub["some/pvt", "main"] = {name: name.encode() for name in files}
    path = fetch("hf://some/pvt")
    assert path.name == chosen
    assert path.read_bytes() == chosen.encode()


def test_hub_fetches_the_parts_of_an_index(hub):
    index = json.dumps({"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}).encode()
    parts = {f"model-{i}.safetensors": b"%d" % i for i in (1, 2)}
    hub.hub["some/pvt", "main"] = {"model.safetensors.index.json": index, **parts}
    path = fetch("hf://some/pvt")
    assert {name: (path.parent / name).read_bytes() for name in parts} == parts


def test_hub_file_and_revision(hub):
    hub.hub["some/pvt", "refs/pr/1"] = {"deep/down.pth": BODY}
    path = fetch("hf://some/pvt/deep/down.pth@refs/pr/1")
    assert path.read_bytes() == BODY


def test_hub_refuses(hub):
    hub.hub["some/pvt", "main"] = {"a.pth": b"", "b.pth": b"", "config.json": b"{}"}
    hub.hub["gated/pvt", "main"] = None
    expected = {
        "gated/pvt/a.pth": (PermissionError, "expected access to gated/pvt: ask for it there"),
        "some/pvt": (ValueError, "expected model.safetensors or .* repository, which has a.pth, b.pth, config.json"),
        "some/pvt/c.pth": (FileNotFoundError, "no file c.pth in some/pvt"),
        "some/pvt/a.pth@v2": (FileNotFoundError, "no revision v2 of some/pvt"),
        "no/pvt": (FileNotFoundError, "no repository no/pvt, or a private one"),
    }
    for source, (error, message) in expected.items():
        with pytest.raises(error, match=f"^hf://{source}: {message}") as caught:
            fetch(f"hf://{source}")
        assert "\n" not in str(caught.value)


def test_without_a_hub(hub, monkeypatch):
    hub.hub["some/pvt", "main"] = {"pytorch_model.bin": b"1"}
    path = fetch("hf://some/pvt")
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # before its further attempts
    assert fetch("hf://some/pvt") == fetch("hf://some/pvt/pytorch_model.bin") == path
    for source in ("hf://other/pvt", "hf://other/pvt/w.pth"):
        with pytest.raises(OSError, match=f"^{source}: .*refused"):
            fetch(source)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"hf://some/pvt: expected huggingface_hub: pip install 'vitpyramid\[hub\]'"):
        fetch("hf://some/pvt")
