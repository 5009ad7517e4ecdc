#!/bin/sh
# Create .venv with the first Python 3.11 or newer that is found; PYTHON=... names one.
set -eu
venv=${1:-.venv}

for python in ${PYTHON:-python3 python python3.14 python3.13 python3.12 python3.11}; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        found=$python
        break
    fi
done
if [ -z "${found:-}" ]; then
    echo "lorascope needs Python 3.11 or newer: install it (Debian and Ubuntu: apt install python3 python3-venv), or name one with make PYTHON=/path/to/python3." >&2
    exit 2
fi
if ! "$found" -c 'import ensurepip, venv' 2>/dev/null; then
    package=$("$found" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    echo "$found cannot create virtual environments: install its venv module (Debian and Ubuntu: apt install $package), then run this again." >&2
    exit 2
fi
"$found" -m venv "$venv"
