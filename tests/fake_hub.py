"A small stand-in of the Hugging Face Hub for tests: it gives a repository, or answers badly in every way."

import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE = b"<!DOCTYPE html><html><body>Please log in to the hospital network</body></html>"


def _json(body):
    return 200, json.dumps(body).encode(), {"Content-Type": "application/json"}


BAD = {  # how the server answers -> status, body, headers
    "html": (200, PAGE, {"Content-Type": "text/html; charset=utf-8"}),
    "html called json": (200, PAGE, {"Content-Type": "application/json"}),
    "json dict": _json({"message": "hello"}),
    "json list": _json([1, 2, 3]),
    "json number": _json(7),
    "json null": _json(None),
    "json string": _json("ok"),
    "json sha of another form": _json({"id": "me/mini", "sha": "main", "siblings": []}),
    "empty": (200, b"", {"Content-Type": "application/json"}),
    "binary": (200, b"\xff\xfe\x00\x80" * 9, {"Content-Type": "application/octet-stream"}),
    "loop": (302, b"", {"Location": "/again"}),
    "401": (401, b"{}", {}),
    "403": (403, b"{}", {}),
    "404": (404, b"{}", {}),
    "407": (407, b"", {}),
    "410": (410, b"", {}),
    "429": (429, b"", {}),
    "429 for an hour": (429, b"", {"Retry-After": "3600"}),
    "500": (500, PAGE, {"Content-Type": "text/html"}),
    "502": (502, PAGE, {"Content-Type": "text/html"}),
    "503": (503, b"", {"Retry-After": "120"}),
    "cut": (200, b'{"id": "me', {"Content-Type": "application/json", "Content-Length": "900"}),
}
SPECIAL = ("silent", "drip", "hang up")  # no answer, one letter at a time, a closed line
STALLED = ("half", "nothing more")  # of a file half comes, or its headers; then silence


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def give(self, status, body, headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = True

    def badly(self, how):
        if how in STALLED:
            self.stall(how)
        elif how == "silent":
            self.server.stop.wait(60)
        elif how == "drip":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "5000")
            self.end_headers()
            while not self.server.stop.wait(0.05):
                self.wfile.write(b" ")
        elif how != "hang up":
            self.give(*BAD[how])
        self.close_connection = True

    def answer(self):
        server = self.server
        length = int(self.headers.get("Content-Length") or 0)
        if length:
            self.rfile.read(length)
        server.seen.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        try:
            if server.how and server.when in path:
                return self.badly(server.how)
            self.give(*self.well(path))
        except OSError:
            pass  # the client has gone

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def well(self, path):
        files = self.server.files
        if path.startswith("/api/"):
            if "/tree/" in path:
                return _json(_listing(files, path, "recursive=false" in self.path))
            if "/paths-info/" in path:
                return _json([])
            if "/revision/" in path or path.count("/") == 4:
                names = [{"rfilename": name} for name in files]
                facts = {"id": "me/mini", "sha": COMMIT, "siblings": names, "private": False}
                return _json(facts | {"tags": [], "downloads": 0, "likes": 0})
            return 404, b"{}", {}
        name = path.partition(f"/resolve/{COMMIT}/")[2] or path.partition("/resolve/main/")[2]
        if name not in files:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        data = files[name]
        about = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start and self.server.resumes:
            first = int(start[1])
            about["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return 206, data[first:], about
        return 200, self.server.damage(data), about

    def stall(self, how):
        "The headers of a file and half of it, or nothing more; then silence."
        path = self.path.split("?")[0]
        status, body, headers = self.well(path)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if how == "half" else b"")
            self.wfile.flush()
            self.server.stop.wait(60)
        self.close_connection = True


def _listing(files, path, flat):
    "The files below a path, or, if flat, its own files and folders."
    folder = path.partition("/tree/")[2].partition("/")[2]
    start = folder + "/" if folder else ""
    below = {name: data for name, data in files.items() if name.startswith(start)}
    if not flat:
        return [_entry(name, data) for name, data in below.items()]
    there = {start + name.removeprefix(start).split("/")[0] for name in below}
    made = {"type": "directory", "oid": "0" * 40, "size": 0}
    return [_entry(n, below[n]) if n in below else made | {"path": n} for n in sorted(there)]


def _entry(name, data):
    digest = hashlib.sha256(data).hexdigest()
    facts = {"type": "file", "path": name, "size": len(data), "oid": digest[:40]}
    if name.endswith(".safetensors"):
        facts["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
    return facts


@contextmanager
def fake_hub(folder=None, how="", when=""):
    "A server of the files of `folder`; with `how` it answers so wherever `when` is in the path."
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.files = {}
    if folder:
        root = Path(folder)
        paths = [p for p in sorted(root.rglob("*")) if p.is_file()]
        server.files = {p.relative_to(root).as_posix(): p.read_bytes() for p in paths}
    server.how, server.when, server.seen = how, when, []
    server.damage = lambda data: data
    server.resumes = False  # whether a download can go on in the middle of a file
    server.stop = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()


@contextmanager
def soon(seconds):
    "What stands here ends within so many seconds."
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds
