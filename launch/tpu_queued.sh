#!/usr/bin/env bash
# Plays one run on a TPU slice that is asked for as a queued resource, the way to v5e VMs (v5p and v6e have tpu_mig.sh):
#
#     PROJECT=ID ZONE=ZONE IMAGE=IMAGE launch/tpu_queued.sh [--dry-run] create --config FILE --out gs://BUCKET/run
#     PROJECT=ID ZONE=ZONE launch/tpu_queued.sh [--dry-run] delete
#
# create    asks for the slice; each of its VMs runs the command as its start-up script, and again after an interruption
# keep      the same, and then looks every LOOK seconds: a slice that was taken away is asked for again, until interrupted
# state     prints the state: WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED (taken away) or FAILED
# log       prints what process 0 has said
# delete    gives the slice back: do that when the run is done
#
# IMAGE     of launch/Dockerfile.tpu, pushed to a registry that the VMs can read
# TPU       the kind of slice (v5litepod-16)
# RUNTIME   of its VMs (v2-alpha-tpuv5-lite; v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e)
# NAME      of the slice, lower case (sppo)
# MODE      --spot (default), --reserved, or empty for on demand
# VALID     how long to wait for the slice (6h)
# LOOK      seconds between two looks of keep (60)
#
# A VM starts the command again after every exit code but 0, 1 and 2.

set -eu
here=$(dirname "$0")
# shellcheck source=launch/common.sh
. "$here/common.sh"

first_word "$@"
[ -z "$dry" ] || shift
action=${1:-}
[ $# -eq 0 ] || shift
name=${NAME:-sppo}
label "$name" || refuse "NAME=$name must be lower-case letters, digits and hyphens, 38 at most"
need PROJECT ZONE
place=(--project="$PROJECT" --zone="$ZONE")
mode=${MODE---spot}
case $mode in '' | --spot | --reserved) ;; *) refuse "MODE=$mode must be --spot, --reserved or empty" ;; esac

create() {
    run gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" \
        --accelerator-type="${TPU:-v5litepod-16}" --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" \
        --valid-until-duration="${VALID:-6h}" ${mode:+"$mode"} --scopes=https://www.googleapis.com/auth/cloud-platform \
        --metadata-from-file=startup-script="$startup"
}

delete() {
    run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

state() {
    run gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)'
}

case $action in
create | keep)
    need IMAGE
    [ $# -gt 0 ] || refuse "nothing to run: give --config FILE"
    startup=$(mktemp "${TMPDIR:-/tmp}/sppo-startup.XXXXXX")
    trap 'rm -f "$startup"' EXIT
    startup_script "$here" "$IMAGE" "$@" >"$startup"
    create
    if [ -n "$dry" ]; then
        echo "# the start-up script:"
        cat "$startup"
        exit
    fi
    while [ "$action" = keep ]; do
        sleep "${LOOK:-60}"
        found=$(state) || continue # asked again at the next look
        echo "$name: $found"
        case $found in
        SUSPENDED | FAILED)
            delete
            create
            ;;
        esac
    done
    ;;
state) state ;;
log)
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=0 --command='sudo journalctl --unit=sppo --output=cat'
    ;;
delete) delete ;;
*) refuse "unknown action '$action': create, keep, state, log or delete" ;;
esac
