#!/usr/bin/env bash
# Plays one run on a TPU slice of Compute Engine, a managed instance group (v5p, v6e, TPU7x; v5e has tpu_queued.sh):
#
#     PROJECT=ID ZONE=ZONE IMAGE=IMAGE launch/tpu_mig.sh [--dry-run] create --config FILE --out gs://BUCKET/run
#     PROJECT=ID ZONE=ZONE launch/tpu_mig.sh [--dry-run] delete
#
# create    makes the slice; each of its VMs runs the command as its start-up script, and again after an interruption
# again     asks for the VMs anew, after they were taken away: the run resumes
# state     lists the VMs
# delete    gives the slice back: do that when the run is done
#
# IMAGE     of launch/Dockerfile.tpu, pushed to a registry that the VMs can read
# MACHINE   a VM of the slice (ct6e-standard-4t; v5p: ct5p-hightpu-4t, TPU7x: tpu7x-standard-4t)
# TOPOLOGY  of its chips (4x4; v5p and TPU7x have three numbers: 2x2x4)
# NAME      of the slice, lower case (sppo)
# MODE      SPOT (default), STANDARD (on demand), or RESERVATION_BOUND with RESERVATION=NAME
#
# A VM starts the command again after every exit code but 0, 1 and 2. What Python says is read on a VM with
# `journalctl --unit=sppo`.

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
region=${ZONE%-*}
machine=${MACHINE:-ct6e-standard-4t}
topology=${TOPOLOGY:-4x4}
[[ $machine =~ -([0-9]+)t$ ]] || refuse "MACHINE=$machine must end in its number of chips, as ct6e-standard-4t does"
chips=${BASH_REMATCH[1]}
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || refuse "TOPOLOGY=$topology must be like 4x4 or 2x2x4"
all=$((${topology//x/*}))
[ $((all % chips)) -eq 0 ] || refuse "TOPOLOGY=$topology has $all chips, not a multiple of the $chips of MACHINE=$machine"
vms=$((all / chips))
case $machine in
tpu7x-*) family=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
*) family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
esac
mode=(--provisioning-model="${MODE:-SPOT}")
case ${MODE:-SPOT} in
SPOT) mode+=(--instance-termination-action=DELETE) ;;
STANDARD) ;;
RESERVATION_BOUND)
    need RESERVATION
    mode+=(--instance-termination-action=DELETE --reservation-affinity=specific --reservation="$RESERVATION")
    ;;
*) refuse "MODE=$MODE must be SPOT, STANDARD or RESERVATION_BOUND" ;;
esac

resize() {
    run gcloud compute instance-groups managed resize "$name" --project="$PROJECT" --zone="$ZONE" --size="$1"
}

case $action in
create)
    need IMAGE
    [ $# -gt 0 ] || refuse "nothing to run: give --config FILE"
    startup=$(mktemp "${TMPDIR:-/tmp}/sppo-startup.XXXXXX")
    trap 'rm -f "$startup"' EXIT
    startup_script "$here" "$IMAGE" "$@" >"$startup"
    run gcloud compute resource-policies create workload-policy "$name" --project="$PROJECT" --region="$region" \
        --type=HIGH_THROUGHPUT --accelerator-topology="$topology"
    run gcloud compute instance-templates create "$name" --project="$PROJECT" --machine-type="$machine" \
        --image-project=ubuntu-os-accelerator-images --image-family="$family" --boot-disk-size=200GB \
        --maintenance-policy=TERMINATE --scopes=cloud-platform "${mode[@]}" \
        --metadata-from-file=startup-script="$startup"
    # A slice is whole or useless: bulk gives all VMs or none, and no single one is repaired.
    run gcloud compute instance-groups managed create "$name" --project="$PROJECT" --zone="$ZONE" \
        --template="$name" --size="$vms" --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing \
        --workload-policy="projects/$PROJECT/regions/$region/resourcePolicies/$name"
    if [ -n "$dry" ]; then
        echo "# the start-up script:"
        cat "$startup"
    fi
    ;;
again)
    resize 0
    run gcloud compute instance-groups managed wait-until "$name" --project="$PROJECT" --zone="$ZONE" --stable
    resize "$vms"
    ;;
state)
    run gcloud compute instance-groups managed list-instances "$name" --project="$PROJECT" --zone="$ZONE"
    ;;
delete)
    run gcloud compute instance-groups managed delete "$name" --project="$PROJECT" --zone="$ZONE" --quiet
    run gcloud compute instance-templates delete "$name" --project="$PROJECT" --quiet
    run gcloud compute resource-policies delete "$name" --project="$PROJECT" --region="$region" --quiet
    ;;
*) refuse "unknown action '$action': create, again, state or delete" ;;
esac
