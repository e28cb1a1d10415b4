"""A small Hub on the loopback interface: model repos in memory, over real HTTP.

It speaks what `huggingface_hub` needs to create a repo, push to it and load from it: create,
validate-yaml, preupload, LFS batch/upload/verify, commit, branch, resolve, info, refs and tree.

- A repo starts with one commit (`.gitattributes`), as on the real Hub; a commit is whole or absent.
- `WRITER` may write under `USER`; `READER` is a valid token of somebody else; anybody reads public
  repos.
- `hub.log` lists the requests; `hub.fault` makes some of them fail.

The client must be told by HF_ENDPOINT, and to leave xet (HF_HUB_DISABLE_XET=1), before
`huggingface_hub` is imported: see the fixture `hub_process`.
"""

import base64
import copy
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

USER, WRITER, READER = "tester", "hf_writer", "hf_reader"
TOKENS = {WRITER: USER, READER: "somebody"}
LARGE_FILES = re.compile(r".*\.(safetensors|bin|pt|pth|model)")
MODEL_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
FRONT_MATTER = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)


class HubError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "", **more: str):
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


@dataclass(frozen=True)
class File:
    """One file of a revision."""

    data: bytes
    large: bool  # kept by LFS

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def oid(self) -> str:
        return sha256(self.data) if self.large else self.git_oid


@dataclass
class Commit:
    """A revision: all its files, and how it came about."""

    sha: str
    message: str
    files: dict[str, File]


