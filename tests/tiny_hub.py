"""As much of a Hugging Face hub as pushing and fetching one repository takes, so that its own client can be run."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse


class TinyHub(ThreadingHTTPServer):
    """Files by repository; every commit is one of all files.

    Attributes:
        repos: Files by name, by repository.
        asked: Every request's method and path.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo: str) -> str:
        files = sorted((n, hashlib.sha1(d).hexdigest()) for n, d in self.repos[repo].items())
        return hashlib.sha1(json.dumps(files).encode()).hexdigest()


@contextmanager
def tiny_hub() -> Iterator[TinyHub]:
    """A hub on a port of this machine."""
    server = TinyHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: TinyHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        parts = self._parts()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        if parts[:3] == ["api", "repos", "create"]:
            said = json.loads(body)
            repo = f"{said.get('organization') or 'somebody'}/{said['name']}"
            self.server.repos.setdefault(repo, {})
            return self._json({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})
        if parts[:2] == ["api", "validate-yaml"]:
            return self._json({"warnings": [], "errors": []})
        repo = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        oid = self.server.commit(repo)
        return self._json({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def do_GET(self) -> None:
        parts = self._parts()
        if parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            if repo not in self.server.repos:
                return self._missing("RepoNotFound")
            files = self.server.repos[repo]
            if parts[4:5] == ["tree"]:
                return self._json([{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in files.items()])
            siblings = [{"rfilename": n} for n in files]
            return self._json({"id": repo, "modelId": repo, "sha": self.server.commit(repo), "siblings": siblings,
                               "private": False, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip
        repo, name = "/".join(parts[:2]), "/".join(parts[4:])
        data = self.server.repos.get(repo, {}).get(name)
        if data is None:
            return self._missing("EntryNotFound")
        return self._send(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": parts[3]})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _parts(self) -> list[str]:
        self.server.asked.append(f"{self.command} {self.path}")
        return [unquote(p) for p in urlparse(self.path).path.strip("/").split("/")]

    def _chunks(self) -> bytes:
        out = b""
        while size := int(self.rfile.readline(), 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, why: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": why, "X-Error-Message": why})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
