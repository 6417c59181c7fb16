"""A package cannot import what it does not declare."""

from __future__ import annotations

from pathlib import Path

import check_imports
import pytest

INSTALLED = {"numpy": ["numpy"], "yaml": ["PyYAML"], "tqdm": ["tqdm"]}


def package(
    tmp_path: Path, name: str, code: str, dependencies: str = "", extras: str = ""
) -> check_imports.Package:
    module = tmp_path / name / "src" / name.replace("-", "_")
    module.mkdir(parents=True)
    (module / "__init__.py").write_text(code)
    (tmp_path / name / "pyproject.toml").write_text(
        f"[project]\nname = '{name}'\ndependencies = [{dependencies}]\n"
        f"[project.optional-dependencies]\nmore = [{extras}]\n"
    )
    return check_imports.read_package(tmp_path / name)


def problems(*packages: check_imports.Package) -> list[str]:
    return check_imports.check(packages, INSTALLED)


def test_declared_imports_pass(tmp_path: Path) -> None:
    code = "import os\nimport numpy.linalg\nfrom yaml import load\nfrom . import other\nimport one_two.more\n"
    assert (
        problems(package(tmp_path, "one-two", code, "'numpy>=1.26 ; python_version > \"3\"', 'pyyaml'")) == []
    )


@pytest.mark.parametrize(
    "code", ["import numpy", "from numpy.linalg import norm", "class C:\n    import numpy\n"]
)
def test_an_undeclared_import_is_named_with_its_place(tmp_path: Path, code: str) -> None:
    (problem,) = problems(package(tmp_path, "one", code))
    assert "imports 'numpy'" in problem
    assert "__init__.py:" in problem


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    import tqdm\n",
        "try:\n    import tqdm\nexcept ImportError:\n    tqdm = None\n",
        "import importlib\ndef f(): importlib.import_module('tqdm')\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tqdm\n",
    ],
)
def test_an_extra_serves_only_imports_that_are_put_off(tmp_path: Path, code: str) -> None:
    assert problems(package(tmp_path, "lazy", code, extras="'tqdm'")) == []
    assert len(problems(package(tmp_path, "undeclared", code))) == 1
    assert len(problems(package(tmp_path, "eager", "import tqdm", extras="'tqdm'"))) == 1


def test_a_module_loaded_only_when_asked_for_may_import_from_an_extra(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    for module, code in {
        "fast": "import tqdm",
        "part/__init__": "from ..fast import x\nfrom . import fast",
    }.items():
        path = folder / "src" / "one" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    lazy = "def f():\n    from .part import g\n"
    (folder / "src" / "one" / "__init__.py").write_text(lazy)
    (folder / "pyproject.toml").write_text(
        "[project]\nname = 'one'\n[project.optional-dependencies]\nmore = ['tqdm']"
    )
    assert problems(check_imports.read_package(folder)) == []
    (folder / "src" / "one" / "__init__.py").write_text("from . import part\n")
    (problem,) = problems(check_imports.read_package(folder))
    assert "fast.py:1: one imports 'tqdm'" in problem


def test_dependencies_may_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    package(tmp_path, "one", "import numpy")
    (folder / "pyproject.toml").write_text("[project]\nname = 'one'\ndynamic = ['dependencies']\n")
    (folder / "requirements.txt").write_text("numpy>=1.26\n")
    assert problems(check_imports.read_package(folder)) == []


def test_a_dependency_that_nothing_imports_is_named(tmp_path: Path) -> None:
    (problem,) = problems(package(tmp_path, "one", "", "'numpy'"))
    assert "never imports" in problem


def test_a_sibling_must_be_declared_too(tmp_path: Path) -> None:
    low = package(tmp_path, "low", "")
    assert len(problems(low, package(tmp_path, "high", "import low"))) == 1
    assert problems(low, package(tmp_path, "higher", "import low", "'low>=0.1'")) == []


def test_a_cycle_is_found_once(tmp_path: Path) -> None:
    a = package(tmp_path, "a", "import b", "'b'")
    b = package(tmp_path, "b", "import c", "'c'")
    c = package(tmp_path, "c", "import a", "'a'")
    assert problems(a, b, c) == ["packages depend on each other: a -> b -> c -> a"]
