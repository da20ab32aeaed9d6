#!/usr/bin/env bash
# Set up what is missing, then run ript.py.
#   bash run_libero.sh             the laptop: stage 2, RIPT and a report, on real MuJoCo in a few minutes
#   bash run_libero.sh test        the tests; with --run-slow also the one that takes minutes
#   bash run_libero.sh ARGUMENTS   ript.py ARGUMENTS, with torchrun over all GPUs where there are any
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

die() { echo "run_libero.sh: $*" >&2; exit 2; }
suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

# 1. A virtual environment, unless one is active. Never install into conda's base.
active="${VIRTUAL_ENV:-}${CONDA_PREFIX:-}"
[ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" = base ] && active=""
if [ -z "$active" ]; then
    if [ ! -x "$here/.venv/bin/python" ]; then
        suits python3 || die "Python 3.11 or 3.12 is needed, python3 is $(python3 --version 2>&1 | tail -n 1)"
        if ! python3 -m venv "$here/.venv"; then
            rm -rf "$here/.venv"  # without pip it would be of no use to the next call
            die "python3 -m venv failed: install Python 3.11 or 3.12 with venv"
        fi
    fi
    export VIRTUAL_ENV="$here/.venv" PATH="$here/.venv/bin:$PATH"
fi
suits python ||
    die "Python 3.11 or 3.12 is needed, this is $(python --version)"

# 2. Packages, once for each content of requirements.txt. torch comes first, so that no other package chooses its build.
stamp="$(python -c 'import sys; print(sys.prefix)')/.ript-requirements"
if ! cmp -s "$here/requirements.txt" "$stamp"; then
    echo "installing the packages of requirements.txt into $(dirname "$stamp")"
    grep '^torch==' "$here/requirements.txt" | xargs python -m pip install --quiet ||
        die "pip could not install torch"
    python -m pip install --quiet -r "$here/requirements.txt" || die "pip could not install requirements.txt"
    cp "$here/requirements.txt" "$stamp"
fi

# MetaWorld only where it is asked for, and for the tests: LIBERO needs none of it.
if [[ " $* " == *" metaworld"* || "${1:-}" = test ]] && ! python -c 'import metaworld' 2>/dev/null; then
    if ! python -m pip install --quiet -c "$here/requirements.txt" metaworld==3.0.0; then
        [ "${1:-}" = test ] || die "pip could not install metaworld"
        echo "MetaWorld is missing, its tests are skipped"
    fi
fi

# 3. Headless OpenGL, from Debian where this script may install it. macOS has its own.
[ "$(uname)" = Darwin ] || export MUJOCO_GL="${MUJOCO_GL:-egl}"
if ! python -c 'import mujoco; mujoco.GLContext(16, 16).free()' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing headless OpenGL (libegl1, libgl1-mesa-dri)"
        { apt-get -qq update && apt-get -qq install -y libegl1 libgl1-mesa-dri; } >/dev/null ||
            die "apt-get could not install libegl1 and libgl1-mesa-dri"
    else
        die "headless OpenGL is missing: sudo apt-get install libegl1 libgl1-mesa-dri"
    fi
fi

# 4. LIBERO's meshes, where a LIBERO suite is asked for. LIBERO_ASSET_PATH=DIR links a copy that is already there.
export LIBERO_CONFIG_PATH="${LIBERO_CONFIG_PATH:-$(python -c 'import sys; print(sys.prefix)')/.libero}"
has_meshes() {
    python - <<'PY'
import contextlib, io, os, sys
with contextlib.redirect_stdout(io.StringIO()):
    from libero.libero import get_libero_path
sys.exit(not os.path.isdir(get_libero_path("assets")))
PY
}
if [[ " $* " == *libero_* || -n "${LIBERO_ASSET_PATH:-}" ]] && ! has_meshes; then
    libero-download-assets || die "LIBERO's meshes could not be fetched: run libero-download-assets"
fi

# 5. Go.
if [ "${1:-}" = test ]; then
    shift
    cd "$here"
    tests=(-n 2 --dist loadfile ript_test.py tests)  # two files at a time
    echo "running the tests: python -m pytest -q ${tests[*]} $*"
    exec python -m pytest -q "${tests[@]}" "$@"
fi
if [ $# = 0 ]; then
    cd "$here"
    # What is there already is kept, and an interrupted run goes on.
    echo "1 of 3: stage 2, a few steps of imitation, into runs/tabletop_sft"
    [ -e runs/tabletop_sft/config.json ] || python scripts/sft.py --suite tabletop
    echo "2 of 3: stage 3, RIPT, into runs/tabletop"
    run=(--out runs/tabletop)
    [ ! -e runs/tabletop/config.json ] || run=(--resume runs/tabletop)
    python ript.py "${run[@]}"
    echo "3 of 3: the report"
    exec python scripts/report.py runs/tabletop
fi
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
# With --help every process would print it.
if [ "$gpus" -gt 0 ] && [[ " $* " != *" --help "* ]]; then
    exec python -m torch.distributed.run --standalone --nproc_per_node "$gpus" "$here/ript.py" "$@"
fi
exec python "$here/ript.py" "$@"