@dataclass
class Repo:
    """A model repo: its commits by branch, newest last."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def find(self, revision: str) -> Commit:
        """The commit that a branch or a hash names."""
        if revision in self.branches:
            return self.branches[revision][-1]
        for commit in (commit for commits in self.branches.values() for commit in commits):
            if commit.sha == revision:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add(self, branch: str, message: str, files: dict[str, File]) -> Commit:
        """A new commit on a branch."""
        commits = self.branches.setdefault(branch, [])
        seed = f"{branch}{len(commits)}{message}" + "".join(f"{p}{files[p].oid}" for p in files)
        commits.append(Commit(hashlib.sha1(seed.encode()).hexdigest(), message, files))
        return commits[-1]


@dataclass
class Fault:
    """Requests that fail: `times` of them, from the `first` on (0 is the next one).

    Attributes:
        how: a status; `drop` closes the connection without doing or answering anything; `lose` does
            what is asked and then closes it.
    """

    first: int
    how: int | str
    times: float = 1


@dataclass
class Request:
    """One request: what, with which body, by whom, and the status it got (0: no answer)."""

    method: str
    path: str
    body: bytes
    user: str | None
    status: int = 0

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    """A body (JSON unless it is bytes) with headers."""

    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """The server; `with HubServer() as hub:` runs it in a thread at `hub.url`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[Request] = []
        self.fault: Fault | None = None
        self.lock = threading.RLock()
        handler = type("HubHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def reset(self, state: Any = None) -> None:
        """Go back to a `state()`, by default to an empty Hub; forget log and fault."""
        with self.lock:
            self.repos, self.blobs = copy.deepcopy(state or ({}, {}))
            self.log, self.fault = [], None

    def state(self) -> Any:
        """All that the Hub holds, for `reset`."""
        with self.lock:
            return copy.deepcopy((self.repos, self.blobs))

    def fail(self, first: int, how: int | str, times: float = 1) -> None:
        """Forget the log, and let requests fail from now on; see `Fault`."""
        self.log, self.fault = [], Fault(first, how, times)

    def commits(self, repo_id: str, branch: str = "main") -> list[Commit]:
        """The commits of a branch, oldest first; the first is the repo's creation."""
        return [*self.repos[repo_id].branches[branch]]

    def files(self, repo_id: str, revision: str = "main") -> set[str]:
        """The names of a revision's files."""
        return self.repos[repo_id].find(revision).files.keys() - {".gitattributes"}

    def requests(self, pattern: str = "") -> list[str]:
        """`METHOD path` of the requests in the log that match."""
        lines = [f"{request.method} {request.path}" for request in self.log]
        return [line for line in lines if re.search(pattern, line)]

    # What each request does

    def create(self, request: Request) -> Answer:
        body = request.json()
        repo_id = f"{body.get('organization') or request.user}/{body['name']}"
        may_write(request, repo_id)
        if repo_id in self.repos:
            url = f"{self.url}/{repo_id}"
            raise HubError(409, f"You already created this model repo: {repo_id}", url=url)
        self.repos[repo_id] = Repo(body.get("visibility") == "private")
        attributes = File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)
        self.repos[repo_id].add("main", "initial commit", {".gitattributes": attributes})
        return Answer({"url": f"{self.url}/{repo_id}", "name": repo_id})

    def validate_yaml(self, request: Request) -> Answer:
        match = FRONT_MATTER.match(request.json()["content"])
        try:
            data = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            return Answer({"status": 400, "errors": [{"message": str(error)}], "warnings": []})
        errors = [
            {"message": f'"{key}" must be a string'}
            for key in ("library_name", "pipeline_tag")
            if not isinstance(data.get(key, ""), str)
        ]
        bases = data.get("base_model", [])
        errors += [
            {
                "message": f'"base_model" with value "{base}" is not valid. '
                "Use a model id from https://hf.co/models."
            }
            for base in (bases if isinstance(bases, list) else [bases])
            if not MODEL_ID.fullmatch(str(base))
        ]
        return Answer({"status": 400 if errors else 200, "errors": errors, "warnings": []})

    def preupload(self, request: Request, repo_id: str, revision: str) -> Answer:
        files = self.writable(request, repo_id).find(revision).files
        answer = []
        for entry in request.json()["files"]:
            path = entry["path"]
            mode = "lfs" if LARGE_FILES.fullmatch(path) else "regular"
            oid = files[path].oid if path in files else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer({"files": answer})

    def lfs_batch(self, request: Request, repo_id: str) -> Answer:
        self.writable(request, repo_id)
        objects = []
        for entry in request.json()["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.blobs:
                href = f"{self.url}/lfs/{entry['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        return Answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, request: Request, oid: str) -> Answer:
        if sha256(request.body) != oid:
            raise HubError(400, "the content does not have this hash")
        self.blobs[oid] = request.body
        return Answer({})

    def lfs_verify(self, request: Request, oid: str) -> Answer:
        if len(self.blobs.get(oid, b"")) != request.json()["size"]:
            raise HubError(404, "no such object")
        return Answer({})

    def commit(self, request: Request, repo_id: str, revision: str) -> Answer:
        repo = self.writable(request, repo_id)
        if revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        lines = [json.loads(line) for line in request.body.splitlines()]
        header, changes = lines[0]["value"], lines[1:]
        parent = header.get("parentCommit")
        if parent and parent != repo.find(revision).sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.find(revision).files)
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif change["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise HubError(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = File(self.blobs[value["oid"]], True)
            elif files.pop(value["path"], None) is None:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        commit = repo.add(revision, header["summary"], files)
        url = f"{self.url}/{repo_id}/commit/{commit.sha}"
        return Answer({"success": True, "commitOid": commit.sha, "commitUrl": url})

    def branch(self, request: Request, repo_id: str, branch: str) -> Answer:
        repo = self.writable(request, repo_id)
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        start = repo.find(request.json().get("startingPoint", "main"))
        repo.branches[branch] = [start]
        return Answer({})

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        commit = self.readable(request, repo_id).find(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.oid}"'}
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
        return Answer(file.data, headers)

    def info(self, request: Request, repo_id: str, revision: str = "main") -> Answer:
        repo = self.readable(request, repo_id)
        commit = repo.find(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        about = {"id": repo_id, "modelId": repo_id, "sha": commit.sha, "private": repo.private}
        return Answer(about | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def refs(self, request: Request, repo_id: str) -> Answer:
        branches = self.readable(request, repo_id).branches
        entries = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].sha}
            for name, commits in branches.items()
        ]
        return Answer({"branches": entries, "tags": [], "converts": []})

    def tree(self, request: Request, repo_id: str, revision: str, folder: str = "") -> Answer:
        entries = []
        for path, file in sorted(self.readable(request, repo_id).find(revision).files.items()):
            if not path.startswith(f"{folder}/" if folder else ""):
                continue
            entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.git_oid}
            if file.large:
                entry["lfs"] = {"oid": file.oid, "size": len(file.data), "pointerSize": 130}
            entries.append(entry)
        return Answer(entries)

    # Who may do what

    def readable(self, request: Request, repo_id: str) -> Repo:
        """The repo, if the reader may know of it."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and request.user != repo_id.partition("/")[0]):
            status = 401 if request.user is None else 404
            raise HubError(status, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, request: Request, repo_id: str) -> Repo:
        """The repo, if the writer may write to it."""
        repo = self.readable(request, repo_id)
        may_write(request, repo_id)
        return repo


def may_write(request: Request, repo_id: str) -> None:
    """401 without a valid token, 403 for somebody else's namespace."""
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    if request.user != repo_id.partition("/")[0]:
        raise HubError(403, f"You don't have the rights to write to {repo_id}")


