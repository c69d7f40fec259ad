#!/usr/bin/env bash
# Writes requirements.txt (runtime), requirements-build.txt (what builds packages) and requirements-dev.txt (all
# of that, and tools) anew from pyproject.toml: every package that any supported Python and system needs, pinned,
# with the hashes of all its files.
#
#   scripts/lock.sh              keep the pins that still fit
#   scripts/lock.sh --upgrade    move every pin to the newest release that fits
set -euo pipefail
cd "$(dirname "$0")/.."

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-python3}" -m venv "$tools"
"$tools/bin/pip" install --quiet --disable-pip-version-check 'uv>=0.9,<1'

lock() {
    local file=$1
    shift
    "$tools/bin/uv" pip compile --quiet --no-config --universal --python-version 3.11 \
        --generate-hashes --no-annotate --no-header --output-file "$file" "$@"
    sed -i.old -e '/^# Written by /d' "$file"
    { echo '# Written by scripts/lock.sh from pyproject.toml.'; cat "$file"; } >"$file.old"
    mv "$file.old" "$file"
}

# The last one holds the pins of the other two.
lock requirements.txt pyproject.toml "$@"
lock requirements-build.txt --group build "$@"
lock requirements-dev.txt pyproject.toml --group dev \
    --constraints requirements.txt --constraints requirements-build.txt "$@"
