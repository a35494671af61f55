"""A Hugging Face Hub small enough to run beside the tests: what the `huggingface_hub` library asks of one, over HTTP.

It holds repositories in memory, notes every request, and can be told to break: see :class:`Fault`.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

Files = dict[str, bytes]

# What the Hub keeps apart from Git: these files are found by a redirect, as all weights of the real one are.
LARGE = (".safetensors", ".bin", ".h5", ".msgpack")


def files_of(directory: Path, below: str = "") -> Files:
    """The files of a directory, by their path in a repository."""
    return {f"{below}{path.name}": path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


@dataclasses.dataclass
class Repository:
    """Branches, and all commits that they have had."""

    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    commits: dict[str, Files] = dataclasses.field(default_factory=dict)
    messages: list[str] = dataclasses.field(default_factory=list)
    is_private: bool = False
    is_gated: bool = False

    def commit(self, files: Files, branch: str = "main", message: str = "") -> str:
        """Let a branch, new or not, hold these files and no others."""
        sha = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        self.messages.append(message)
        return sha


@dataclasses.dataclass
class Fault:
    """How an answer goes wrong whose path ends like this."""

    path: str
    times: int = 1  # how often
    status: int = 0  # answer with this error
    message: str = "as the test wants it"
    cut_after: int = -1  # close the connection after so many bytes of the content
    reset: bool = False  # and do so the hard way
    shorter_by: int = 0  # send a complete answer of a file that lacks its end
    ignores_range: bool = False
    before: Callable[[], None] | None = None  # runs before the answer


@dataclasses.dataclass(frozen=True)
class Request:
    """One request as it came, and the status of its answer."""

    method: str
    path: str
    headers: dict[str, str]  # by lower-case names
    status: int


class HubServer(ThreadingHTTPServer):
    """A Hub on a free port of 127.0.0.1, as long as it is entered."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.store_url = self.url.replace("127.0.0.1", "localhost")  # another host, as on the real Hub
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # large files by their hash
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.readers: set[str] = set()  # tokens
        self.writers: set[str] = set()
        self.pauses: list[float] = []  # how long the library wanted to wait before it tries again
        self.is_open = True
        self.page = 1000  # entries of a listing that come at once
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop to answer: connections are refused from now on."""
        if self.is_open:
            self.is_open = False
            self.shutdown()
            self._thread.join()
            self.server_close()
            huggingface_hub.close_session()  # its connections would be answered still

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nothing to print."""

    def add(self, name: str, files: Files, branch: str = "main") -> Repository:
        """Make a repository, or a branch of one, that holds these files."""
        repository = self.repositories.setdefault(name, Repository())
        repository.commit(files, branch)
        return repository

    def fetched(self) -> list[str]:
        """Paths in the repository of the files whose content has been asked for, in alphabetical order."""
        names = {f"/lfs/{digest(content)}": path for path, content in self._contents()}
        paths = [request.path for request in self.requests if request.method == "GET"]
        found = [names.get(path) or _below_resolve(path) for path in paths]
        return sorted(name for name in found if name)

    def asked(self, method: str, ending: str) -> list[Request]:
        """The requests of a method whose paths end in a certain way."""
        return [request for request in self.requests if request.method == method and request.path.endswith(ending)]

    def contents_asked(self, name: str) -> list[Request]:
        """The requests for the content of a file, in their order."""
        paths = {f"/lfs/{digest(content)}" for path, content in self._contents() if path == name}
        return [
            request
            for request in self.requests
            if request.method == "GET" and (request.path in paths or _below_resolve(request.path) == name)
        ]

    def _contents(self) -> list[tuple[str, bytes]]:
        commits = [commit for repository in self.repositories.values() for commit in repository.commits.values()]
        return [item for commit in commits for item in commit.items() if item[0].endswith(LARGE)]


