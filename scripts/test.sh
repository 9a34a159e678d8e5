#!/bin/sh
# Lint, format check and tests, one process per core; arguments go to pytest:
#   sh scripts/test.sh -n 0 tests/unit/test_config.py
set -eu
cd -- "$(dirname -- "$0")/.."
. scripts/setup.sh

python -m ruff check .
python -m ruff format --check .

report=$(mktemp)
trap 'rm -f "$report"' EXIT
status=0
# One thread each, however many cores: sums, and so the bit-identical runs, do not depend on the machine
OMP_NUM_THREADS=1 python -m pytest -q -rs --durations=15 -n "${workers:-auto}" --maxprocesses=8 --dist worksteal --junitxml="$report" "$@" || status=$?
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
