# shellcheck shell=bash
# What a TPU VM runs at every boot, below the lines `image=…` and `words=(…)` that tpu_mig.sh and tpu_queued.sh write
# above it. It is a unit of systemd, which starts the container again, except after exit codes 0 (done), 1 (a fault) and 2
# (bad input). SIGTERM, at a preemption for instance, goes through `docker run` to Python.
# Read it on the VM: journalctl --unit=sppo

# shellcheck disable=SC2154
: "${image:?}" "${words[0]:?}"

command -v docker >/dev/null || { apt-get update && apt-get install --yes docker.io; }
case $image in
*/*/*) gcloud auth configure-docker "${image%%/*}" --quiet || true ;; # a registry's own host, not a public image
esac
systemctl stop sppo 2>/dev/null || true

# The unit ends before docker does, when the machine goes down. No shell stands between docker and Python, since it would
# keep SIGTERM to itself. systemd reads $$ as $. /mnt is there for shared directories.
exec systemd-run --unit=sppo --collect \
    --property=After=docker.service \
    --property=Restart=on-failure --property=RestartSec=10 --property=StartLimitIntervalSec=0 \
    --property='RestartPreventExitStatus=1 2' \
    --property=KillMode=mixed --property=TimeoutStopSec=120 \
    --property='ExecStartPre=-/usr/bin/env docker rm --force sppo' \
    docker run --rm --name=sppo --init --stop-timeout=120 --privileged --network=host --volume=/mnt:/mnt \
    --env=JAX_COORDINATOR_PORT=8476 --entrypoint=python \
    "$image" -m sppo_jax.main "${words[@]//\$/\$\$}"
