#!/usr/bin/env bash
# Gives the engine a libtorch to build against: `.libtorch` in the repository root becomes a link to one.
#
#   deploy/libtorch.sh         keep the link that is there; otherwise the CPU build
#   deploy/libtorch.sh cpu     the CPU build           (0.55 GB of downloads, 0.5 GB on disk)
#   deploy/libtorch.sh cuda    the CUDA 13 build       (2.5 GB of downloads, 3.6 GB on disk)
#
# If LIBTORCH is set, its folder is checked and linked, and nothing is downloaded.
# The wheels on PyPI are the one source that mirrors carry everywhere, so libtorch is cut out of them.
# Python is used only to download and unzip: any version with pip will do.
set -euo pipefail

readonly VERSION=2.11.0 # what torch-sys 0.24 checks for

readonly ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly CACHE=${DISTILLERY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/distillery}

say() { echo "libtorch: $*" >&2; }
fail() { say "error: $*"; exit 1; }

# Pinned with their digests: pip refuses a file that does not match.
# libtorch_cpu.so of the CUDA wheel (the only Linux wheel on PyPI) needs cudart and cupti to load, even without a GPU.
wheels() {
    cat <<-'PINS'
	torch==2.11.0 --hash=sha256:7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a
	nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
	nvidia-cuda-cupti==13.0.85 --hash=sha256:4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8
	PINS
    [ "$1" = cpu ] || cat <<-'PINS'
	nvidia-cublas==13.1.0.3 --hash=sha256:ee8722c1f0145ab246bccb9e452153b5e0515fd094c3678df50b2a0888b8b171
	nvidia-cuda-nvrtc==13.0.88 --hash=sha256:ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575
	nvidia-cudnn-cu13==9.19.0.56 --hash=sha256:d20e1734305e9d68889a96e3f35094d733ff1f83932ebe462753973e53a572bf
	nvidia-cufft==12.0.0.61 --hash=sha256:6c44f692dce8fd5ffd3e3df134b6cdb9c2f72d99cf40b62c32dde45eea9ddad3
	nvidia-cufile==1.15.1.6 --hash=sha256:08a3ecefae5a01c7f5117351c64f17c7c62efa5fffdbe24fc7d298da19cd0b44
	nvidia-curand==10.4.0.35 --hash=sha256:1aee33a5da6e1db083fe2b90082def8915f30f3248d5896bcec36a579d941bfc
	nvidia-cusolver==12.0.4.66 --hash=sha256:0a759da5dea5c0ea10fd307de75cdeb59e7ea4fcb8add0924859b944babf1112
	nvidia-cusparse==12.6.3.3 --hash=sha256:2b3c89c88d01ee0e477cb7f82ef60a11a4bcd57b6b87c33f789350b59759360b
	nvidia-cusparselt-cu13==0.8.0 --hash=sha256:25e30a8a7323935d4ad0340b95a0b69926eee755767e8e0b1cf8dd85b197d3fd
	nvidia-nccl-cu13==2.28.9 --hash=sha256:e4553a30f34195f3fa1da02a6da3d6337d28f2003943aa0a3d247bbc25fefc42
	nvidia-nvjitlink==13.0.88 --hash=sha256:13a74f429e23b921c1109976abefacc69835f2f433ebd323d3946e11d804e47b
	nvidia-nvshmem-cu13==3.4.5 --hash=sha256:290f0a2ee94c9f3687a02502f3b9299a9f9fe826e6d0287ee18482e78d495b80
	nvidia-nvtx==13.0.85 --hash=sha256:4936d1d6780fbe68db454f5e72a42ff64d1fd6397df9f363ae786930fd5c1cd4
	PINS
}

# Prints the version of the libtorch in folder $1, or nothing.
version_of() {
    if [ -f "$1/build-version" ]; then
        cut -d+ -f1 "$1/build-version"
    else # a torch of pip's has no build-version; its header says it
        sed -n 's/^ *"\([0-9.]*\)"$/\1/p' "$1/include/torch/headeronly/version.h" 2>/dev/null || true
    fi
}

is_usable() { [ "$(version_of "$1")" = "$VERSION" ] && [ -e "$1/lib/libtorch_cpu.so" ] && [ -e "$1/lib/libc10.so" ]; }

# A link is replaced by a rename, so that a build running meanwhile sees the old one or the new one.
link() {
    [ ! -e "$ROOT/.libtorch" ] || [ -L "$ROOT/.libtorch" ] || fail "$ROOT/.libtorch is in the way: it is not a link"
    ln -sfn "$1" "$ROOT/.libtorch.$$"
    mv -T "$ROOT/.libtorch.$$" "$ROOT/.libtorch"
    say "$VERSION at $1"
}

