"""OUT in a bucket (gs://, s3://, every protocol of fsspec): a local copy that the stages work on, kept equal to the bucket.

Buckets hold whole objects: nothing is appended to or renamed there. So a run works on a local copy of its directory, which
belongs to one process and lies below the user's caches. A thread sends what has changed, every `EVERY` seconds and at the
end; what other processes have sent is fetched where they meet. A directory that appears at once on a disk (an export, a
checkpoint) counts in the bucket when the object `.complete` is in it, which is written last and deleted first.
"""

import contextlib
import fcntl
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from sppo_jax import command, files
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.run import holding
from sppo_jax.run.objects import Objects, Version

EVERY = 20.0  # seconds between two looks at what has changed
AT_ONCE = 8  # objects sent or fetched at the same time
MARK, CONFIG = ".complete", "config.yaml"
DIRECT = "gs://"  # begins the URLs to which orbax writes itself
CHECKPOINTS = re.compile(r"iter_\d+/checkpoints/.*")
# Directories below OUT that appear at once; names of what is being written; weights; all that a run deletes for good.
WHOLE = re.compile(r"iter_\d+/(?:export|adapter|checkpoints/[^/]+)(?=/)")
UNFINISHED = re.compile(r"(?:^|/)(?:\.[^/]*\.part|[^/]*\.orbax-checkpoint-tmp[^/]*)(?:/|$)")
WEIGHTS = re.compile(r"iter_(\d+)/(?:checkpoints/.*|.*\.safetensors)")
DELETED = re.compile(r"iter_\d+/(?:checkpoints/.*|.*\.partial\.jsonl)")

Stat = tuple[int, int]  # of a local file: its bytes, and when it was changed, ns
Wanted = Callable[[str], bool]  # of a path below OUT

_open: dict[str, "Mirror"] = {}  # by URL


def is_url(out: str | os.PathLike[str]) -> bool:
    """Whether OUT names a bucket, not a directory."""
    return "://" in str(out)


def local(out: str | os.PathLike[str]) -> Path:
    """The directory in which OUT lies on this machine: itself, or the local copy of a bucket."""
    if not is_url(out):
        return Path(out)
    url = str(out).rstrip("/")
    return _open[url].root if url in _open else _home(url, 0) / "run"


def checkpoints(out: str | os.PathLike[str]) -> Path | epath.Path:
    """Where the folders with checkpoints lie: `local(out)`, or on Google Cloud Storage the bucket itself.

    orbax writes there directly, from all processes at once, and has its own mark of what is whole.
    """
    return epath.Path(out) if str(out).startswith(DIRECT) else local(out)


def shown(text: object) -> str:
    """A text in which local copies have the URLs of their buckets instead."""
    shown = str(text)
    for url, mirror in _open.items():
        shown = shown.replace(str(mirror.root), url)
    return shown


def send() -> None:
    """Send what this process has changed: before it meets the others."""
    for mirror in _open.values():
        mirror.push()


def fetch() -> None:
    """Fetch what the other processes have sent: after a meeting."""
    for mirror in _open.values():
        mirror.pull()


@contextlib.contextmanager
def opened(out: str, process: int = 0, processes: int = 1) -> Iterator[None]:
    """Fetch OUT where it is in a bucket, send what changes while the context lasts, and send the rest at its end.

    Process 0 of `processes` holds the run's lock. Raises BadInput where the bucket cannot be used, where another run holds
    it, and where it has failed for too long: nothing is lost then, since the local copy is kept for the next start.
    """
    if not is_url(out):
        yield
        return
    url = out.rstrip("/")
    if processes > 1 and not url.startswith(DIRECT):
        raise BadInput(
            f"--out {out}: several processes write their checkpoints together, which works with {DIRECT} and with a "
            "directory that all of them see; choose one of these"
        )
    home = _home(url, process)
    with _alone(home), _mirror(url, home) as mirror:
        lock = holding.Lock(mirror.objects, mirror.own)
        with contextlib.ExitStack() as stack:
            if process == 0:
                stack.enter_context(lock.held())
                stack.enter_context(mirror.repeated(lock.renew, holding.EVERY))
            mirror.pull(start=True)
            with files.writing(mirror.root):
                mirror.root.mkdir(exist_ok=True)
            stack.enter_context(mirror.sending())
            yield


