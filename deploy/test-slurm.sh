#!/usr/bin/env bash
# Installs what `make test-slurm` brings a cluster up with: Slurm's daemons and clients, munge, and tools for namespaces.
# Starts nothing, and writes nothing outside of the packages. With DISTILLERY_REQUIRE_SLURM=1 it is an error when they
# cannot be had; otherwise the tests are skipped, and say so.
set -euo pipefail

say() { echo "test-slurm: $*" >&2; }

missing() {
    if [ "${DISTILLERY_REQUIRE_SLURM:-0}" = 1 ]; then
        say "error: $*, and DISTILLERY_REQUIRE_SLURM=1"
        exit 1
    fi
    say "WARNING: $*: tests on a real Slurm will be SKIPPED"
    exit 0
}

# program:package
needed=(slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge ip:iproute2 iptables:iptables
    nsenter:util-linux setpriv:util-linux)
packages=()
export PATH=$PATH:/usr/sbin:/sbin
for pair in "${needed[@]}"; do
    command -v "${pair%%:*}" >/dev/null || packages+=("${pair##*:}")
done
[ ${#packages[@]} -gt 0 ] || exit 0
[ "$(id -u)" = 0 ] || missing "not root, and not installed: ${packages[*]}"
command -v apt-get >/dev/null || missing "no apt-get, and not installed: ${packages[*]}"

# Debian would start the daemons of a package where there is an init.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1; }
say "installing ${packages[*]}"
install || { apt-get update -qq >/dev/null 2>&1 && install; } || missing "apt-get cannot install ${packages[*]}"