check_machine() {
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "no pinned wheels for $(uname -sm); set LIBTORCH to a libtorch $VERSION"
    python3 -m pip --version >/dev/null 2>&1 || fail "python3 with pip is needed for the download (Debian: apt-get install python3-pip)"
    local need_mb=$1 free_mb
    free_mb=$(df -Pm "$CACHE" | awk 'NR == 2 { print $4 }')
    [ "$free_mb" -ge "$need_mb" ] || fail "$CACHE has $free_mb MB free, $need_mb MB are needed; set DISTILLERY_CACHE to a larger disk"
}

download() {
    local kind=$1 folder=$2 platform
    local -a platforms=()
    for platform in manylinux_2_{28,27,25,18,17,12,5}_x86_64 manylinux{2014,2010,1}_x86_64; do
        platforms+=(--platform "$platform")
    done
    wheels "$kind" >"$folder/wheels.txt"
    # TMPDIR: /tmp may be too small for half a gigabyte. No cache: it would keep a second copy of each wheel.
    TMPDIR=$folder python3 -m pip --disable-pip-version-check download --no-cache-dir --no-deps --require-hashes \
        --only-binary=:all: --python-version 3.11 --implementation cp --abi cp311 --abi none "${platforms[@]}" \
        --dest "$folder/wheels" --requirement "$folder/wheels.txt" >&2 ||
        fail "the download failed; see pip's message above (a digest that does not match is never accepted)"
}

# Unzips headers to include/ and shared libraries, from whatever wheel and folder, to lib/.
# There they find each other: the rpath of each contains $ORIGIN.
unpack() {
    python3 - "$@" <<-'PYTHON'
	import pathlib, re, shutil, sys, zipfile
	kind, wheels, target = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
	cpu = {"libc10.so", "libtorch_cpu.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13"}
	unused = {"libtorch.so", "libtorch_python.so", "libshm.so"}
	for wheel in sorted(wheels.glob("*.whl")):
	    with zipfile.ZipFile(wheel) as archive:
	        for name in archive.namelist():
	            file = pathlib.PurePosixPath(name)
	            library = re.fullmatch(r"(torch|nvidia/\w+)/lib/[^/]+\.so(\.\d+)*", name)
	            if library and (file.name in cpu if kind == "cpu" else file.name not in unused):
	                to = target / "lib" / file.name
	            elif name.startswith("torch/include/") and not name.endswith("/"):
	                to = target / file.relative_to("torch")
	            else:
	                continue
	            to.parent.mkdir(parents=True, exist_ok=True)
	            with archive.open(name) as source, open(to, "wb") as out:
	                shutil.copyfileobj(source, out, 1 << 20)
	    wheel.unlink()
	PYTHON
}

# The linker is told -ltorch -lgomp. The wheel's libtorch.so does nothing but pull in CUDA; a linker script in its place
# lets one engine run on both builds: it opens libtorch_cuda.so itself when that is there.
finish() {
    local target=$1
    echo 'INPUT(-ltorch_cpu)' >"$target/lib/libtorch.so"
    ln -s libgomp.so.1 "$target/lib/libgomp.so"
    echo "$VERSION" >"$target/build-version"
    is_usable "$target" || fail "the wheels do not hold what they should; nothing was installed"
}

install() {
    local kind=$1 target=$2 need_mb=1500 scratch
    [ "$kind" = cpu ] || need_mb=8000
    mkdir -p "$CACHE"
    exec 9>"$CACHE/libtorch.lock"
    flock 9 # a second clone waits here and then finds the work done
    ! is_usable "$target" || return 0
    check_machine "$need_mb"

    scratch=$(mktemp -d "$CACHE/libtorch.XXXXXX")
    # shellcheck disable=SC2064 # expand now: the variable is local
    trap "rm -rf '$scratch'" EXIT
    mkdir "$scratch/wheels" "$scratch/libtorch"
    say "downloading the $kind build of libtorch $VERSION"
    download "$kind" "$scratch"
    unpack "$kind" "$scratch/wheels" "$scratch/libtorch"
    finish "$scratch/libtorch"
    rm -rf "$target" # at most an unusable leftover
    mv -T "$scratch/libtorch" "$target"
}

main() {
    local kind=${1:-}
    case $kind in
    '' | cpu | cuda) ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 64 ;;
    esac

    # Cargo hands LIBTORCH=.libtorch to what it starts; that is this script's own link, not a user's choice.
    if [ -n "${LIBTORCH:-}" ] && [ "$LIBTORCH" != "$ROOT/.libtorch" ]; then
        [ -d "$LIBTORCH" ] || fail "LIBTORCH is $LIBTORCH, which is not a folder"
        is_usable "$LIBTORCH" || fail "LIBTORCH is $LIBTORCH: version '$(version_of "$LIBTORCH")', but $VERSION is needed"
        link "$(cd "$LIBTORCH" && pwd -P)"
    elif [ -z "$kind" ] && is_usable "$ROOT/.libtorch"; then
        say "$VERSION at $(readlink "$ROOT/.libtorch")"
    else
        kind=${kind:-cpu}
        install "$kind" "$CACHE/libtorch-$VERSION-$kind"
        link "$CACHE/libtorch-$VERSION-$kind"
    fi
}

main "$@"
