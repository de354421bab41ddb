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
from typing import Any
from urllib.parse import unquote, urlsplit


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

    def __enter__(self) -> HubServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are recorded in ``HubServer.requests`` instead of printed."""

    def do_GET(self) -> None:
        self._dispatch()

    def do_HEAD(self) -> None:
        self._dispatch()

    def do_POST(self) -> None:
        self._dispatch()

    def _dispatch(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        # Split before unquoting: a revision may hold an escaped slash.
        parts = [unquote(part) for part in path.strip("/").split("/")]
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            match self.command, *parts:
                case "POST", "api", "validate-yaml":
                    self._json({"errors": [], "warnings": []})
                case "POST", "api", "repos", "create":
                    self._create(json.loads(body))
                case "GET" | "POST", "api", "models", user, name, *rest if repo := self._repo(f"{user}/{name}"):
                    self._api(repo, f"{user}/{name}", rest, body)
                case "GET" | "HEAD", user, name, "resolve", revision, *file if repo := self._repo(f"{user}/{name}"):
                    self._file(repo, revision, "/".join(file))
                case _ if not self.wfile.closed and not self._answered:
                    self._error(404, None, f"the test Hub does not implement {self.command} {path}")

    _answered = False

    def _repo(self, repo_id: str) -> Repo | None:
        if repo_id not in self.hub.repos:
            self._error(404, "RepoNotFound", f"Repository not found: {repo_id}")
        return self.hub.repos.get(repo_id)

    def _create(self, request: dict[str, Any]) -> None:
        repo_id = f"{request.get('organization') or 'user'}/{request['name']}"
        exists = repo_id in self.hub.repos
        if not exists:
            repo = self.hub.repos[repo_id] = Repo()
            repo.commit({})
        self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id}, 409 if exists else 200)