@contextlib.contextmanager
def reading(out: str, wanted: Wanted = lambda _: True) -> Iterator[None]:
    """Fetch the `wanted` paths of OUT where it is in a bucket, for a command that reads a run.

    The local copy is deleted at the end; what was changed in it is sent before. Raises BadInput where the bucket cannot be
    used.
    """
    if not is_url(out):
        yield
        return
    with (
        tempfile.TemporaryDirectory(prefix="sppo_jax-") as home,
        _mirror(out.rstrip("/"), Path(home)) as mirror,
    ):
        mirror.pull(start=True, wanted=wanted)
        yield
        mirror.push()


def without_weights(name: str) -> bool:
    """Whether a path below OUT holds no weights."""
    return WEIGHTS.fullmatch(name) is None


def weights_of(t: int) -> Wanted:
    """All paths below OUT, but weights of other iterations than t."""
    return lambda name: (found := WEIGHTS.fullmatch(name)) is None or int(found[1]) == t


class Mirror:
    """A directory `root`, and the same in a bucket."""

    def __init__(self, url: str, home: Path):
        """`home`: a directory of this process alone. Raises BadInput for a URL that cannot be used."""
        self.root, self._state = home / "run", home / "state.json"
        self.objects = Objects(url)
        self._turn = threading.RLock()  # one sending or fetching at a time
        self._failed: Exception | None = None
        # What both sides had when they were last equal: {path below OUT: (local stat, version in the bucket)}.
        self._known: dict[str, tuple[Stat, Version]] = {}
        self.own = os.urandom(8).hex()  # names `home`, in the lock of the run
        with contextlib.suppress(BadInput, KeyError):
            found = files.read_json(self._state)
            self.own = found["own"]
            self._known = {
                name: ((stat[0], stat[1]), version) for name, (stat, version) in found["known"].items()
            }

    def pull(self, *, start: bool = False, wanted: Wanted | None = None) -> None:
        """Make the local copy equal to the bucket, but for files that are newer here.

        Where both have changed a file, the longer one counts, since rows are only ever added. `start`: a file that is
        missing here is fetched again; later that means that this process has deleted it. Weights that a run no longer
        needs stay in the bucket, unless `wanted` says which paths are fetched.
        """
        with self._turn:
            listed = self._there()
            if start and CONFIG in self._known and CONFIG not in listed:  # the run was deleted there
                files.remove(self.root)
                self._known.clear()
            here = self._here()
            there = {name: found for name, found in listed.items() if _counts(name, listed)}
            wanted = wanted or _needed(there)
            fetched = []
            for name, (size, version) in there.items():
                known = self._known.get(name)
                equal = known is not None and known[1] == version and (name in here or not start)
                newer = name in here and (known is None or known[0] != here[name]) and here[name][0] > size
                if not equal and not newer and wanted(name):
                    fetched.append(name)
            self._each(fetched, self._fetch)
            for name in set(self._known) - set(there):
                stat, _ = self._known.pop(name)
                if name not in listed and here.get(name) == stat:  # deleted by another process
                    (self.root / name).unlink(missing_ok=True)
            self.save()

    def push(self) -> None:
        """Send every file that has changed, the oldest first, and delete what this process has deleted."""
        with self._turn:
            here = self._here()
            changed = [name for name, stat in here.items() if self._known.get(name, (None,))[0] != stat]
            gone = [name for name in self._known if name not in here and DELETED.fullmatch(name)]
            units: dict[str, list[str]] = {}
            for name in sorted(changed, key=lambda name: here[name][1]):
                units.setdefault(_directory(name) or name, []).append(name)
            for unit, names in units.items():
                if unit == names[0]:
                    self._send(unit)
                else:
                    self._send_directory(unit, names, here)
            self._each({f"{_directory(name)}/{MARK}" for name in gone if _directory(name)}, self._delete)
            self._each(gone, self._delete)
            if changed or gone:
                self.save()

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Send in a thread while the context lasts, and the rest at its end. Raises BadInput where that has failed."""
        self.objects.kept = (
            f"; what it lacks is in {self.root.parent}, and the same command on this machine sends it"
        )
        try:
            with self.repeated(self.push, EVERY):
                try:
                    yield
                finally:
                    self.objects.ending.set()
        except BaseException as error:
            if isinstance(error, Terminated) and self._failed is not None:
                raise self._failed from None  # this is what has ended the run
            try:
                self.push()
            except BadInput as unsent:  # what is on its way already is the one to report
                command.say(f"warning: {unsent}")
            raise
        if self._failed is not None:
            raise self._failed
        self.push()

    @contextlib.contextmanager
    def repeated(self, act: Callable[[], None], seconds: float) -> Iterator[None]:
        """Do `act` again and again in a thread. Where it fails, the process gets a SIGTERM: the run stops as it does then."""
        end = threading.Event()

        def repeat() -> None:
            try:
                while not end.wait(seconds) and self._failed is None:
                    act()
            except Exception as error:
                self._failed = self._failed or error
                if not end.is_set() and (main := threading.main_thread().ident):
                    signal.pthread_kill(main, signal.SIGTERM)  # what it waits in ends, too

        thread = threading.Thread(target=repeat, name="bucket", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def save(self) -> None:
        """Keep on disk what is known of the bucket."""
        files.write_json(self._state, {"own": self.own, "known": self._known})

    def _there(self) -> dict[str, tuple[int, Version]]:
        """{path below OUT: (bytes, version)} of the objects that the local copy has, too."""
        direct = self.objects.url.startswith(DIRECT)
        listed = self.objects.listed()
        return {name: found for name, found in listed.items() if not (direct and CHECKPOINTS.fullmatch(name))}

    def _here(self) -> dict[str, Stat]:
        """{path below OUT: stat} of all files under their final names."""
        found: dict[str, Stat] = {}
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                below = path.relative_to(self.root).as_posix()
                if below != holding.LOCK and not UNFINISHED.search(below):
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        found[below] = _stat(path)
        return found

    def _send_directory(self, directory: str, names: list[str], here: dict[str, Stat]) -> None:
        """Send the files of a directory that have changed. One that is new counts only once all of them are there."""
        mark = f"{directory}/{MARK}"
        members = {name: stat for name, stat in here.items() if _directory(name) == directory}
        if len(names) == len(members):
            self._delete(mark)
            old = (n for n in self._there() if _directory(n) == directory and n not in members)
            self._each(old, self._delete)
        self._each(names, self._send)
        if {n: stat for n, stat in self._here().items() if _directory(n) == directory} == members:
            self.objects.write(mark, b"{}")
        else:  # replaced or deleted meanwhile: once more, the next time
            for name in names:
                self._known.pop(name, None)

    def _send(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            # Before the content is read: a file that grows meanwhile has another stat the next time.
            stat = _stat(self.root / name)
            self._known[name] = stat, self.objects.send(name, self.root / name)

    def _fetch(self, name: str) -> None:
        version = self.objects.fetch(name, self.root / name)
        if version is not None:
            self._known[name] = _stat(self.root / name), version

    def _delete(self, name: str) -> None:
        self.objects.delete(name)
        self._known.pop(name, None)

    def _each(self, names: Iterable[str], act: Callable[[str], None]) -> None:
        with ThreadPoolExecutor(AT_ONCE, "bucket") as pool:
            list(pool.map(act, list(names)))


@contextlib.contextmanager
def _mirror(url: str, home: Path) -> Iterator[Mirror]:
    """The local copy in `home`, by which `local` and `shown` know the URL."""
    mirror = _open[url] = Mirror(url, home)
    try:
        yield mirror
    except BadInput as error:
        raise BadInput(shown(error)) from None
    finally:
        del _open[url]
        with contextlib.suppress(BadInput):  # the next start compares more
            mirror.save()


def _home(url: str, process: int) -> Path:
    """The directory of one process's local copy of a bucket. Raises BadInput where the user has no caches."""
    caches = files.caches()
    if caches is None:
        raise BadInput(
            f"{url}: its local copy needs a home directory; set XDG_CACHE_HOME to an absolute path"
        )
    return caches / "sppo_jax" / "runs" / files.sha256_text(url)[:16] / f"process-{process}"


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Claim a local copy for this process. Raises BadInput where another has it."""
    with files.writing(home):
        home.mkdir(parents=True, exist_ok=True)
        file = (home / "lock").open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{home} is in use by another process of this machine") from None
        yield


def _directory(name: str) -> str:
    """The directory around a path below OUT that appears at once; "" where there is none."""
    found = WHOLE.match(name)
    return found[0] if found else ""


def _counts(name: str, listed: Iterable[str]) -> bool:
    """Whether an object is a file of the run: not its lock, a mark, or in a directory that is still being sent."""
    directory = _directory(name)
    if name == holding.LOCK or name.endswith(f"/{MARK}"):
        return False
    return not directory or f"{directory}/{MARK}" in listed


def _needed(there: Iterable[str]) -> Wanted:
    """All paths, but weights of iterations before the last one that was measured."""
    measured = (re.fullmatch(r"iter_(\d+)/eval\.json", name) for name in there)
    last = max((int(found[1]) for found in measured if found), default=0)
    return lambda name: (found := WEIGHTS.fullmatch(name)) is None or int(found[1]) >= last


def _stat(path: Path) -> Stat:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
