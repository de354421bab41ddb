"""A loopback Hugging Face Hub: enough of the HTTP protocol to push model repositories and load them again, in memory.

    with HubServer() as hub:
        subprocess.run([...], env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": cache, "HF_TOKEN": "dummy"})

huggingface_hub reads these variables when it is imported, hence the subprocess; ``HfApi(endpoint=hub.url, token="dummy")``
works in process. Only model repositories are supported, and of the protocols for large files LFS (``HF_HUB_DISABLE_XET=1``).
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
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
    """One repository.

    Attributes:
        commits: a sha -> the files (path to content) at that commit, oldest first.
        refs: branch or ``refs/pr/N`` -> sha.
        private: as it was asked for.
        gated: nobody may see it.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        listing = json.dumps([len(self.commits), {path: blob_id(content) for path, content in files.items()}])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The sha of a branch or of a known sha; None for any other revision."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class HubServer:
    """Context manager that serves an empty Hub on a free port of 127.0.0.1.

    Attributes:
        url: The endpoint, for ``HF_ENDPOINT``; known once the context is entered.
        repos: Repositories by id (``user/name``).
        requests: Every request so far, as ``"METHOD /path"``.
        objects: Large files by SHA-256, whether a commit holds them or not.
        large: Files of this many bytes are large.
        rights: Token -> ``"read"`` or ``"write"``; None to take every token for one that may write.
        cut_after: Bytes of an upload after which the connection breaks.
        fail: (beginning of a request, HTTP status) of a request that fails.
    """

    def __init__(self, large: int = 1 << 30) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.large = large
        self.rights: dict[str, str] | None = None
        self.cut_after: int | None = None
        self.fail: tuple[str, int] | None = None
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
        length = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT" and self.hub.cut_after is not None and length > self.hub.cut_after:
            self.rfile.read(self.hub.cut_after)
            self.hub.requests.append(f"CUT {path}")
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self.rfile.read(length)
        # Split before unquoting: a revision may hold an escaped slash.
        parts = [unquote(part) for part in path.strip("/").split("/")]
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            try:
                self._check_rights(path)
                self._route(parts, body)
            except _HubError as error:
                status, code, message = error.args
                headers = {"X-Error-Code": code, "X-Error-Message": message}
                self._send(status, json.dumps({"error": message}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch  # noqa: N815 (names of http.server)

    def _check_rights(self, path: str) -> None:
        hub = self.hub
        if hub.fail is not None and f"{self.command} {path}".startswith(hub.fail[0]):
            raise _HubError(hub.fail[1], "", "the test says so")
        if hub.rights is None or self.command == "PUT":  # large files go to an address that needs no token
            return
        right = hub.rights.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if right is None:
            raise _HubError(401, "", "Invalid username or password.")
        if right == "read" and self.command == "POST" and "validate-yaml" not in path:
            raise _HubError(403, "", "this token may only read")

    def _route(self, parts: list[str], body: bytes) -> None:
        match [self.command, *parts]:
            case ["POST", "api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["POST", "api", "repos", "create"]:
                self._create(json.loads(body))
            case ["POST", "api", "models", user, name, "branch", branch]:
                repo = self._repo(user, name)
                repo.refs[branch] = repo.refs["main"]
                self._json({})
            case ["POST", "api", "models", user, name, "preupload", revision]:
                self._files(user, name, revision)
                modes = [
                    (f["path"], "lfs" if f["size"] >= self.hub.large else "regular") for f in json.loads(body)["files"]
                ]
                self._json({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]})
            case ["POST", _, _, "info", "lfs", "objects", "batch"]:
                self._json({"transfer": "basic", "objects": [self._large(o) for o in json.loads(body)["objects"]]})
            case ["PUT", "objects", digest]:
                if hashlib.sha256(body).hexdigest() != digest:
                    raise _HubError(400, "", "not the content that was promised")
                self.hub.objects[digest] = body
                self._json({})
            case ["POST", "api", "models", user, name, "commit", revision]:
                self._commit(user, name, revision, body)
            case ["GET", "api", "models", user, name] | ["GET", "api", "models", user, name, "revision", _]:
                sha, files = self._files(user, name, parts[-1] if len(parts) == 6 else "main")
                siblings = [{"rfilename": path} for path in files]
                private = self._repo(user, name).private
                self._json({"id": f"{user}/{name}", "sha": sha, "private": private, "tags": [], "siblings": siblings})
            case ["GET", "api", "models", user, name, "tree", revision]:  # always answered as if recursive=True
                self._json([self._entry(p, c) for p, c in self._files(user, name, revision)[1].items()])
            case ["GET" | "HEAD", user, name, "resolve", revision, *path]:
                sha, files = self._files(user, name, revision)
                if (content := files.get("/".join(path))) is None:
                    raise _HubError(404, "EntryNotFound", f"{'/'.join(path)} does not exist in {user}/{name}")
                self._send(200, content, {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": sha})
            case _:
                raise _HubError(404, "NotImplemented", f"The test Hub does not answer {self.command} {self.path}")

    def _large(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Where a large file goes; nowhere if it is there."""
        if asked["oid"] in self.hub.objects:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{self.hub.url}/objects/{asked['oid']}"}}}

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        digest = hashlib.sha256(content).hexdigest()
        large = {"lfs": {"oid": digest, "size": len(content), "pointerSize": 130}}
        return entry | (large if digest in self.hub.objects else {})

    def _commit(self, user: str, name: str, revision: str, body: bytes) -> None:
        repo, (parent, _) = self._repo(user, name), self._files(user, name, revision)
        expected = json.loads(body.splitlines()[0])["value"].get("parentCommit")
        if expected not in (None, parent):
            raise _HubError(412, "", "A commit has happened since. Please refresh and try again.")
        answer: dict[str, Any] = {}
        if "create_pr=1" in urlsplit(self.path).query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            answer["pullRequestUrl"] = f"{self.hub.url}/{user}/{name}/discussions/{number}"
            revision, files = f"refs/pr/{number}", self._apply(user, name, revision, body)
        else:
            files = self._apply(user, name, revision, body)
        sha = repo.commit(files, revision)
        self._json({**answer, "commitUrl": f"{self.hub.url}/{user}/{name}/commit/{sha}", "commitOid": sha})

    def _repo(self, user: str, name: str) -> Repo:
        if (repo := self.hub.repos.get(f"{user}/{name}")) is None:
            raise _HubError(404, "RepoNotFound", f"Repository {user}/{name} not found")
        if repo.gated:
            raise _HubError(403, "GatedRepo", f"Access to model {user}/{name} is restricted")
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
            self.hub.repos[repo_id] = Repo(
                private=request.get("visibility") == "private" or bool(request.get("private"))
            )
            self.hub.repos[repo_id].commit({})
        self._json({"url": f"{self.hub.url}/{repo_id}"}, status=409 if exists else 200)

    def _apply(self, user: str, name: str, revision: str, body: bytes) -> dict[str, bytes]:
        """The files of ``revision`` after the operations of a commit, one JSON object per line."""
        files = dict(self._files(user, name, revision)[1])
        for line in body.splitlines():
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
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
