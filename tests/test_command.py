"""Exit codes and output: what cannot be shown costs no work, and what ends a command is one line."""

import errno
import io
import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from sppo_jax import command
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics


class Broken(io.StringIO):
    """A standard output whose writes or flushes fail."""

    def __init__(self, error, at="write"):
        super().__init__()
        self.error, self.at = error, at

    def write(self, text):
        if self.at == "write":
            raise self.error
        return super().write(text)

    def flush(self):
        if self.at == "flush":
            raise self.error


NO_SPACE, GONE = OSError(errno.ENOSPC, "No space left on device"), BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.fixture
def outcome(monkeypatch, capsys):
    """Return a function that runs an entry point as a command, and returns its exit code and its lines on standard error."""

    def outcome(entry, stdout=None):
        errors = io.StringIO()
        monkeypatch.setattr("sys.stderr", errors)
        if stdout is not None:
            monkeypatch.setattr("sys.stdout", stdout)
        try:
            command.call(entry)
        except SystemExit as ended:
            return ended.code, errors.getvalue().splitlines()
        return 0, errors.getvalue().splitlines()

    return outcome


def prints(done):
    def entry(words):
        print("± one")
        print("two", flush=True)
        done.append("worked to the end")

    return entry


@pytest.mark.parametrize("at", ["write", "flush"])
@pytest.mark.parametrize(
    "error", [NO_SPACE, OSError(errno.EIO, "I/O"), ValueError("I/O operation on closed file")]
)
def test_output_that_cannot_be_shown_ends_no_work_and_the_exit_code_tells(error, at, outcome):
    done = []
    code, lines = outcome(prints(done), Broken(error, at))
    assert done
    assert code == 2
    [line] = lines
    assert line.startswith("error: all is done, but standard output cannot be written: ")


@pytest.mark.parametrize("at", ["write", "flush"])
def test_a_reader_that_closes_our_output_ends_no_work_and_is_no_error(at, outcome):
    done = []
    assert outcome(prints(done), Broken(GONE, at)) == (0, [])
    assert done


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_characters_that_the_output_lacks_are_escaped(encoding, outcome):
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    code, lines = outcome(lambda words: print("0.5 ± 0.1 → 语"), shown)
    assert (code, lines) == (0, [])
    assert rb"\u8bed" in shown.buffer.getvalue()


@pytest.mark.parametrize("error", [NO_SPACE, GONE, ValueError("closed")])
def test_a_run_goes_on_when_its_lines_and_its_progress_cannot_be_shown(error, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", Broken(error))
    with Metrics(RunDir(tmp_path)) as metrics:
        metrics.say("a line")
        with metrics.progress("fit", 2, "updates") as advance:
            advance(2, loss=1.0)


def test_errors_that_cannot_be_shown_end_nothing(outcome, monkeypatch):
    def entry(words):
        sys.stderr = Broken(NO_SPACE)
        command.say("a line")

    assert outcome(entry) == (0, [])


ENDS = {
    "no space": (OSError(errno.ENOSPC, "No space left on device", "/a/file"), 2, "error: /a/file: No space left on device; make room"),
    "no permission": (PermissionError(errno.EACCES, "Permission denied", "/a"), 2, "error: /a: Permission denied; change"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "/a"), 2, "error: /a: Read-only file system; mount it"),
    "missing": (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a"), 2, "error: /a: No such file"),
    "no temporary directory": (
        FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), 2,
        "error: No usable temporary directory found in ['/tmp']; set TMPDIR",
    ),
    "too many files": (OSError(errno.EMFILE, "Too many open files"), 2, "error: Too many open files"),
    "memory": (MemoryError("Unable to allocate 9 GiB"), 2, "error: out of memory (Unable to allocate 9 GiB); lower"),
    "memory of a device": (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"), 2,
        "error: out of memory (RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes); lower",
    ),
    "bad input": (BadInput("a\nb"), 2, "error: a b"),
    "long input": (BadInput("x" * 10**6 + " and the advice"), 2, "error: xxx"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted; run the same command again"),
    "SIGTERM": (Terminated(), 143, "stopped by SIGTERM with all work on disk; run the same command again"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_a_command_is_one_line_and_an_exit_code(name, outcome):
    error, expected, said = ENDS[name]

    def entry(words):
        raise error

    code, lines = outcome(entry)
    assert code == expected
    [line] = lines
    assert line.startswith(said)
    assert len(line) < 7000
    assert name != "long input" or line.endswith("and the advice")


def test_a_command_that_keeps_nothing_does_not_speak_of_work_on_disk_or_of_resuming(monkeypatch, capsys):
    for error, line in ((Terminated(), "stopped by SIGTERM\n"), (KeyboardInterrupt(), "interrupted\n")):

        def entry(_words, error=error):
            raise error

        with pytest.raises(SystemExit):
            command.call(entry, resumes=False)
        assert capsys.readouterr().err == line


def test_a_requested_stop_has_the_exit_code_of_its_signal(outcome):
    def entry(words):
        stop = Terminated()
        stop.number = signal.SIGINT
        raise stop

    assert outcome(entry) == (
        130,
        ["stopped by Ctrl-C with all work on disk; run the same command again to resume"],
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ECONNRESET, "Connection reset by peer"),
        RuntimeError("a fault"),
        jax.errors.JaxRuntimeError("INTERNAL: x"),
    ],
)
def test_a_fault_of_ours_keeps_its_traceback(error, outcome):
    def entry(words):
        raise error

    with pytest.raises(type(error)):
        outcome(entry)


def test_a_deleted_working_directory_is_one_line(outcome, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, [line] = outcome(lambda words: os.getcwd())
    assert code == 2
    assert line.startswith("error: the working directory was deleted; go to another one")


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "sppo_jax.fit", "--help"],
        ["-W", "error", "-m", "sppo_jax.sampler"],
        ["-msppo_jax.man"],
        ["-m", "sppo_jax"],
    ],
)
def test_a_module_that_is_not_a_command_says_so_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as ended:
        command.check_module(["python", *words])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "is not a command" in line
    assert "commands are main, plan, evaluate, compare, judge, chat" in line
    assert ("did you mean sppo_jax.main?" in line) == ("man" in words[-1])


