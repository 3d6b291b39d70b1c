#!/usr/bin/env bash
# Makes .venv, with Trivium installed in it (editable, with the test tools); at once when it is still valid.
# Every target of the Makefile calls it from the repository root. PYTHON=/path/to/python3 chooses the interpreter.
set -euo pipefail

stamp=.venv/trivium-installed                     # written last, so an interrupted installation is repeated
here=$(pwd -P)                                    # console scripts hold their path: a moved checkout needs new ones
want="$here $(cksum <pyproject.toml)"

if [[ -x .venv/bin/python && -f $stamp && $(<"$stamp") == "$want" ]]; then
    exit 0
fi

fail() {
    echo "error: $*" >&2
    exit 2
}

find_python() {
    local candidate candidates=(python3 python3.14 python3.13 python3.12 python3.11)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        "$candidate" -c 'import sys; sys.version_info < (3, 11) and sys.exit(1); print(sys.executable)' \
            2>/dev/null && return
    done
    [[ -n ${PYTHON:-} ]] || fail "no python3 on PATH is 3.11 or newer; install one, or: make PYTHON=/path/to/python3"
    fail "PYTHON=$PYTHON is not Python 3.11 or newer; name another: make PYTHON=/path/to/python3"
}

need_venv_module() { # Debian and Ubuntu pack it apart from python3
    local python=$1 package
    "$python" -c 'import ensurepip, venv' 2>/dev/null && return
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        echo "Installing $package"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package"; } >/dev/null ||
            fail "$package could not be installed; install it by hand, then run make again"
    else
        fail "$python cannot make environments; run: sudo apt-get install $package"
    fi
}

make_venv() {
    local python
    python=$(find_python)
    if [[ ! -x .venv/bin/python || (-f $stamp && $(<"$stamp") != "$here "*) ]]; then
        rm -rf .venv
        echo "Creating .venv with $("$python" --version)"
        if [[ $uv == uv ]]; then
            uv venv --quiet --python "$python" .venv
        else
            need_venv_module "$python"
            "$python" -m venv .venv
        fi
    fi
    if [[ $uv != uv && ! -x $uv ]]; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check uv
    fi
}

if uv --version >/dev/null 2>&1; then uv=uv; else uv=.venv/bin/uv; fi
make_venv
rm -f "$stamp"
echo "Installing Trivium and its dependencies into .venv (a few GB the first time)"
"$uv" pip install --python .venv/bin/python --compile-bytecode --editable '.[dev]' ||
    fail "the packages could not be installed (the lines above say why); run the same make command again to retry"
echo "$want" >"$stamp"
