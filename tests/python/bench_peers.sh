#!/usr/bin/env bash
# Installs the peers of bench-scale into a scratch environment, and prints a line of JSON for each:
#     tests/python/bench_peers.sh FOLDER [--short]
# Nothing of it is needed to use or to test this project. What cannot be installed says so in its line.
set -uo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
folder=$1
shift
python="$folder/bin/python"

if [ ! -x "$python" ]; then
    "${PYTHON:-python3}" -m venv "$folder" >&2 || exit 1
fi
have() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }
have ray || "$python" -m pip install -q ray >&2
have distributed || "$python" -m pip install -q 'dask[distributed]' >&2
# Without its dependencies: torch is large, and the lighthouse needs none of it.
have torchft || "$python" -m pip install -q --no-deps torchft-nightly >&2 || "$python" -m pip install -q --no-deps torchft >&2

for peer in ray dask torchft; do
    line=$(timeout 300 "$python" "$here/bench_peers.py" "$peer" "$@" 2>/dev/null | grep '^{' | tail -n 1)
    [ -n "$line" ] || line="{\"peer\": \"$peer\", \"error\": \"it ended without an answer\"}"
    echo "$line"
done
