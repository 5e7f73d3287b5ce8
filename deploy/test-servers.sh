#!/usr/bin/env bash
# Installs the object-storage servers that the storage tests start on loopback, and prints, for a shell, where they are:
#
#   DISTILLERY_MOTO=/…/moto_server          the S3 API; needs python3 with venv
#   DISTILLERY_AZURITE=/…/azurite-blob      the Azure API; needs npm
#
# A server that cannot be had is left out with a warning, and the tests then skip that backend and say so.
# With DISTILLERY_REQUIRE_SERVERS=1 that is an error, except that Azurite is not asked for where there is no npm.
set -euo pipefail

readonly MOTO_VERSION=5.2.1
readonly AZURITE_VERSION=3.35.0

readonly CACHE=${DISTILLERY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/distillery}

say() { echo "test-servers: $*" >&2; }

missing() {
    if [ "${DISTILLERY_REQUIRE_SERVERS:-0}" = 1 ]; then
        say "error: $*, and DISTILLERY_REQUIRE_SERVERS=1"
        exit 1
    fi
    say "WARNING: $*: tests of this backend will be SKIPPED"
}

install_moto() { python3 -m venv "$1" && "$1/bin/pip" --disable-pip-version-check install --quiet "moto[server]==$MOTO_VERSION"; }

install_azurite() { npm install --prefix "$1" --no-audit --no-fund --no-update-notifier --loglevel=error "azurite@$AZURITE_VERSION"; }

# installed FOLDER INSTALLER: a venv cannot be moved, so a stamp, written last, tells a whole folder from a broken one.
installed() {
    local folder=$1 installer=$2
    [ ! -e "$folder/installed" ] || return 0
    say "installing $(basename "$folder")"
    rm -rf "$folder"
    mkdir -p "$folder"
    "$installer" "$folder" >&2 && touch "$folder/installed"
}

mkdir -p "$CACHE"
exec 9>"$CACHE/test-servers.lock"
flock 9 # clones share the folders

moto=$CACHE/moto-$MOTO_VERSION
if installed "$moto" install_moto; then
    printf 'DISTILLERY_MOTO=%q\n' "$moto/bin/moto_server"
else
    missing "moto could not be installed (Debian: apt-get install python3-venv)"
fi

azurite=$CACHE/azurite-$AZURITE_VERSION
if ! command -v npm >/dev/null; then
    say "WARNING: no npm, so no Azurite: tests of the Azure backend will be SKIPPED"
elif installed "$azurite" install_azurite; then
    printf 'DISTILLERY_AZURITE=%q\n' "$azurite/node_modules/.bin/azurite-blob"
else
    missing "Azurite could not be installed"
fi
