#!/bin/sh
# Print the path of a Chromium that starts. Finds one, installs one where it may, or says in one sentence what to do.
# CHROMIUM=/path names one. Everything but the path goes to stderr.
set -u
python=${1:-.venv/bin/python}

starts() { [ -n "$1" ] && "$1" --version >/dev/null 2>&1; }

playwrights_own() {
    "$python" -c 'from playwright.sync_api import sync_playwright
with sync_playwright() as p: print(p.chromium.executable_path)' 2>/dev/null
}

if [ -n "${CHROMIUM:-}" ]; then
    if starts "$CHROMIUM"; then
        echo "$CHROMIUM"
        exit 0
    fi
    echo "CHROMIUM=$CHROMIUM does not start: name a Chromium or Chrome program, or unset CHROMIUM." >&2
    exit 2
fi

installed() {
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        path=$(command -v "$name") && starts "$path" && echo "$path" && return 0
    done
    for path in "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" "$(playwrights_own)"; do
        starts "$path" && echo "$path" && return 0
    done
    return 1
}

installed && exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Browser tests need a Chromium: installing Debian's." >&2
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium; } >&2
    installed && exit 0
fi

echo "Browser tests need a Chromium: installing Playwright's." >&2
"$python" -m playwright install chromium >&2
installed && exit 0

echo "Browser tests need a Chromium and none could be installed: install the package chromium (or Google Chrome), or name one with CHROMIUM=/path/to/chromium." >&2
exit 2
