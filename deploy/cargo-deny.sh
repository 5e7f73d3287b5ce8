#!/usr/bin/env bash
# Checks the dependencies with cargo-deny: licences, bans and sources always, advisories where RustSec's database is there.
# Builds cargo-deny once into $DISTILLERY_CACHE where it is not installed. Where the database cannot be reached, that is said
# loudly and is no failure: advisories change with the day, not with the code.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=0.20.2
cache=${DISTILLERY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/distillery}
root=$cache/cargo-deny-$version

if command -v cargo-deny >/dev/null; then
    deny=cargo-deny
else
    deny=$root/bin/cargo-deny
    if [[ ! -x $deny ]]; then
        echo "building cargo-deny $version into $root" >&2
        cargo install cargo-deny --version "$version" --locked --no-default-features --root "$root.partial" >&2
        # A folder appears whole or not at all.
        mkdir -p "$cache"
        rm -rf "$root"
        mv "$root.partial" "$root"
    fi
fi

"$deny" --locked check bans licenses sources

# Fetched into cargo-deny's own cache; without a network that takes a minute to fail.
if GIT_TERMINAL_PROMPT=0 timeout 60 "$deny" fetch db >/dev/null 2>&1; then
    "$deny" --locked check --disable-fetch advisories
else
    echo "WARNING: RustSec's database cannot be reached: advisories were NOT checked" >&2
fi
