"""What the files of launch/ may say: fields and types of Kubernetes and SkyPilot, flags of commands, as published in 2026.

A schema is a type, a tuple of the only values, a list with the schema of its items, or a dict: of field → schema, where "!"
after a field's name says that it is required, or {"*": schema} for fields of any name.
"""

import re
from typing import Any

ENV = [
    {"name!": str, "value": str, "valueFrom": {"secretKeyRef": {"name": str, "key!": str, "optional": bool}}}
]
CONTAINER = {
    "name!": str,
    "image": str,
    "command": [str],
    "args": [str],
    "workingDir": str,
    "env": ENV,
    "securityContext": {"privileged": bool},
    "resources": {"limits": {"*": int}, "requests": {"*": int}},
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool}],
}
POD = {  # core/v1 PodSpec
    "containers!": [CONTAINER],
    "restartPolicy": ("Never", "OnFailure", "Always"),
    "nodeSelector": {"*": str},
    "tolerations": [{"key": str, "operator": ("Exists", "Equal"), "value": str, "effect": str}],
    "hostNetwork": bool,
    "dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "priorityClassName": str,
    "volumes": [{"name!": str, "emptyDir": {"medium": str, "sizeLimit": str}}],
}
META = {"name": str, "namespace": str, "labels": {"*": str}, "annotations": {"*": str}}
EXIT_CODES = {"containerName": str, "operator!": ("In", "NotIn"), "values!": [int]}
JOB = {  # batch/v1 JobSpec
    "parallelism": int,
    "completions": int,
    "completionMode": ("Indexed", "NonIndexed"),
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "podFailurePolicy": {
        "rules!": [
            {
                "action!": ("FailJob", "Ignore", "Count", "FailIndex"),
                "onExitCodes": EXIT_CODES,
                "onPodConditions": [{"type!": str, "status": str}],
            }
        ]
    },
    "template!": {"metadata": META, "spec": POD},
}
JOBSET = {
    "apiVersion!": ("jobset.x-k8s.io/v1alpha2",),
    "kind!": ("JobSet",),
    "metadata!": META,
    "spec!": {
        "replicatedJobs": [
            {"name!": str, "replicas": int, "groupName": str, "template!": {"metadata": META, "spec!": JOB}}
        ],
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "successPolicy": {"operator!": ("All", "Any"), "targetReplicatedJobs": [str]},
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": ("Recreate", "BlockingRecreate", "InPlaceRestart"),
            "rules": [
                {
                    "name": str,
                    "action!": (
                        "FailJobSet",
                        "RestartJobSet",
                        "RestartJobSetAndIgnoreMaxRestarts",
                        "RestartJob",
                    ),
                    "targetReplicatedJobs": [str],
                    "onJobFailureReasons": [
                        (
                            "BackoffLimitExceeded",
                            "DeadlineExceeded",
                            "FailedIndexes",
                            "MaxFailedIndexesExceeded",
                            "PodFailurePolicy",
                        )
                    ],
                }
            ],
        },
        "suspend": bool,
        "managedBy": str,
        "ttlSecondsAfterFinished": int,
    },
}
SKYPILOT = {
    "name": str,
    "workdir": str,
    "num_nodes": int,
    "resources": {
        "infra": str,
        "accelerators": str,
        "accelerator_args": {
            "runtime_version": str,
            "tpu_name": str,
            "tpu_vm": bool,
            "gcp_queued_resource": bool,
        },
        "use_spot": bool,
        "job_recovery": {"strategy": str, "max_restarts_on_errors": int, "recover_on_exit_codes": [int]},
        "disk_size": int,
        "image_id": str,
        "labels": {"*": str},
    },
    "envs": {"*": str},
    "secrets": {"*": str},
    "file_mounts": {"*": str},
    "setup": str,
    "run": str,
}

