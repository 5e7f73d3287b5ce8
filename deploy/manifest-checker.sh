#!/usr/bin/env bash
# Installs kubernetes-validate, which holds the schemas of Kubernetes' API, and prints, for a shell, where it is:
#
#   DISTILLERY_KUBERNETES_VALIDATE=/…/kubernetes-validate      needs python3 with venv
#
# If it cannot be had, `make manifests` fails, unless it is told to do without: MANIFESTS=--without-schemas.
# With DISTILLERY_REQUIRE_SERVERS=1 that is an error.
set -euo pipefail

readonly VERSION=1.37.0

readonly CACHE=${DISTILLERY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/distillery}

say() { echo "manifest-checker: $*" >&2; }

install() { python3 -m venv "$1" && "$1/bin/pip" --disable-pip-version-check install --quiet "kubernetes-validate==$VERSION"; }

mkdir -p "$CACHE"
exec 9>"$CACHE/manifest-checker.lock"
flock 9 # clones share the folder

folder=$CACHE/kubernetes-validate-$VERSION
# A venv cannot be moved, so a stamp, written last, tells a whole folder from a broken one.
if [ ! -e "$folder/installed" ]; then
    say "installing $(basename "$folder")"
    rm -rf "$folder"
    mkdir -p "$folder"
    if ! { install "$folder" >&2 && touch "$folder/installed"; }; then
        if [ "${DISTILLERY_REQUIRE_SERVERS:-0}" = 1 ]; then
            say "error: kubernetes-validate could not be installed, and DISTILLERY_REQUIRE_SERVERS=1"
            exit 1
        fi
        say "WARNING: kubernetes-validate could not be installed (Debian: apt-get install python3-venv): manifests can NOT be held against the API's schemas"
        exit 0
    fi
fi
printf 'DISTILLERY_KUBERNETES_VALIDATE=%q\n' "$folder/bin/kubernetes-validate"