@pytest.mark.parametrize("module", ["sppo_jax.main", "sppo_jax.report", "sppo_jax.pairrm.sidecar", "pytest"])
def test_commands_and_the_processes_of_rooms_are_left_alone(module):
    command.check_module(["python", "-P", "-m", module, "-m", "sppo_jax.fit"])


def test_a_flag_that_is_not_known_names_the_nearest_before_one_that_is_missing():
    flags = command.Flags("sppo_jax.chat", "Talk.")
    flags.add_argument("--policy", required=True)
    with pytest.raises(BadInput, match=r"unknown flag --polcy; did you mean --policy\?"):
        flags.read(["--polcy=x"])


def test_a_word_of_thousands_of_characters_is_cut_in_its_line(outcome):
    def refuse(_words):
        raise BadInput(f"fit.eta is {'9' * 5001}; lower it")

    code, [line] = outcome(refuse)
    assert code == 2
    assert len(line) < 250
    assert line.endswith("(5002 characters) lower it")


SCRIPT = """
import contextlib, os, sys
from sppo_jax import command

def entry(words):
    with open(sys.argv[1], "w") as file:
        print("to standard output")
        with contextlib.suppress(OSError):
            os.write(1, b"by a library")
        file.write(f"data {file.fileno()} {sys.stdin.read()!r}")

command.call(entry)
"""


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("<&- >&- 2>&-", 2, ""),
        (">&-", 2, "Bad file descriptor"),
        ("> /dev/full </dev/null", 2, "No space left on device"),
        ("> /dev/full 2>&1", 2, ""),
    ],
)
def test_with_closed_or_full_streams_no_file_gets_their_output(shell, code, said, tmp_path):
    done = subprocess.run(
        ["bash", "-c", f"exec {sys.executable} -c '{SCRIPT}' {tmp_path / 'file'} {shell}"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == bool(said)
    name, number, read = (tmp_path / "file").read_text().split(" ", 2)
    assert (name, read) == ("data", "''")
    assert int(number) > 2


def test_ctrl_c_during_the_imports_of_a_command_is_one_line(tmp_path):
    slow = tmp_path / "numpy.py"  # in the place of a module that takes a while
    slow.write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n")
    done = subprocess.run(
        [sys.executable, "-m", "sppo_jax.main"], env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr == "interrupted\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_python_drops_ends_the_command_all_the_same(number, code, outcome):
    class Dropping:
        def __del__(self):
            os.kill(os.getpid(), number)
            for _ in range(1000):  # the handler runs here, and its exception goes nowhere
                pass

    def entry(_words):
        held = Dropping()
        del held
        time.sleep(10)

    began = time.monotonic()
    assert outcome(entry)[0] == code
    assert time.monotonic() - began < 5
