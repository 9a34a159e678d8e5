"""What several test modules use."""

import os
from pathlib import Path

REPO = Path(__file__).parents[2]
SHARED = Path(os.environ.get("ALLSPARK_SHARED", REPO.parent / "shared"))  # published lists and real images, if present
