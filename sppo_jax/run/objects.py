"""The objects below a URL of fsspec (gs://, s3://, memory:// …): listed, sent, fetched and deleted, each tried again where it fails."""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sppo_jax import command, files
from sppo_jax.errors import BadInput, one_line

PATIENCE = 600.0  # seconds for which a failing bucket is tried again
ENDING = 20.0  # the same once the run is ending
PAUSES = (1.0, 30.0)  # seconds between two tries: the first, and the longest
IN_MEMORY = 1 << 26  # bytes; a smaller file is read at once, since it may be growing
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}  # of the protocols that need one
VERSIONS = ("generation", "etag", "ETag", "mtime", "LastModified", "last_modified", "created")
# Errors that no second try mends.
REFUSED = (PermissionError, FileNotFoundError, NotADirectoryError, NotImplementedError, ImportError)
NO_ACCESS = re.compile(r"\b(?:401|403|Forbidden|Unauthorized|AccessDenied|NoSuchBucket)\b")

Version = str  # differs between two contents of one object, as far as the protocol says
T = TypeVar("T")


class Objects:
    """The objects below a URL, by their names below it. Any thread may call the methods.

    They raise BadInput where the bucket refuses, and where it has failed for `PATIENCE` seconds.
    """

    def __init__(self, url: str):
        """Raises BadInput for a URL that cannot be used."""
        import fsspec

        self.url = url
        self.kept = ""  # what is to be said of work that cannot be sent
        self.ending = threading.Event()  # once set, there is less patience
        protocol = url.partition("://")[0]
        # Also for the instance that orbax makes: other processes write, too.
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
        try:
            self._files, base = fsspec.core.url_to_fs(url)
        except ImportError as error:
            package = PACKAGES.get(protocol)
            raise BadInput(
                f"{url}: {f'this needs another package: pip install {package}' if package else one_line(error)}"
            ) from None
        except Exception as error:  # an unknown protocol, credentials that cannot be read
            reason = one_line(error) or type(error).__name__
            raise BadInput(f"{url}: {reason}; name a directory, or a bucket as gs://BUCKET/RUN") from None
        self._base = base.rstrip("/")
        if protocol in PACKAGES and "/" not in self._base:
            raise BadInput(f"{url}: name a folder in the bucket, as {url}/run")

    def listed(self) -> dict[str, tuple[int, Version]]:
        """{name: (bytes, version)} of all objects."""
        self._files.invalidate_cache()
        found = self.tried(lambda: self._files.find(self._base, detail=True))
        return {
            path.removeprefix(f"{self._base}/"): (int(info.get("size") or 0), _version(info))
            for path, info in found.items()
            if path.startswith(f"{self._base}/") and info.get("type") != "directory"
        }

    def read(self, name: str) -> bytes | None:
        """The content of an object; None where there is none."""

        def read() -> bytes | None:
            with contextlib.suppress(FileNotFoundError):
                return bytes(self._files.cat_file(self._at(name)))
            return None

        return self.tried(read)

    def write(self, name: str, data: bytes) -> None:
        """Make or replace an object."""
        self.tried(lambda: self._files.pipe_file(self._at(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Make an object where there is none. Returns whether it was made."""

        def create() -> bool:
            try:
                self._files.pipe_file(self._at(name), data, mode="create")
            except FileExistsError:
                return False
            except NotImplementedError:  # the protocol has no such condition: as well as can be
                if self._files.exists(self._at(name)):
                    return False
                self._files.pipe_file(self._at(name), data)
            return True

        return self.tried(create)

    def send(self, name: str, path: Path) -> Version:
        """Make or replace an object by the content of a file. Raises FileNotFoundError where the file is gone."""
        data = path.read_bytes() if path.stat().st_size <= IN_MEMORY else None
        at = self._at(name)

        def send() -> Version:
            if data is not None:
                self._files.pipe_file(at, data)
            else:
                self._files.put_file(str(path), at)
            return _version(self._files.info(at))

        try:
            return self.tried(send)
        except BadInput:
            path.stat()  # the reason may be that the file was deleted meanwhile
            raise

    def fetch(self, name: str, path: Path) -> Version | None:
        """Replace a file by the content of an object, whole or not at all; None where there is no such object (any more)."""
        part = files.part_of(path)

        def fetch() -> Version | None:
            try:
                info = self._files.info(self._at(name))
                self._files.get_file(self._at(name), str(part))
            except FileNotFoundError:
                return None
            if part.stat().st_size != info["size"]:
                raise OSError(f"{name}: {part.stat().st_size} bytes came of {info['size']}")
            return _version(info)

        with files.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        version = self.tried(fetch)
        with files.writing(path):
            part.unlink(missing_ok=True) if version is None else os.replace(part, path)
        return version

    def delete(self, name: str) -> None:
        """Delete an object; nothing happens where there is none."""

        def delete() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._at(name))

        self.tried(delete)

    def tried(self, act: Callable[[], T]) -> T:
        """The result of `act`, which is tried again where it fails. Raises BadInput where there is no sense in that."""
        start, pause = time.monotonic(), PAUSES[0]
        while True:
            try:
                return act()
            except Exception as error:  # the protocols raise many kinds
                reason = one_line(error)[:300] or type(error).__name__
                if isinstance(error, REFUSED) or NO_ACCESS.search(reason):
                    raise BadInput(f"{self.url}: {reason}; check its name, and your access to it") from None
                left = start + (ENDING if self.ending.is_set() else PATIENCE) - time.monotonic()
                if left < pause:
                    raise BadInput(f"{self.url}: {reason}{self.kept}") from None
                if pause == PAUSES[0]:
                    command.say(f"{self.url}: {reason}; trying again for {left:.0f} s")
            if self.ending.is_set():
                time.sleep(pause)
            else:
                self.ending.wait(pause)
            pause = min(2 * pause, PAUSES[1])

    def _at(self, name: str) -> str:
        return f"{self._base}/{name}"


def _version(info: dict[str, Any]) -> Version:
    return " ".join([str(info.get("size")), *(str(info[key]) for key in VERSIONS if info.get(key))][:2])
