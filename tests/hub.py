"""A small Hub on loopback, with the requests that huggingface_hub makes to upload and to download a model.

`Client` runs functions in another process, which has the Hub's address from its start: huggingface_hub reads
HF_ENDPOINT when it is imported.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit


TOKENS = {"hf_write": "me", "hf_read": "reader"}
LFS = (".safetensors", "tokenizer.json")  # files that go through LFS, as the real Hub decides


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        repos: {id: its commits, oldest first, each {path: content}}.
        private: ids of those that only the owner of a token may read.
        objects: {sha256: content}, uploaded by LFS.
        requests: "METHOD path", in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo_id: str) -> dict[str, bytes]:
        return self.repos[repo_id][-1]


class Client:
    """Calls module-level functions of importable modules in a process of its own, with a token that may write."""

    def __init__(self, hub: Hub, home: Any):
        found = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_write", "HF_HOME": str(home)}
        self._environment = os.environ | found | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        self._pool = ProcessPoolExecutor(1, get_context("spawn"))

    def __call__(self, function: Callable, *arguments: Any) -> Any:
        with mock.patch.dict(os.environ, self._environment):  # the process starts with the first call
            return self._pool.submit(function, *arguments).result(timeout=120)

    def close(self) -> None:
        self._pool.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, **headers: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code, **headers)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.server.requests.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        user = TOKENS.get(token)
        if token and user is None:
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if self.command in ("POST", "PUT") and user is None and not path.startswith("/lfs/"):
            return self.answer(401, {"error": "Invalid username or password."})
        for pattern, method in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and user is None and self.server.private.intersection(match.groups()):
                return self.refuse(401, "RepoNotFound")
            if match:
                return getattr(self, method)(body, user, *match.groups())
        return self.refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def whoami(self, body: bytes, user: str | None) -> None:
        if user is None:
            return self.answer(401, {"error": "Unauthorized"})
        return self.answer(200, {"name": user, "type": "user", "auth": {}})

    def validate(self, body: bytes, user: str) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def create(self, body: bytes, user: str) -> None:
        content = json.loads(body)
        owner = content.get("organization") or user
        name = f"{owner}/{content['name']}"
        exists = name in self.server.repos
        if owner != user or user != "me":
            return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        self.server.repos.setdefault(name, [{".gitattributes": b"*.safetensors filter=lfs\n"}])
        return self.answer(409 if exists else 200, {"url": f"{self.server.endpoint}/{name}", "id": name})

    def preupload(self, body: bytes, user: str, repo: str, revision: str) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer(200, {"files": modes})

    def batch(self, body: bytes, user: str, repo: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            action = {"href": f"{self.server.endpoint}/lfs/{wanted['oid']}"}
            new = {"actions": {"upload": action}} if wanted["oid"] not in self.server.objects else {}
            objects.append(wanted | new)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, user: str | None, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "another content"})
        self.server.objects[oid] = body
        return self.answer(200, {})

    def commit(self, body: bytes, user: str, repo: str, revision: str) -> None:
        files = dict(self.server.files(repo))
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        self.server.repos[repo].append(files)
        oid = _commit_id(repo, len(self.server.repos[repo]))
        self.answer(200, {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{oid}", "commitOid": oid})

    def info(self, body: bytes, user: str | None, repo: str, revision: str = "main") -> Any:
        found = self._at(repo, revision)
        if found is None:
            return self.refuse(404, "RepoNotFound")
        files, oid = found
        siblings = [{"rfilename": name} for name in files]
        return self.answer(200, {"id": repo, "sha": oid, "siblings": siblings, "tags": [], "private": False})

    def tree(self, body: bytes, user: str | None, repo: str, revision: str, folder: str | None = None) -> Any:
        found = self._at(repo, revision)
        if found is None:
            return self.refuse(404, "RepoNotFound")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        inside = [name for name in found[0] if not folder or name.startswith(f"{folder}/")]
        if folder and not inside:
            return self.refuse(404, "EntryNotFound")
        entries = [
            {"type": "file", "path": name, "size": len(found[0][name]), "oid": _etag(found[0][name])}
            for name in inside
            if recursive or "/" not in name[len(folder or "") + 1 :]
        ]
        return self.answer(200, entries)

    def resolve(self, body: bytes, user: str | None, repo: str, revision: str, name: str) -> Any:
        found = self._at(repo, revision)
        if found is None:
            return self.refuse(404, "RepoNotFound")
        files, oid = found
        if name not in files:
            return self.refuse(404, "EntryNotFound", X_Repo_Commit=oid)
        return self.answer(200, files[name], X_Repo_Commit=oid, ETag=f'"{_etag(files[name])}"')

    def _at(self, repo: str, revision: str) -> tuple[dict[str, bytes], str] | None:
        """Files and id of a commit."""
        commits = self.server.repos.get(repo, [])
        ids = [_commit_id(repo, number) for number in range(1, len(commits) + 1)]
        if not commits or (revision != "main" and revision not in ids):
            return None
        number = len(ids) - 1 if revision == "main" else ids.index(revision)
        return commits[number], ids[number]


def _commit_id(repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


_REPO = "([^/]+/[^/]+)"
_ROUTES = [
    ("/api/whoami-v2", "whoami"),
    ("/api/validate-yaml", "validate"),
    ("/api/repos/create", "create"),
    (f"/api/models/{_REPO}/preupload/([^/]+)", "preupload"),
    (f"/api/models/{_REPO}/commit/([^/]+)", "commit"),
    (f"/api/models/{_REPO}/revision/([^/]+)", "info"),
    (f"/api/models/{_REPO}/tree/([^/]+)(?:/(.+))?", "tree"),
    (f"/api/models/{_REPO}", "info"),
    (f"/{_REPO}\\.git/info/lfs/objects/batch", "batch"),
    ("/lfs/([0-9a-f]{64})", "store"),
    (f"/{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
]
