# Sourced by bin/test, bin/test-bounds and bin/quickstart: creates .venv next to pyproject.toml, or reuses it.
# Afterwards the repository is the current folder, and hfmpi and mpirun are on PATH.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"
exec </dev/null  # CI may close stdin, and mpirun and pip need a readable one

die() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# patiently COMMAND...   prints a dot every three seconds while the command runs
patiently() {
    local dots code=0
    while sleep 3 &>/dev/null && kill -0 $$ 2>/dev/null; do printf .; done &
    dots=$!
    "$@" || code=$?
    kill "$dots" 2>/dev/null || true
    wait "$dots" 2>/dev/null || true
    echo
    return "$code"
}

# make_environment EXTRA...   one stamp per extra, so that bin/quickstart reuses what bin/test installed
make_environment() {
    local key extra missing=
    command -v python3 >/dev/null || die "python3 is not on PATH; hfmpi needs Python 3.11 or newer."
    if [[ ! -x .venv/bin/python ]] || ! grep -qsF "$root/.venv" .venv/bin/pip; then  # absent or moved
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            die "python3 is $(python3 -V 2>&1), hfmpi needs Python 3.11 or newer."
        python3 -c 'import venv, ensurepip' 2>/dev/null ||
            die "python3 cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)."
        echo "Making the environment .venv (some seconds)"
        patiently python3 -m venv --clear .venv || die "python3 could not make .venv; its message is above."
    fi
    key="$(.venv/bin/python -c 'import hashlib; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())')" ||
        die "pyproject.toml cannot be read."
    for extra in "$@"; do
        [[ "$(cat ".venv/extra-$extra" 2>/dev/null)" == "$key" ]] || missing=yes
    done
    if [[ -n $missing ]]; then
        echo "Installing hfmpi and what it needs from PyPI (a minute or two the first time)"
        patiently .venv/bin/python -m pip install -qq --no-input --disable-pip-version-check \
            --editable ".[$(IFS=,; echo "$*")]" ||
            die "pip could not install hfmpi; its message is above."
        for extra in "$@"; do echo "$key" >".venv/extra-$extra"; done
    fi
    export PATH="$root/.venv/bin:$PATH"
}
