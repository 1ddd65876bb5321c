"""Stubs of commands, for the tests of launch/."""

import time


def executable(path, text):
    """Write a script, and return its path."""
    path.write_text(text)
    path.chmod(0o755)
    return path


def wait_for(condition):
    """Wait until `condition()` is true, 10 seconds at most."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
