"""The hub, replaced by a stub on this machine: files that are fetched, pinned commits, and one line for each failure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sppo_jax import models, pairrm
from sppo_jax.errors import BadInput
from sppo_jax.hub import environment, names, repositories
from tests import hub_stub, xla_flags
from tests.small_game import words

PROGRAM = """
import json, sys
from sppo_jax import command
from sppo_jax.hub import repositories
def entry(words):
    if words[0] == "late":  # the environment changes after huggingface_hub has read it
        import os, huggingface_hub.constants
        os.environ |= {"HF_HUB_OFFLINE": "1"}
        words = words[1:]
    found = repositories.fetch(*words)
    print(json.dumps([str(found.directory), found.name, found.revision]))
command.call(entry)
"""


@pytest.fixture
def hub():
    with hub_stub.serving() as hub:
        yield hub


@pytest.fixture
def files():
    return {path.name: path.read_bytes() for path in names.path("policy").iterdir()}


@pytest.fixture
def ask(hub, tmp_path):
    """Return a function that runs fetch in a new process, as huggingface_hub reads the environment at import."""

    def ask(*words, code=0, **env):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words],
            env=hub_stub.environment(hub, tmp_path / "home", **env),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        if code == 0:
            directory, name, revision = json.loads(done.stdout)
            return Path(directory), name, revision, done.stderr
        line = done.stderr.splitlines()[-1]
        assert line.startswith("error: ")
        assert "Traceback" not in done.stderr
        return line

    return ask


def test_a_name_becomes_a_directory_of_what_is_read_and_nothing_else(hub, files, ask):
    unread = {
        "pytorch_model.bin": b"pickle",
        "training_args.pt": b"pickle",
        "modeling_tiny.py": b"code",
        "consolidated.safetensors": b"the same again",
        "original/consolidated.00.safetensors": b"the same again",
        "original/config.json": b"{}",
        "onnx/model.safetensors": b"the same again",
        "additional/tool_use.jinja": b"of something else",
        "README.md": b"text",
    }
    files |= {"LICENSE.txt": b"terms", "NOTICE": b"notice", "USE_POLICY.md": b"policy"}
    files |= {f"{repositories.TEMPLATES}/{name}.jinja": b"{{ messages }}" for name in ("rag", "tool_use")}
    commit = hub.add("owner/tiny", files | unread)
    directory, name, revision, log = ask("owner/tiny", HF_TOKEN="hf_secret")
    assert (name, revision) == ("owner/tiny", commit)
    found = [p for p in directory.rglob("*") if p.is_file()]
    assert {str(p.relative_to(directory)): p.read_bytes() for p in found} == files
    sent = [{k.lower(): v for k, v in h.items()} for _, path, h in hub.seen if "owner/tiny" in path]
    assert {headers.get("authorization") for headers in sent} == {"Bearer hf_secret"}
    assert log.splitlines() == [
        "owner/tiny: from the hub, revision main; files that are here already are not fetched again",
        f"owner/tiny: revision {commit} in {directory}",
    ]


def test_a_pinned_commit_stays_when_main_moves_on(hub, files, ask):
    first = hub.add("owner/tiny", files)
    assert ask("owner/tiny")[2] == first
    second = hub.add("owner/tiny", files | {"config.json": files["config.json"] + b"\n"})
    hub.seen.clear()
    directory, _, revision, _ = ask("owner/tiny", first)
    assert revision == first
    assert (directory / "config.json").read_bytes() == files["config.json"]
    assert hub.fetched() == []
    assert ask(f"owner/tiny@{first}")[2] == first
    assert ask("owner/tiny@main", first)[2] == first
    assert ask("owner/tiny")[2] == second
    assert hub.fetched() == ["config.json"]


def test_offline_the_cache_serves_and_says_what_it_has_not(hub, files, ask):
    commit = hub.add("owner/tiny", files)
    line = ask("owner/tiny", code=2, HF_HUB_OFFLINE="1")
    assert "neither a directory here nor complete in the hub's cache, and HF_HUB_OFFLINE forbids" in line
    directory, *_ = ask("owner/tiny")
    hub.seen.clear()
    for name in ("owner/tiny", f"owner/tiny@{commit}"):
        assert ask(name, HF_HUB_OFFLINE="1")[:3] == (directory, "owner/tiny", commit)
    assert ask("late", "owner/tiny")[:3] == (directory, "owner/tiny", commit)
    assert hub.seen == []
    assert f"at revision {'0' * 40}" in ask("owner/tiny", "0" * 40, code=2, HF_HUB_OFFLINE="1")


def test_a_download_that_breaks_off_is_taken_up_where_it_was(hub, files, ask):
    large = files | {
        "model.safetensors": bytes(range(256)) * 100_000
    }  # more than one of the client's chunks of 10 MiB
    hub.add("owner/tiny", large)
    hub.broken = {"model.safetensors": 15_000_000}
    directory, *_ = ask("owner/tiny")
    assert (directory / "model.safetensors").read_bytes() == large["model.safetensors"]
    ranges = [
        h["Range"] for m, p, h in hub.seen if m == "GET" and "Range" in h and p.endswith(".safetensors")
    ]
    assert ranges == ["bytes=10485760-"]


def test_after_a_broken_download_complete_files_are_not_fetched_again(hub, files, ask):
    hub.add("owner/tiny", files)
    hub.broken, hub.reset = {"model.safetensors": 1_000_000}, True
    line = ask("owner/tiny", code=2)
    assert f"the connection to {hub.url} broke" in line
    assert "run again, what is complete is kept" in line
    complete = set(hub.fetched()) - {"model.safetensors"}
    assert complete
    hub.seen.clear()
    directory, *_ = ask("owner/tiny")
    assert (directory / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert "model.safetensors" in hub.fetched()
    # Files that had not begun when the connection broke are fetched now, and no file is fetched twice.
    assert not complete & set(hub.fetched())


REPO_NOT_FOUND = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (401, REPO_NOT_FOUND, "nor a public repository on the hub (401); for a private one log in (hf auth login)"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "refuses your credentials (401)"),
        (401, {"X-Error-Code": "GatedRepo"}, "gated (401): accept its licence at "),
        (403, {"X-Error-Message": "Forbidden"}, "your account or token may not read it (403)"),
        (404, REPO_NOT_FOUND, "neither a directory here nor a repository on the hub (404)"),
        (500, {}, "the hub answers 500; try again later"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line(hub, ask, status, headers, said):
    hub.refused["owner/tiny"] = status, headers
    line = ask("owner/tiny", code=2, HF_TOKEN="hf_secret")
    assert said in line
    assert "hf_secret" not in line


def test_a_gated_model_whose_files_are_refused_names_the_page_with_its_licence(hub, files, ask):
    hub.add("owner/tiny", files)
    hub.gated.add("owner/tiny")
    line = ask("owner/tiny", code=2)
    assert f"gated (403): accept its licence at {hub.url}/owner/tiny, then log in (hf auth login)" in line


def test_an_unknown_revision_is_named(hub, files, ask):
    hub.add("owner/tiny", files)
    assert "the hub has no revision v9" in ask("owner/tiny@v9", code=2)


def test_no_network_is_one_line_without_the_credentials_of_the_address(hub, ask):
    line = ask("owner/tiny", code=2, HF_ENDPOINT="http://user:secret@127.0.0.1:9")
    assert "there is no connection to http://127.0.0.1:9" in line
    assert "secret" not in line


def test_a_repository_of_pickles_says_how_to_convert_it(hub, files, ask):
    del files["model.safetensors"]
    hub.add("owner/tiny", files | {"pytorch_model.bin": b"pickle"})
    line = ask("owner/tiny", code=2)
    assert "owner/tiny: has no safetensors weights" in line
    assert "from_pretrained('owner/tiny').save_pretrained('DIR')" in line
    assert "pytorch_model.bin" not in hub.fetched()


def test_a_directory_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/tiny").mkdir(parents=True)
    found = repositories.fetch("owner/tiny")
    assert (found.directory, found.name, found.revision) == (
        Path("owner/tiny"),
        "owner/tiny",
        None,
    )


@pytest.mark.parametrize(
    "name", ["nowhere", "a/b/c", "../x", "a/..", "a/b..c", "/nowhere/x", "a/b c", "a/\x1b[1m", "", "a/b@", "a/b@../x",
             "a/b@x y", "-a/b", "a/b--c", "a" * 5000, "a/" + "b" * 5000],
)  # fmt: skip
def test_a_bad_name_is_refused_before_anybody_is_asked(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a place where no name is a directory by chance
    monkeypatch.setattr(environment, "endpoint", lambda: "http://127.0.0.1:9")
    monkeypatch.setattr(environment, "offline", lambda: False)
    with pytest.raises(BadInput, match=r"not a name on the hub|is not a revision|File name too long"):
        repositories.fetch(name)


def test_a_run_keeps_the_commit_that_it_was_begun_with(hub, files, tmp_path):
    """The manifest pins the commit: `main` moves between two iterations, and the run keeps its commit."""
    begun = hub.add("owner/policy", files)
    out = tmp_path / "run"

    def play(iterations):
        line = words(out, model__path="owner/policy", iterations=iterations)
        done = subprocess.run(
            [sys.executable, "-m", "sppo_jax.main", *line], env=hub_stub.environment(hub, tmp_path / "cache", XLA_FLAGS=xla_flags.devices(1)), capture_output=True, text=True, timeout=300
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    play(1)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"] == {"name": "owner/policy", "revision": begun, "template": {}}
    hub.add("owner/policy", files | {"generation_config.json": b'{"eos_token_id": 7}'})
    play(2)
    assert json.loads((out / "manifest.json").read_text())["model"]["revision"] == begun
    assert (out / "iter_2/eval.json").exists()
    assert "base_model: owner/policy" in (out / "iter_2/export/README.md").read_text()


LOADS = """
import json, sys
import numpy as np
from sppo_jax import models, pairrm

