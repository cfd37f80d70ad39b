"""A Hugging Face Hub on the loopback interface, enough of it for `huggingface_hub` to create, fill and read model and
dataset repositories.

Clients look for their Hub once, at import, so they run in processes of their own with `HubServer.environment`. A
repository's key is its path on the Hub's website: `user/name` is a model, `datasets/user/name` a dataset.
"""

import hashlib
import json
import os
import re
import threading
import time
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".parquet", ".png", ".tar")
LFS_SIZE = 10_000_000


class Refusal(Exception):
    """The answer to a request that is not granted."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **body}


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def repository_key(kind: str, repo_id: str) -> str:
    return f"datasets/{repo_id}" if kind == "datasets" else repo_id


def card_metadata(card: str) -> dict | None:
    """The YAML header of a README, None where there is none."""
    header = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    if header is None:
        return None
    try:
        metadata = yaml.safe_load(header[1])
    except yaml.YAMLError as error:
        raise ValueError(f"the header is not YAML: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"the header is a {type(metadata).__name__}, not a mapping")
    return metadata


@dataclass(frozen=True)
class File:
    size: int
    oid: str  # git's hash of the content, of the pointer to it if the file is large
    sha256: str | None = None  # of large files only

    @property
    def storage_name(self) -> str:
        return self.sha256 or self.oid

    def lfs(self, hash_name: str) -> dict:
        """The entry of a large file; the Hub has two names for its hash."""
        if self.sha256 is None:
            return {}
        pointer = lfs_pointer(self.sha256, self.size)
        return {"lfs": {hash_name: self.sha256, "size": self.size, "pointerSize": len(pointer)}}


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    date: str
    files: dict[str, File]

    def tree(self) -> dict[str, dict]:
        """All files and folders by path, in the words of the Hub."""
        entries = {}
        for path, file in sorted(self.files.items()):
            for folder in map(str, PurePosixPath(path).parents[-2::-1]):
                oid = git_hash(f"{self.sha} {folder}".encode())
                entries.setdefault(folder, {"type": "directory", "path": folder, "oid": oid, "size": 0})
            entries[path] = {"type": "file", "path": path, "oid": file.oid, "size": file.size, **file.lfs("oid")}
        return entries


class Repository:
    """Commits in memory, contents in a folder under their hashes."""

    def __init__(self, folder: Path, private: bool):
        self.folder, self.private = folder, private
        self.stored: dict[str, File] = {}
        self.refs: dict[str, str] = {}
        self.commits: dict[str, Commit] = {}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.add_commit("main", None, "initial commit", {".gitattributes": self.store(attributes.encode())})

    def store(self, content: bytes, sha256: str | None = None) -> File:
        """Keep a content, as a large file if its sha256 is given."""
        size = len(content)
        file = File(size, git_hash(lfs_pointer(sha256, size) if sha256 else content), sha256)
        (self.folder / file.storage_name).write_bytes(content)
        self.stored[file.storage_name] = file
        return file

    def read(self, file: File) -> bytes:
        return (self.folder / file.storage_name).read_bytes()

    def commit_at(self, revision: str) -> Commit:
        """The commit of a branch, a pull request (`refs/pr/1`) or a hash."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def add_commit(self, ref: str, parent: str | None, title: str, files: dict[str, File]) -> Commit:
        identity = repr((parent, title, files, time.time_ns()))
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        commit = Commit(hashlib.sha1(identity.encode()).hexdigest(), parent, title, date, files)
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit

    def changed_files(self, files: dict[str, File], operations: list[dict]) -> dict[str, File]:
        """The files after the operations of a commit."""
        files = dict(files)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            path = value["path"]
            if kind == "file":
                files[path] = self.store(b64decode(value["content"]))
            elif kind == "lfsFile":
                if value["oid"] not in self.stored:
                    raise Refusal(400, f"{path} points to a file that was not uploaded")
                files[path] = self.stored[value["oid"]]
            else:
                folder = path.rstrip("/") + "/" if kind == "deletedFolder" else None
                gone = [name for name in files if name == path or (folder and name.startswith(folder))]
                if not gone:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del files[name]
        return files


