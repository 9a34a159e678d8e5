#!/bin/sh
# Build the documentation site into site/ and serve it at http://127.0.0.1:8000; `sh scripts/docs.sh build` only builds.
set -eu
cd -- "$(dirname -- "$0")/.."
. scripts/setup.sh

python -m mkdocs build --quiet
[ "${1:-serve}" = build ] || exec python -m http.server --bind 127.0.0.1 --directory site "${port:-8000}"