PLACE = {"project", "zone"}
GROUP = "gcloud compute instance-groups managed"
FLAGS = {  # the flags in use, all of which the command's reference has
    "gcloud compute tpus queued-resources create": PLACE
    | {"node-id", "accelerator-type", "runtime-version", "valid-until-duration", "spot", "reserved"}
    | {"metadata-from-file", "scopes"},
    "gcloud compute tpus queued-resources delete": PLACE | {"force", "quiet"},
    "gcloud compute tpus queued-resources describe": PLACE | {"format"},
    "gcloud compute tpus tpu-vm ssh": PLACE | {"worker", "command"},
    "gcloud compute resource-policies create workload-policy": {"project", "region", "type"}
    | {"accelerator-topology"},
    "gcloud compute resource-policies delete": {"project", "region", "quiet"},
    "gcloud compute instance-templates create": {"project", "machine-type", "image-project", "image-family"}
    | {"boot-disk-size", "maintenance-policy", "scopes", "provisioning-model", "instance-termination-action"}
    | {"reservation-affinity", "reservation", "metadata-from-file"},
    "gcloud compute instance-templates delete": {"project", "quiet"},
    f"{GROUP} create": PLACE
    | {"template", "size", "target-size-policy-mode", "default-action-on-vm-failure", "workload-policy"},
    f"{GROUP} resize": PLACE | {"size"},
    f"{GROUP} wait-until": PLACE | {"stable"},
    f"{GROUP} list-instances": PLACE,
    f"{GROUP} delete": PLACE | {"quiet"},
    "xpk workload create": {
        "cluster",
        "project",
        "zone",
        "workload",
        "tpu-type",
        "num-slices",
        "docker-image",
    }
    | {"max-restarts", "termination-grace-period-seconds", "command"},
}
SBATCH = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "exclusive": "",
    "time": r"\d+:\d\d:\d\d",
    "signal": r"(B:)?[A-Z]+@\d+",
    "requeue": "",
    "open-mode": "append|truncate",
    "output": r"[\w%/.-]+",
}


def check(value: Any, schema: Any, path: str = "") -> None:
    """Raises ValueError where `value` has an unknown or missing field, a wrong type or a wrong value."""
    if isinstance(schema, tuple):
        fine = value in schema
    elif isinstance(schema, type):
        fine = type(value) is schema
    else:
        fine = isinstance(value, type(schema))
    if not fine:
        raise ValueError(f"{path}: {value!r}, expected {schema!r}")
    if isinstance(schema, list):
        for i, item in enumerate(value):
            check(item, schema[0], f"{path}[{i}]")
    if isinstance(schema, dict):
        fields = {name.rstrip("!"): kind for name, kind in schema.items()}
        if missing := {name[:-1] for name in schema if name.endswith("!")} - value.keys():
            raise ValueError(f"{path}: without {missing}")
        for name, item in value.items():
            if name not in fields and "*" not in fields:
                raise ValueError(f"{path}.{name}: unknown field")
            check(item, fields.get(name, fields.get("*")), f"{path}.{name}")


def check_command(words: list[str]) -> None:
    """Raises ValueError where a command has a flag that it does not know."""
    known = [command for command in FLAGS if " ".join(words).startswith(f"{command} ")]
    if not known:
        raise ValueError(f"unknown command {words}")
    for word in words[len(known[0].split()) :]:
        if word.startswith("-") and not (
            word.startswith("--") and word[2:].partition("=")[0] in FLAGS[known[0]]
        ):
            raise ValueError(f"{known[0]}: unknown flag {word}")


def check_sbatch(text: str) -> dict[str, str]:
    """Returns the options of a batch script. Raises ValueError for one that sbatch would not read."""
    head, _, rest = text.partition("\n\n")
    if re.search("^#SBATCH", rest, re.MULTILINE) or not all(
        line.startswith("#") for line in head.splitlines()
    ):
        raise ValueError("sbatch stops reading at the first command")
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", head, re.MULTILINE))
    if len(options) != head.count("#SBATCH --"):
        raise ValueError("an option twice, or one that is no option")
    for name, value in options.items():
        if name not in SBATCH or not re.fullmatch(SBATCH[name], value):
            raise ValueError(f"--{name}={value}")
    return options
