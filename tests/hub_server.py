"""A loopback Hugging Face Hub: enough of the HTTP protocol to push model repositories and load them again, in memory.

    with HubServer() as hub:
        subprocess.run([...], env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": cache, "HF_TOKEN": "dummy"})

huggingface_hub reads these variables when it is imported, hence the subprocess; ``HfApi(endpoint=hub.url, token="dummy")``
works in process. Only model repositories, the branch ``main`` and regular (not LFS or Xet) uploads are supported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from typing_extensions import Self


def blob_id(content: bytes) -> str:
    """The git object id of a file, which the Hub uses as the ETag of regular files."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """One repository: ``commits`` maps a sha to the files (path to content) at that commit, oldest first."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        listing = json.dumps([len(self.commits), {path: blob_id(content) for path, content in files.items()}])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def resolve(self, revision: str) -> str | None:
        """The sha of ``main`` (the latest commit) or of a known sha; None for any other revision."""
        return list(self.commits)[-1] if revision == "main" else revision if revision in self.commits else None


class HubServer:
    """Context manager that serves an empty Hub on a free port of 127.0.0.1.

    Attributes:
        url: The endpoint, for ``HF_ENDPOINT``; known once the context is entered.
        repos: Repositories by id (``user/name``).
        requests: Every request so far, as ``"METHOD /path"``.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _HubError(Exception):
    """An error response: HTTP status, value of the ``X-Error-Code`` header, message."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are recorded in ``HubServer.requests`` instead of printed."""

    def _dispatch(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        # Split before unquoting: a revision may hold an escaped slash.
        parts = [unquote(part) for part in path.strip("/").split("/")]
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            try:
                self._route(parts, body)
            except _HubError as error:
                status, code, message = error.args
                headers = {"X-Error-Code": code, "X-Error-Message": message}
                self._send(status, json.dumps({"error": message}).encode(), headers)

    do_GET = do_HEAD = do_POST = _dispatch  # noqa: N815 (names of http.server)

    def _route(self, parts: list[str], body: bytes) -> None:
        match [self.command, *parts]:
            case ["POST", "api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["POST", "api", "repos", "create"]:
                self._create(json.loads(body))
            case ["POST", "api", "models", user, name, "preupload", "main"]:
                self._repo(user, name)
                files = [file["path"] for file in json.loads(body)["files"]]
                self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
            case ["POST", "api", "models", user, name, "commit", "main"]:
                sha = self._repo(user, name).commit(self._apply(user, name, body))
                self._json({"commitUrl": f"{self.hub.url}/{user}/{name}/commit/{sha}", "commitOid": sha})
            case ["GET", "api", "models", user, name] | ["GET", "api", "models", user, name, "revision", _]:
                sha, files = self._files(user, name, parts[-1] if len(parts) == 6 else "main")
                siblings = [{"rfilename": path} for path in files]
                self._json({"id": f"{user}/{name}", "sha": sha, "private": False, "tags": [], "siblings": siblings})
            case ["GET", "api", "models", user, name, "tree", revision]:  # always answered as if recursive=True
                files = self._files(user, name, revision)[1]
                self._json([{"type": "file", "path": p, "size": len(c), "oid": blob_id(c)} for p, c in files.items()])
            case ["GET" | "HEAD", user, name, "resolve", revision, *path]:
                sha, files = self._files(user, name, revision)
                if (content := files.get("/".join(path))) is None:
                    raise _HubError(404, "EntryNotFound", f"{'/'.join(path)} does not exist in {user}/{name}")
                self._send(200, content, {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": sha})
            case _:
                raise _HubError(404, "NotImplemented", f"The test Hub does not answer {self.command} {self.path}")

    def _repo(self, user: str, name: str) -> Repo:
        if (repo := self.hub.repos.get(f"{user}/{name}")) is None:
            raise _HubError(404, "RepoNotFound", f"Repository {user}/{name} not found")
        return repo

    def _files(self, user: str, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(user, name)
        if (sha := repo.resolve(revision)) is None:
            raise _HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    def _create(self, request: dict[str, Any]) -> None:
        if request.get("type") not in (None, "model"):
            raise _HubError(400, "NotImplemented", f"The test Hub only has model repositories, got {request['type']!r}")
        repo_id = f"{request.get('organization') or 'user'}/{request['name']}"
        exists = repo_id in self.hub.repos
        if not exists:
            self.hub.repos[repo_id] = Repo()
            self.hub.repos[repo_id].commit({})
        self._json({"url": f"{self.hub.url}/{repo_id}"}, status=409 if exists else 200)

    def _apply(self, user: str, name: str, body: bytes) -> dict[str, bytes]:
        """The files of ``main`` after the operations of a commit, one JSON object per line."""
        files = dict(self._files(user, name, "main")[1])
        for line in body.splitlines():
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind in ("deletedFile", "deletedFolder"):
                folder = value["path"].rstrip("/") + "/"
                files = {p: c for p, c in files.items() if p != value["path"] and not p.startswith(folder)}
            elif kind != "header":
                raise _HubError(400, "NotImplemented", f"The test Hub does not support the commit operation {kind!r}")
        return files

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
