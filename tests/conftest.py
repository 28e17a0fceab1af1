"""What all tests share: no property has a time limit (machines are busy), and CI draws the same examples each time."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("keyreeve", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("keyreeve")
