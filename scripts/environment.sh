#!/usr/bin/env bash
# Makes or brings up to date the virtual environment VENV for this checkout: environment.sh VENV
# Does nothing if it was made for this checkout from these locks. Needs Python 3.11 or 3.12, and a network if work is due.
set -euo pipefail
cd "$(dirname "$0")/.."

UV_VERSION=0.13.9
venv=$1
stamp="$venv/.sglang-adrenaline"
want="$(cat requirements.lock requirements-demo.lock pyproject.toml | sha256sum | cut -d' ' -f1) $PWD"
[[ -f $stamp && $(<"$stamp") == "$want" ]] && exit 0

find_python() {
    local name
    for name in python3.11 python3.12 python3; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "environment.sh: error: no Python 3.11 or 3.12 found; install one (Debian, Ubuntu: apt install python3.11 python3.11-venv)" >&2
    exit 1
}

if [[ ! -x $venv/bin/python ]]; then
    python=$(find_python)
    echo "making the environment $venv with $python (some minutes and 9 GB on the first run)" >&2
    if ! "$python" -m venv "$venv"; then
        rm -rf "$venv"
        echo "environment.sh: error: $python cannot make environments; Debian, Ubuntu: apt install python3-venv" >&2
        exit 1
    fi
fi

if command -v uv >/dev/null; then
    uv=$(command -v uv)
elif [[ -x $venv/bin/uv ]]; then
    uv=$venv/bin/uv
else
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"
    uv=$venv/bin/uv
fi

install() { "$uv" pip install --quiet --python "$venv/bin/python" "$@"; }
rm -f "$stamp"
install -r requirements.lock
install --no-deps -r requirements-demo.lock
install --no-deps -e .
# Once here, instead of in each server process where PYTHONDONTWRITEBYTECODE is set: imports of 20 s take 12.
"$venv/bin/python" -m compileall -q -j 0 "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" >/dev/null 2>&1 || true
echo "$want" >"$stamp"
