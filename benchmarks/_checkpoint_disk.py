"""The disk under a checkpoint benchmark."""

from __future__ import annotations

from pathlib import Path


def drop_page_cache() -> bool:
    """So that reads come from the disk; needs root, and says whether it was done."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True
