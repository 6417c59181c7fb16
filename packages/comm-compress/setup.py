"""Dependencies as requirements.txt says; in a clone of the repository, siblings come from beside this package.

So `pip install packages/comm-compress` needs nothing that is not in the clone or on the index. A source
distribution, and a wheel built from one, ask the index for every dependency, by version.
"""

import re
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent


def beside(requirement: str) -> str:
    """The requirement, or the sibling folder that fulfils it."""
    name = re.split(r"[^\w-]", requirement, maxsplit=1)[0]
    sibling = HERE.parent / name
    in_clone = (sibling / "pyproject.toml").exists() and "sdist" not in sys.argv
    return f"{name} @ {sibling.as_uri()}" if in_clone else requirement


setup(install_requires=[beside(line) for line in (HERE / "requirements.txt").read_text().splitlines()])
