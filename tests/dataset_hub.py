"""A hub of datasets on this machine: the few addresses that the `datasets` library uses, with files in memory."""

import hashlib
import io
import json
import os
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

import pyarrow as pa
import pyarrow.parquet as pq

from tests import hub_stub

COMMIT = "a" * 40


class Hub:
    """`repos` maps names to {file: bytes}, all at one commit; `refused` maps names to (status, the hub's error code)."""

    def __init__(self):
        self.repos, self.refused, self.fetched = {}, {}, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, headers, data = hub.answer(self.command, self.path.partition("?")[0], body)
                self.send_response(status)
                for key, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, repo, **splits):
        """Add a dataset of parquet files, one for each split of {split: rows}."""
        files = {f"data/{name}-00000-of-00001.parquet": _parquet(rows) for name, rows in splits.items()}
        entries = "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in splits)
        readme = f"---\nconfigs:\n- config_name: default\n  data_files:\n{entries}---\n"
        self.repos[repo] = {"README.md": readme.encode(), **files}

    def answer(self, method, path, body):
        """Return (status, headers, data) of a reply."""
        found = re.fullmatch(
            r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/(resolve|revision|tree|paths-info)/([^/]+)/?(.*))?", path
        )
        if not found:
            return 404, {}, b""
        repo, kind, revision, name = found.groups()
        if repo in self.refused:
            status, code = self.refused[repo]
            return status, {"X-Error-Code": code} if code else {}, b""
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in (None, "main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.repos[repo]
        if kind == "resolve":
            if name not in files:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            if method == "GET":
                self.fetched.append(f"{repo}/{name}")
            etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            return 200, {"ETag": etag, "X-Repo-Commit": COMMIT}, files[name]
        if kind == "tree" and not name:
            return _json([{"type": "directory", "path": "data", "oid": "0" * 40}])
        if kind in ("tree", "paths-info"):
            wanted = parse_qs(body.decode()).get("paths", []) if kind == "paths-info" else ()
            rows = [f for f in files if f in wanted or (kind == "tree" and f.startswith(f"{name}/"))]
            return _json(
                [{"type": "file", "path": f, "size": len(files[f]), "oid": "1" * 40} for f in sorted(rows)]
            )
        return _json({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]})


def _json(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _parquet(rows):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def serving():
    return hub_stub.serving(Hub)


def environment(hub, home):
    """Return the environment of a process that uses `hub`, has its cache in `home` and reaches no other machine."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    closed = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    return inherited | closed | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "PYTHONWARNINGS": "error",
    }  # fmt: skip
