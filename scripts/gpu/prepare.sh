#!/usr/bin/env bash
# Wheels for a GPU machine that has Python 3.12, torch, triton, numpy, scipy and TensorBoard, and no
# network: .gpu/whl, 22 MiB. From the checkout's root; then, there:
#   python3 scripts/gpu/run_all.py OUT --wheels .gpu/whl
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); out=$PWD/.gpu
grep -qx '/.gpu/' "$(git rev-parse --git-common-dir)/info/exclude" 2>/dev/null ||
    { mkdir -p "$(git rev-parse --git-common-dir)/info"; echo /.gpu/ >>"$(git rev-parse --git-common-dir)/info/exclude"; }
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
mkdir -p "$out/whl"
get() {
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$@"
}
get "$out/whl" pydantic typing-inspection annotated-types "mujoco==3.3.0" "gymnasium<1.5" \
    stable-baselines3 glfw PyOpenGL Farama-Notifications dm-env optree
core=$(python3 - "$out/whl" <<'P'
import pathlib, re, sys, zipfile
wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("pydantic-[0-9]*.whl")))
metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
print(re.search(r"Requires-Dist: (pydantic-core==[\w.]+)", metadata).group(1))
P
)
get "$out/whl" "$core"
get "$tmp" "metaworld==3.1.1" "envpool==1.2.5" envpool-assets
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q pillow # slim_wheels.py shrinks textures
"$tmp/venv/bin/python" "$here/slim_wheels.py" "$tmp"/envpool-*.whl "$tmp"/envpool_assets-*.whl \
    "$tmp"/metaworld-*.whl "$out/whl"
du -sh "$out"