ROUTES: list[tuple[set[str], re.Pattern, Callable]] = []

# both begin with the kind of a repository and its id
API = "/api/(models|datasets)/([^/]+/[^/]+)"
WEBSITE = "/(?:(datasets)/)?([^/]+/[^/]+)"


def route(methods: str, pattern: str) -> Callable:
    """The decorated method answers requests whose path matches; the pattern's groups are its arguments."""

    def register(function: Callable) -> Callable:
        ROUTES.append((set(methods.split()), re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """One request. HTTP/1.0 ends every connection with its answer, so that a closed server is silent at once."""

    @property
    def hub(self) -> "HubServer":
        return self.server.hub

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query, self.answer_headers = parse_qs(url.query), {}
        self.hub.requests.append((self.command, url.path))
        size = int(self.headers.get("Content-Length", 0))
        if self.command == "PUT" and self.hub.count_down("cut_uploads"):
            self.rfile.read(size // 2)
            return
        # also if the request is refused: a client that is still sending would not see the answer
        self.body = self.rfile.read(size)
        try:
            for methods, pattern, function in ROUTES:
                if self.command in methods and (match := pattern.fullmatch(url.path)):
                    return function(self, *(unquote(group or "") for group in match.groups()))
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        except Refusal as refusal:
            self.answer_headers["X-Error-Message"] = refusal.body["error"]
            if refusal.code:
                self.answer_headers["X-Error-Code"] = refusal.code
            self.answer_json(refusal.body, refusal.status)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def log_message(self, format: str, *arguments) -> None:
        pass

    def answer(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**self.answer_headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, content: dict | list, status: int = 200) -> None:
        self.answer_headers["Content-Type"] = "application/json"
        self.answer(json.dumps(content, default=str).encode(), status)

    def signed_in(self) -> bool:
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {self.hub.token}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token is not None

    def repository(self, kind: str, repo_id: str, write: bool = False) -> Repository:
        """The repository, if the sender of the request may read it, or write to it."""
        repository, signed_in = self.hub.repositories.get(repository_key(kind, repo_id)), self.signed_in()
        # https lets clients read a bare 401 as a missing repository, http does not
        if not signed_in and (write or repository is None or repository.private):
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if repository is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repository

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        if not self.signed_in():
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "tests", "role": "write"}
        auth = {"type": "access_token", "accessToken": token}
        self.answer_json({"type": "user", "name": self.hub.user, "fullname": "Tests", "orgs": [], "auth": auth})

    @route("POST", "/api/validate-yaml")
    def validate_card(self) -> None:
        try:
            missing = card_metadata(json.loads(self.body)["content"]) is None
        except ValueError as error:
            errors = [{"message": str(error)}]
            raise Refusal(400, "Invalid metadata in README.md.", errors=errors, warnings=[]) from error
        warnings = [{"message": "empty or missing yaml metadata in repo card"}] if missing else []
        self.answer_json({"errors": [], "warnings": warnings})

    def named_repository(self) -> str:
        """The key of a repository that is to be created or deleted."""
        if not self.signed_in():
            raise Refusal(401, "Invalid username or password.")
        names = json.loads(self.body)
        owner = names.get("organization") or self.hub.user
        if owner != self.hub.user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}.")
        kind = names.get("type", "model")
        if kind not in ("model", "dataset"):
            raise Refusal(400, f"This Hub has no {kind}s.")
        return repository_key(f"{kind}s", f"{owner}/{names['name']}")

    @route("POST", "/api/repos/create")
    def create_repository(self) -> None:
        key = self.named_repository()
        url = f"{self.hub.endpoint}/{key}"
        with self.hub.lock:
            if key in self.hub.repositories:
                # clients take the address from this answer as well
                raise Refusal(409, "You already created this repo", url=url)
            private = json.loads(self.body).get("visibility") == "private"
            self.hub.repositories[key] = Repository(Path(mkdtemp(dir=self.hub.folder)), private)
        self.answer_json({"url": url, "name": key})

    @route("DELETE", "/api/repos/delete")
    def delete_repository(self) -> None:
        if self.hub.repositories.pop(self.named_repository(), None) is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        self.answer(b"")

    @route("GET", f"{API}(?:/revision/([^/]+))?")
    def show_repository(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(kind, repo_id)
        commit = repository.commit_at(revision or "main")
        siblings = []
        for path, file in sorted(commit.files.items()):
            metadata = {"size": file.size, "blobId": file.oid, **file.lfs("sha256")} if "blobs" in self.query else {}
            siblings.append({"rfilename": path, **metadata})
        try:
            card = card_metadata(repository.read(commit.files["README.md"]).decode()) or {}
        except (KeyError, ValueError):
            card = {}
        gated = "manual" if repository_key(kind, repo_id) in self.hub.gated else False
        answer = {"id": repo_id, "author": self.hub.user, "sha": commit.sha, "lastModified": commit.date}
        answer |= {"private": repository.private, "gated": gated, "disabled": False, "tags": card.get("tags", [])}
        answer |= {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
        self.answer_json(answer | {"cardData": card, "siblings": siblings})

    @route("GET", f"{API}/tree/([^/]+)(?:/(.+))?")
    def list_tree(self, kind: str, repo_id: str, revision: str, folder: str) -> None:
        tree = self.repository(kind, repo_id).commit_at(revision).tree()
        prefix = f"{folder}/" if folder else ""
        entries = [entry for path, entry in tree.items() if path.startswith(prefix)]
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if self.query.get("recursive") not in (["true"], ["True"], ["1"]):
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        self.answer_json(entries)

    @route("POST", f"{API}/paths-info/([^/]+)")
    def list_paths(self, kind: str, repo_id: str, revision: str) -> None:
        tree = self.repository(kind, repo_id).commit_at(revision).tree()
        paths = parse_qs(self.body.decode()).get("paths", [])
        self.answer_json([tree[path] for path in paths if path in tree])

    @route("GET", f"{API}/commits/([^/]+)")
    def list_commits(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(kind, repo_id)
        commit, answers = repository.commit_at(revision), []
        while commit:
            entry = {"id": commit.sha, "title": commit.title, "message": "", "date": commit.date}
            answers.append(entry | {"authors": [{"user": self.hub.user}]})
            commit = repository.commits.get(commit.parent)
        self.answer_json(answers)

    @route("GET", f"{API}/refs")
    def list_refs(self, kind: str, repo_id: str) -> None:
        branches, pull_requests = [], []
        for name, sha in self.repository(kind, repo_id).refs.items():
            if name.startswith("refs/pr/"):
                pull_requests.append({"name": name, "ref": name, "targetCommit": sha})
            else:
                branches.append({"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha})
        self.answer_json({"branches": branches, "converts": [], "tags": [], "pullRequests": pull_requests})

    @route("POST", f"{API}/branch/([^/]+)")
    def create_branch(self, kind: str, repo_id: str, branch: str) -> None:
        repository = self.repository(kind, repo_id, write=True)
        with self.hub.lock:
            if branch in repository.refs:
                raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
            repository.refs[branch] = repository.commit_at(json.loads(self.body).get("startingPoint", "main")).sha
        self.answer_json({})

    @route("POST", f"{API}/preupload/([^/]+)")
    def plan_upload(self, kind: str, repo_id: str, revision: str) -> None:
        present, answers = self.repository(kind, repo_id, write=True).commit_at(revision).files, []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
            answers.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if file["path"] in present:
                # clients leave out what has not changed
                answers[-1]["oid"] = present[file["path"]].storage_name
        self.answer_json({"files": answers})

    @route("POST", f"{WEBSITE}[.]git/info/lfs/objects/batch")
    def plan_large_files(self, kind: str, repo_id: str) -> None:
        repository = self.repository(kind, repo_id, write=True)
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in repository.stored:
                href = f"{self.hub.endpoint}/{repository_key(kind, repo_id)}.git/lfs/{wanted['oid']}"
                wanted["actions"] = {"upload": {"href": href}}
        self.answer_json({"transfer": "basic", "objects": objects})

    @route("PUT", f"{WEBSITE}[.]git/lfs/([0-9a-f]{{64}})")
    def upload_large_file(self, kind: str, repo_id: str, sha256: str) -> None:
        """An address that was given out to a writer, hence without a token."""
        if self.hub.count_down("fail_uploads"):
            raise Refusal(403, "Request has expired")
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refusal(400, "The content has another hash")
        self.hub.repositories[repository_key(kind, repo_id)].store(self.body, sha256)
        self.answer(b"")

    @route("POST", f"{API}/commit/([^/]+)")
    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(kind, repo_id, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, operations = lines[0]["value"], lines[1:]
        url, answer, expected = f"{self.hub.endpoint}/{repository_key(kind, repo_id)}", {}, header.get("parentCommit")
        with self.hub.lock:
            if "create_pr" in self.query:
                parent = repository.commit_at(expected or revision)
                number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
                revision, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{url}/discussions/{number}"
            elif revision not in repository.refs:
                raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            else:
                parent = repository.commit_at(revision)
                if expected and not parent.sha.startswith(expected):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = repository.changed_files(parent.files, operations)
            sha = repository.add_commit(revision, parent.sha, header["summary"], files).sha
        self.answer_json({"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **answer})

    @route("GET HEAD", f"{WEBSITE}/resolve/([^/]+)/(.+)")
    def resolve(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        repository, key = self.repository(kind, repo_id), repository_key(kind, repo_id)
        if key in self.hub.gated:
            raise Refusal(403 if self.signed_in() else 401, f"Access to {key} is restricted.", "GatedRepo")
        commit = repository.commit_at(revision)
        self.answer_headers["X-Repo-Commit"] = commit.sha
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = commit.files[path]
        self.answer_headers |= {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.sha256:
            self.answer_headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": file.size}
        content = repository.read(file)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.answer(content)
        start, end = int(wanted[1]), min(int(wanted[2] or file.size), file.size - 1)
        if start > end:
            raise Refusal(416, "Range Not Satisfiable")
        self.answer_headers["Content-Range"] = f"bytes {start}-{end}/{file.size}"
        self.answer(content[start : end + 1], 206)


class HubServer:
    """The Hub of one user, from its creation until `close`.

    `repositories` are found under their keys; `requests` has method and path of all requests. The next `fail_uploads`
    uploads of large files are refused for good; the next `cut_uploads` lose their connection half-way, after which
    clients try again. Nobody is let in to the files of the repositories in `gated`.
    """

    user = "tester"
    token = "hf_loopback"

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.gated: set[str] = set()
        self.fail_uploads = self.cut_uploads = 0
        self.lock = threading.Lock()
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering; may be called twice."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def count_down(self, counter: str) -> bool:
        """Whether one of the announced failures is still due; uploads come in several threads."""
        with self.lock:
            left = getattr(self, counter)
            setattr(self, counter, max(left - 1, 0))
        return left > 0

    def environment(self, home: str | Path) -> dict[str, str]:
        """The variables with which a client, signed in, talks to this Hub only and keeps its files in `home`."""
        foreign = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_")
        others = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        switches = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": self.token, "no_proxy": "127.0.0.1"}
        return others | own | dict.fromkeys(switches, "1")

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        repository = self.repositories[repo_id]
        return repository.read(repository.commit_at(revision).files[path])

    def files(self, repo_id: str, revision: str = "main") -> list[str]:
        return sorted(self.repositories[repo_id].commit_at(revision).files)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    # clients open many connections at once
    request_queue_size = 64