if __name__ == "__main__":
    policies, judges = json.loads(sys.argv[1])
    norms = [np.asarray(models.load(name).norm[...]).tolist() for name in policies]
    opened = [pairrm.load(name, "jax", tell=lambda line: None) for name in judges]
    print(json.dumps([norms, [[judge.identity, judge.sources] for judge in opened]]))
"""


def test_models_and_judges_are_loaded_by_every_name_that_the_command_line_takes(hub, files, tmp_path):
    judge_files = {path.name: path.read_bytes() for path in names.path("pairrm").iterdir()}
    hub.add("owner/policy", files)
    pinned = hub.add("owner/judge", judge_files)
    hub.add("owner/judge", judge_files | {"config.json": b"{}"})
    policies = ["embedded:policy", str(names.path("policy")), "owner/policy"]
    judges = ["embedded:pairrm", str(names.path("pairrm")), f"owner/judge@{pinned}"]
    done = subprocess.run(
        [sys.executable, "-c", LOADS, json.dumps([policies, judges])],
        env=hub_stub.environment(hub, tmp_path / "home"),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    norms, identities = json.loads(done.stdout)
    assert len(norms[0]) > 1
    assert norms[0] == norms[1] == norms[2]
    assert len({identity for identity, _ in identities}) == 1
    assert [sources for _, sources in identities] == [{}, {}, {"owner/judge": pinned}]


@pytest.mark.parametrize("load", [models.load, pairrm.load])
def test_a_name_that_is_not_embedded_is_refused_with_the_names_that_are(load):
    with pytest.raises(BadInput, match="embedded:nobody: not embedded; there are: pairrm, policy, prompts"):
        load("embedded:nobody")
