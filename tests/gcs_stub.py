"""A server with the part of Google Cloud Storage's JSON interface that gcsfs and tensorstore use, with objects in memory."""

import contextlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

# Read by gcsfs when it is imported: else it asks over gRPC which kind of bucket it is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


class Store:
    """Objects by name of one bucket: (generation, content).

    `refuse`: the status of the answers about names with `refused` in them, where it is not 0.
    """

    def __init__(self):
        self.objects, self.generation, self.asked, self.begun = {}, 0, [], []
        self.refuse, self.refused = 0, ""
        self.lock = threading.Lock()


@contextlib.contextmanager
def served(bucket="bucket"):
    """Yields the Store of a bucket, to which gcsfs and tensorstore go in this process and its children."""
    store = Store()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            path, query = self._asked()
            name = self._object(path)
            if name is None:
                if path.rstrip("/").endswith("/o"):
                    return self._list(query)
                return self._json({"name": bucket, "locationType": "region", "storageClass": "STANDARD"})
            if name not in store.objects:
                return self._error(404)
            generation, data = store.objects[name]
            if query.get("ifGenerationNotMatch") == str(generation):
                return self._error(304)
            if query.get("ifGenerationMatch", str(generation)) != str(generation):
                return self._error(412)
            if query.get("alt") != "media":
                return self._json(self._meta(name))
            status, headers = 200, {"x-goog-generation": str(generation)}
            if begin := self.headers.get("Range"):
                first, last = begin.removeprefix("bytes=").split("-")
                first, last = int(first), min(int(last or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                status, data = 206, data[first : last + 1]
            return self._answer(status, data, "application/octet-stream", headers)

        def do_POST(self):
            path, query = self._asked()
            body = self._body()
            if "/moveTo/" in path:
                source, target = path.split("/moveTo/")
                found = store.objects.pop(self._object(source), None)
                if found is None:
                    return self._error(404)
                name = self._object(f"/{target}")
                self._put(name, found[1])
                return self._json(self._meta(name))
            if query.get("uploadType") == "resumable":
                there = f"http://{self.headers['Host']}/upload/{len(store.begun)}"
                store.begun.append((json.loads(body)["name"], bytearray()))
                return self._answer(200, b"", "text/plain", {"Location": there})
            if path.startswith("/upload/") and path[8:].isdigit():
                name, content = store.begun[int(path[8:])]
                content += body
                if self.headers["Content-Range"].endswith("/*"):
                    return self._answer(308, b"", "text/plain", {"Range": f"bytes=0-{len(content) - 1}"})
                self._put(name, bytes(content))
                return self._json(self._meta(name))
            if query.get("uploadType") == "multipart":
                mark = b"--" + self.headers["Content-Type"].split("boundary=")[1].strip('"').encode()
                _, head, rest = body.split(mark, 2)
                name = json.loads(head.split(b"\n\n", 1)[1])["name"]
                data = rest.split(b"\n\n", 1)[1]
                data = data[: data.rindex(b"\n" + mark)]
            else:
                name, data = query["name"], body
            wanted = query.get("ifGenerationMatch")
            with store.lock:
                if wanted is not None and wanted != str(store.objects.get(name, (0,))[0]):
                    return self._error(412)
                self._put(name, data)
            return self._json(self._meta(name))

        def do_DELETE(self):
            path, _ = self._asked()
            found = store.objects.pop(self._object(path), None)
            return self._error(404) if found is None else self._answer(204, b"", "text/plain", {})

        def _asked(self):
            url = urlsplit(self.path)
            store.asked.append(f"{self.command} {unquote(url.path)}")
            return url.path, {key: values[0] for key, values in parse_qs(url.query).items()}

        def _body(self):
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _object(self, path):
            _, found, name = path.partition("/o/")
            return unquote(name) if found else None

        def _put(self, name, data):
            store.generation += 1
            store.objects[name] = store.generation, data

        def _meta(self, name):
            generation, data = store.objects[name]
            return {
                "name": name, "bucket": bucket, "size": str(len(data)), "generation": str(generation),
                "updated": "2026-11-01T00:00:00.000Z", "timeCreated": "2026-11-01T00:00:00.000Z",
                "etag": f"e{generation}", "contentType": "application/octet-stream",
            }  # fmt: skip

        def _list(self, query):
            prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
            begin, end = query.get("startOffset", ""), query.get("endOffset")
            names = [
                n
                for n in sorted(store.objects)
                if n.startswith(prefix) and n >= begin and (not end or n < end)
            ]
            folders = set()
            if delimiter:
                below = {n: n[len(prefix) :] for n in names}
                folders = {prefix + rest.split("/")[0] + "/" for rest in below.values() if "/" in rest}
                names = [n for n, rest in below.items() if "/" not in rest]
            return self._json({"items": [self._meta(n) for n in names], "prefixes": sorted(folders)})

        def _json(self, value):
            self._answer(200, json.dumps(value).encode(), "application/json", {})

        def _error(self, status):
            text = json.dumps({"error": {"code": status, "message": "refused by the stub"}}).encode()
            self._answer(status, b"" if status == 304 else text, "application/json", {})

        def _answer(self, status, data, kind, headers):
            if store.refuse and store.refused in unquote(self.path):
                status, data = store.refuse, b'{"error": {"code": %d, "message": "refused"}}' % store.refuse
            self.send_response(status)
            for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data)

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_):
            """A client that has gone away is no error."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)  # read by gcsfs
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # read by tensorstore
        patch.setenv("NO_GCE_CHECK", "true")  # no search for credentials on the network
        try:
            yield store
        finally:
            server.shutdown()
            server.server_close()