@contextmanager
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that this process takes for the only one, with an empty cache, no stored token, and no waiting."""

    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # as much as is kept when a connection breaks
    huggingface_hub.close_session()  # it has read NO_PROXY
    with HubServer() as server:
        impatient = SimpleNamespace(**{**vars(time), "sleep": server.pauses.append})
        for module in (file_download, _http):
            monkeypatch.setattr(module, "time", impatient)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
        huggingface_hub.close_session()


def digest(content: bytes) -> str:
    """The name of a large file."""
    return hashlib.sha256(content).hexdigest()


def _below_resolve(path: str) -> str:
    match = re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", path)
    return match[1] if match else ""


class _Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """The server has a log of its own."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        self.body = self._read_body()
        self.fault = self._take_fault()
        if self.fault.before is not None:
            self.fault.before()
        try:
            if self.fault.status:
                raise _Refusal(self.fault.status, "", self.fault.message)
            self._answer()
        except _Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            content = json.dumps({"error": refusal.message}).encode()
            self._send(refusal.status, content, {name: value for name, value in headers.items() if value})

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _take_fault(self) -> Fault:
        # A fault of a file's content is not one of its HEAD.
        for fault in self.server.faults:
            is_of_content = fault.cut_after >= 0 or fault.shorter_by or fault.ignores_range
            if self.route.endswith(fault.path) and fault.times and not (is_of_content and self.command == "HEAD"):
                fault.times -= 1
                return fault
        return Fault("", 0)

    def _answer(self) -> None:
        for method, pattern, answer in (
            ("GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/(.+)", self._tree),
            ("HEAD GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
            ("GET", r"/lfs/([0-9a-f]{64})", self._blob),
            ("PUT", r"/lfs/([0-9a-f]{64})", self._store),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            ("GET", r"/api/models/([^/]+/[^/]+)", self._info),
        ):
            match = re.fullmatch(pattern, self.route)
            if match and self.command in method.split():
                answer(*match.groups())
                return
        raise _Refusal(404, "", f"no such place: {self.command} {self.route}")

    # Reading

    def _info(self, name: str, revision: str = "main") -> None:
        sha, files = self._find(name, revision)
        siblings = [{"rfilename": path} for path in files]
        self._send_json({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": [], "private": False})

    def _tree(self, name: str, revision: str) -> None:
        _, files = self._find(name, revision)
        entries: list[dict[str, Any]] = []
        for folder in sorted({path.rpartition("/")[0] for path in files} - {""}):
            entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": folder})
        for path, content in files.items():
            entry = {"type": "file", "oid": _git_hash(content), "size": len(content), "path": path}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": digest(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        start = int(self.query.get("cursor", ["0"])[0])
        following = start + self.server.page
        link = f'<{self.server.url}{self.route}?recursive=True&cursor={following}>; rel="next"'
        headers = {"Link": link} if following < len(entries) else {}
        self._send_json(entries[start:following], headers)

    def _file(self, name: str, revision: str, path: str) -> None:
        sha, files = self._find(name, revision)
        if path not in files:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        content = files[path]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "ETag": f'"{_git_hash(content)}"'}
        if not path.endswith(LARGE):
            self._send(200, content, headers)
            return
        self.server.blobs[digest(content)] = content
        headers["X-Linked-ETag"], headers["X-Linked-Size"] = f'"{digest(content)}"', str(len(content))
        self._send(302, b"", {**headers, "Location": f"{self.server.store_url}/lfs/{digest(content)}"})

    def _blob(self, name: str) -> None:
        content = self.server.blobs[name]
        content = content[: len(content) - self.fault.shorter_by]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted is None or self.fault.ignores_range:
            self._send(200, content, {"ETag": f'"{name}"'})
            return
        start = int(wanted[1])
        if start >= len(content):
            raise _Refusal(416)
        covered = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206, content[start:], {"ETag": f'"{name}"', "Content-Range": covered})

    def _find(self, name: str, revision: str) -> tuple[str, Files]:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.is_private and not self._is_known()):
            raise _Refusal(401 if self._token() is None else 404, "RepoNotFound", "Repository not found")
        if repository.is_gated and not self._is_known():
            raise _Refusal(403, "GatedRepo", "Access to this model is restricted")
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise _Refusal(404, "RevisionNotFound", "Invalid rev id")
        return sha, repository.commits[sha]

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _is_known(self) -> bool:
        return self._token() in self.server.readers | self.server.writers

    # Writing

    def _may_write(self) -> None:
        if self._token() is None:
            raise _Refusal(401, "", "Invalid username or password.")
        if self._token() not in self.server.writers:
            raise _Refusal(403, "", "this token may not write")

    def _create(self) -> None:
        self._may_write()
        wish = json.loads(self.body)
        name = f"{wish['organization'] or 'me'}/{wish['name']}"
        exists = name in self.server.repositories
        if not exists:
            is_private = wish.get("private") or wish.get("visibility") == "private"
            self.server.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}).is_private = bool(is_private)
        self._send_json({"url": f"{self.server.url}/{name}", "name": name}, status=409 if exists else 200)

    def _branch(self, name: str, branch: str) -> None:
        self._may_write()
        repository = self.server.repositories[name]
        exists = branch in repository.branches
        if not exists:
            repository.branches[branch] = repository.branches["main"]
        self._send_json({}, status=409 if exists else 200)

    def _preupload(self, name: str, revision: str) -> None:
        self._may_write()
        _, files = self._find(name, revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            content = files.get(file["path"])
            oid = None if content is None else digest(content) if mode == "lfs" else _git_hash(content)
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": answers})

    def _batch(self, name: str) -> None:
        self._may_write()
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        self._send_json({"transfer": "basic", "objects": objects})

    def _store(self, name: str) -> None:
        assert digest(self.body) == name
        self.server.blobs[name] = self.body
        self._send(200, b"", {})

    def _commit(self, name: str, revision: str) -> None:
        self._may_write()
        _, files = self._find(name, revision)
        files, title, repository = dict(files), "", self.server.repositories[name]
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                title = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif files.pop(value["path"], None) is None:
                raise _Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
        is_proposal = "create_pr" in self.query
        sha = repository.commit(files, "refs/pr/1" if is_proposal else revision, title)
        answer = {"commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"}
        if is_proposal:
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/1"
        self._send_json(answer)

    # Sending

    def _send_json(self, content: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        headers_in = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append(Request(self.command, self.route, headers_in, status))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault.cut_after < 0:
            self.wfile.write(content)
            return
        self.wfile.write(content[: self.fault.cut_after])
        self.close_connection = True
        if self.fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
