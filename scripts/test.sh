#!/bin/sh
# Lint, format check and tests; arguments go to pytest: sh scripts/test.sh tests/test_config.py -x
set -eu
cd -- "$(dirname -- "$0")/.."
. scripts/setup.sh

python -m ruff check .
python -m ruff format --check .

report=$(mktemp)
trap 'rm -f "$report"' EXIT
status=0
python -m pytest -q -rs --junitxml="$report" "$@" || status=$?
python - "$report" <<'EOF' || true
import sys
from collections import Counter
from xml.etree import ElementTree

skipped = [s for s in ElementTree.parse(sys.argv[1]).iter("skipped") if s.get("type") == "pytest.skip"]
print(f"tests skipped: {len(skipped)}")
for reason, count in Counter(s.get("message") for s in skipped).most_common():
    print(f"  {count} x {reason}")
EOF
exit $status
