"""Every static check of the repository, in one place for people, nox and CI: style, types, boundaries, pins.

Runs all of them, whatever the first ones say, and ends with the names of those that failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run the checks with the interpreter that runs this; returns 1 if any failed."""
    sources = sorted((REPO / "packages").glob("*/src"))
    # Import from the working tree: a native package's editable install is a hook that checkers cannot follow.
    scripts = [REPO / "tools", REPO / "benchmarks"]  # they import their neighbours by name
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, sources)),
        "MYPYPATH": os.pathsep.join(map(str, [*sources, *scripts])),
    }
    tools = [*(REPO / "tools").glob("*.py"), REPO / "noxfile.py"]
    python = sys.executable
    checks = {
        "style": [python, "-m", "ruff", "check", "."],
        "format": [python, "-m", "ruff", "format", "--check", "."],
        "types": [python, "-m", "mypy", *map(str, sources)],
        "types of tools": [python, "-m", "mypy", *map(str, tools)],
        "types of benchmarks": [python, "-m", "mypy", "benchmarks"],
        "layers": [str(Path(python).with_name("lint-imports")), "--no-cache"],
        "declared imports": [python, "tools/check_imports.py"],
        "documented keys": [python, "tools/key_tables.py", "--check"],
        "installed pins": [python, "-m", "pip", "check"],
    }
    failed = []
    for title, command in checks.items():
        print(f"-- {title}", flush=True)
        if subprocess.call(command, cwd=REPO, env=environ):
            failed.append(title)
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
