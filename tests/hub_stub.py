"""A hub on this machine: the few addresses that huggingface_hub uses, with files in memory and faults on request."""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Repositories {name: {commit: {file: bytes}}}; `main` of each is the commit added last."""

    def __init__(self):
        self.repos, self.main = {}, {}
        self.seen = []  # (method, path, headers)
        self.refused = {}  # repository -> (status, headers) of every reply
        self.gated = set()  # repositories whose files are refused but may be listed
        self.broken = {}  # file -> bytes after which the connection ends, once
        self.reset = False  # end it by a reset: after an ordinary end the client retries by itself
        self.pushed = {}  # repository -> {file: bytes}
        self.push_status = 200
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, repo, files):
        """Add a commit, to which `main` moves; return its hash."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = dict(files)
        self.main[repo] = commit
        return commit

    def fetched(self, method="GET"):
        """Return the names of files whose contents were requested."""
        return [p.rsplit("/", 1)[1] for m, p, _ in self.seen if m == method and "/resolve/" in p]

    def answer(self, request):
        path = request.path.partition("?")[0]
        self.seen.append((request.command, path, dict(request.headers)))
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.command == "POST":
            return self._write(request, path, body)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repo, kind, revision = match.groups()
            commit = self._commit(request, repo, revision or "main")
            if commit is None:
                return None
            files = self.repos[repo][commit]
            if kind == "tree":
                rows = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                return _json(request, rows)
            return _json(request, {"id": repo, "sha": commit, "siblings": [{"rfilename": n} for n in files]})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = match.groups()
            commit = self._commit(request, repo, revision)
            if commit is not None:
                self._file(request, repo, commit, name)
            return None
        return _json(request, {"error": "no such address"}, 404)

    def _commit(self, request, repo, revision):
        if repo in self.refused:
            status, headers = self.refused[repo]
            return _json(request, {"error": "refused"}, status, headers)
        if repo not in self.repos:
            return _json(request, {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        commit = self.main[repo] if revision == "main" else revision
        if commit not in self.repos[repo]:
            return _json(request, {"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return commit

    def _file(self, request, repo, commit, name):
        if repo in self.gated:
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted"}
            return _json(request, {"error": "restricted"}, 403, headers)
        data = self.repos[repo][commit].get(name)
        if data is None:
            return _json(request, {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or "")
        start = int(wanted[1]) if wanted else 0
        request.send_response(206 if wanted else 200)
        if wanted:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(data) - start))
        request.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        request.send_header("X-Repo-Commit", commit)
        request.end_headers()
        if request.command == "GET":
            if name in self.broken:
                request.wfile.write(data[start : self.broken.pop(name)])
                request.wfile.flush()
                if self.reset:
                    request.connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                    os.close(request.connection.detach())
                request.close_connection = True
            else:
                request.wfile.write(data[start:])
        return None

    def _write(self, request, path, body):
        if self.push_status != 200:
            return _json(request, {"error": "refused"}, self.push_status)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            self.pushed.setdefault(repo, {})["private"] = "private" in (
                wanted.get("visibility"),
                *(k for k, v in wanted.items() if v is True),
            )
            return _json(request, {"url": f"{self.url}/{repo}", "name": repo})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            repo, kind = match.groups()
            if kind == "preupload":
                files = json.loads(body)["files"]
                rows = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                return _json(request, {"files": rows})
            for line in body.splitlines():
                change = json.loads(line)
                if change["key"] == "file":
                    value = change["value"]
                    self.pushed[repo][value["path"]] = base64.b64decode(value["content"])
            where = f"{self.url}/{repo}/commit/{'a' * 40}"
            return _json(request, {"success": True, "commitOid": "a" * 40, "commitUrl": where})
        if path == "/api/validate-yaml":
            return _json(request, {"errors": [], "warnings": []})
        return _json(request, {"error": "no such address"}, 404)


def _json(request, value, status=200, headers=()):
    body = json.dumps(value).encode()
    request.send_response(status)
    for key, text in dict(headers).items():
        request.send_header(key, text)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


@contextlib.contextmanager
def serving(kind=Hub):
    hub = kind()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def environment(hub, home, **more):
    """Return the environment of a process that uses `hub`, has its cache in `home` and reaches no other machine."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    closed = "http://127.0.0.1:9"
    return inherited | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HTTP_PROXY": closed,
        "HTTPS_PROXY": closed,
        "ALL_PROXY": closed,
        "NO_PROXY": "127.0.0.1",
        "PYTHONWARNINGS": "error",
    } | more  # fmt: skip
