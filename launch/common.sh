# shellcheck shell=bash
# What the scripts of launch/ share. To be sourced.

usage() { # the comment at the top of the script
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

dry=
first_word() { # --help, no word at all, or --dry-run, after which the caller shifts
    case ${1:-} in
    '') usage >&2 && exit 2 ;;
    --help | -h) usage && exit 0 ;;
    --dry-run) dry=yes ;;
    esac
}

refuse() {
    echo "error: $1; see launch/${0##*/} --help" >&2
    exit 2
}

whole() { # whether $1 is a whole number from 1 to 9999
    case $1 in '' | 0* | *[!0-9]*) return 1 ;; *) [ "${#1}" -le 4 ] ;; esac
}

need() { # variables that must be set
    local name
    for name in "$@"; do
        [ -n "${!name:-}" ] || refuse "$name is not set"
    done
}

label() { # whether $1 can name things in Google Cloud and Kubernetes
    [[ $1 =~ ^[a-z]([-a-z0-9]{0,36}[a-z0-9])?$ ]]
}

run() { # the command; with --dry-run it is only printed
    if [ -n "$dry" ]; then
        printf '%q' "$1"
        printf ' %q' "${@:2}"
        echo
    else
        "$@"
    fi
}

startup_script() { # of a TPU VM: for $1, the directory of launch/, $2, the image, and the words of sppo_jax.main
    echo '#!/usr/bin/env bash'
    printf 'image=%q\nwords=(' "$2"
    printf '%q ' "${@:3}"
    printf ')\n\n'
    cat "$1/tpu_startup.sh"
}
