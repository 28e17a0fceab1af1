"""What SoftHSM's configuration file says of its token directory."""

from __future__ import annotations

import re
from pathlib import Path

_TOKENDIR = re.compile(r"^\s*directories\.tokendir\s*=\s*(\S.*?)\s*$", re.MULTILINE)


def softhsm_store(conf: Path) -> Path | None:
    """Where the tokens are; None where the file cannot be read or names no directory."""
    try:
        match = _TOKENDIR.search(conf.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return Path(match.group(1)) if match else None
