#!/usr/bin/env bash
# Plays one run on a GKE cluster made by `xpk cluster create`:
#
#     CLUSTER=NAME PROJECT=ID ZONE=ZONE IMAGE=IMAGE launch/xpk.sh [--dry-run] --config FILE --out gs://BUCKET/run
#
# IMAGE     of launch/Dockerfile.tpu, pushed to a registry that the cluster can read
# TPU       the kind of slice (v5litepod-16)
# SLICES    their number (1)
# NAME      of the workload, lower case (sppo)
# RESTARTS  how often it may be started again (50)
#
# xpk starts it again after exit codes from 127 to 255 (stopped, killed, a process lost), and not after 1 and 2. All
# arguments go to python -m sppo_jax.main. --dry-run prints the command. Stop it with:
#
#     xpk workload delete --cluster=NAME --project=ID --zone=ZONE --workload=sppo

set -eu
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

first_word "$@"
[ -z "$dry" ] || shift
need CLUSTER PROJECT ZONE IMAGE
name=${NAME:-sppo}
label "$name" || refuse "NAME=$name must be lower-case letters, digits and hyphens, 38 at most"
whole "${SLICES:-1}" || refuse "SLICES=$SLICES must be a whole number from 1 to 9999"
whole "${RESTARTS:-50}" || refuse "RESTARTS=$RESTARTS must be a whole number from 1 to 9999"
[ $# -gt 0 ] || refuse "nothing to run: give --config FILE"

# Without exec, a shell of the container would take the SIGTERM.
command="export JAX_COORDINATOR_PORT=8476; exec python -m sppo_jax.main$(printf ' %q' "$@")"
run xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" --workload="$name" \
    --tpu-type="${TPU:-v5litepod-16}" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
    --max-restarts="${RESTARTS:-50}" --termination-grace-period-seconds=120 --command="$command"