def sha256(data: bytes) -> str:
    """The hash that LFS knows a file by."""
    return hashlib.sha256(data).hexdigest()


REPO, REVISION = r"([\w.-]+/[\w.-]+?)", r"(refs/pr/\d+|[^/]+)"
ROUTES: list[tuple[str, Callable[..., Answer]]] = [
    (r"POST /api/repos/create", HubServer.create),
    (r"POST /api/validate-yaml", HubServer.validate_yaml),
    (rf"POST /api/models/{REPO}/preupload/{REVISION}", HubServer.preupload),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    (r"PUT /lfs/(\w+)", HubServer.lfs_upload),
    (r"POST /lfs/(\w+)/verify", HubServer.lfs_verify),
    (rf"POST /api/models/{REPO}/commit/{REVISION}", HubServer.commit),
    (rf"POST /api/models/{REPO}/branch/{REVISION}", HubServer.branch),
    (rf"(?:GET|HEAD) /{REPO}/resolve/{REVISION}/(.+)", HubServer.resolve),
    (rf"GET /api/models/{REPO}/revision/{REVISION}", HubServer.info),
    (rf"GET /api/models/{REPO}/refs", HubServer.refs),
    (rf"GET /api/models/{REPO}/tree/{REVISION}/(.+)", HubServer.tree),
    (rf"GET /api/models/{REPO}/tree/{REVISION}", HubServer.tree),
    (rf"GET /api/models/{REPO}", HubServer.info),
]


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the Hub answer it or the fault befall it."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        user = TOKENS.get(token) if scheme == "Bearer" else None
        request = Request(self.command, path, self.read_body(), user)
        if path == "/api/agent-harnesses":  # asked once by a client that an AI agent runs
            return self.reply(404, failure("Not found"))
        with self.hub.lock:
            fault, number = self.hub.fault, len(self.hub.log)
            self.hub.log.append(request)
            how = fault.how if fault and 0 <= number - fault.first < fault.times else None
            if how == "drop":
                return self.hang_up()
            if isinstance(how, int):
                status, answer = how, failure("out of order")
            else:
                status, answer = self.dispatch(request)
            if how == "lose":
                return self.hang_up()
            request.status = status
        self.reply(status, answer)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def dispatch(self, request: Request) -> tuple[int, Answer]:
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, f"{request.method} {request.path}")
            if match is None:
                continue
            try:
                answer = method(self.hub, request, *match.groups())
            except HubError as error:
                return error.status, failure(str(error), error.code, **error.more)
            status = answer.body.get("status", 200) if isinstance(answer.body, dict) else 200
            return status, answer
        return 404, failure("Not found")

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, status: int, answer: Answer) -> None:
        raw = isinstance(answer.body, bytes)
        body = answer.body if raw else json.dumps(answer.body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/octet-stream" if raw else "application/json")
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr: `hub.log` has it."""


def failure(message: str, code: str = "", **more: str) -> Answer:
    """The answer to a request that failed, as the Hub words it."""
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer({"error": message} | more, headers)
