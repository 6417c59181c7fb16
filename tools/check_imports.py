"""Each package imports what its metadata declares, declares what it imports, and depends on no cycle.

Read with `ast`, never imported. An import that runs with the module needs a line in `dependencies`; one in a
function, a `try` or an `if` (loaded when asked for, or where it is there) may come from an extra instead, and
so may all that is imported by a module which is itself only loaded that way.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPO = Path(__file__).resolve().parent.parent
# Import names whose distribution is called otherwise and may not be installed here to be asked.
ELSEWHERE = {"cupy": ("cupy-cuda12x", "cupy-cuda13x"), "triton": ("torch", "triton")}


@dataclass(frozen=True)
class Import:
    """One module named by an import statement."""

    module: str  # in full, whether written absolute or relative
    file: Path
    line: int
    always: bool  # runs whenever the file (of a whole package: the package) is imported


@dataclass(frozen=True)
class Package:
    """A package's declared dependencies (canonical names) and what it really imports from elsewhere."""

    name: str
    provides: frozenset[str]
    required: frozenset[str]
    optional: frozenset[str]
    imports: tuple[Import, ...]


def canonical(name: str) -> str:
    """A distribution's name as indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    """`numpy` of `numpy>=1.26; python_version < "3.12"`."""
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", requirement)
    if match is None:
        raise ValueError(f"not a requirement: {requirement!r}")
    return canonical(match[1])


def read_package(folder: Path) -> Package:
    """Read one package's metadata and sources."""
    project: Mapping[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    required = project.get("dependencies", [])
    if "dependencies" in project.get("dynamic", []):
        required = (folder / "requirements.txt").read_text().splitlines()
    extras = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
    source = folder / "src"
    provides = frozenset(path.parent.name for path in source.glob("*/__init__.py"))
    return Package(
        name=canonical(project["name"]),
        provides=provides,
        required=frozenset(map(requirement_name, required)),
        optional=frozenset(map(requirement_name, extras)),
        imports=tuple(found for found in read_sources(source, provides) if top(found.module) not in provides),
    )


def read_sources(source: Path, provides: Iterable[str]) -> Iterator[Import]:
    """Every import under a package's src/, `always` only if importing the package runs it."""
    files = {module_name(path, source): path for path in sorted(source.rglob("*.py"))}
    imports = {name: list(read_imports(path, source)) for name, path in files.items()}
    loaded = list(provides)
    for name in loaded:  # grows while it is read
        for found in imports.get(name, ()):
            parts = found.module.split(".")
            parents = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
            loaded += [
                module for module in parents if found.always and module in files and module not in loaded
            ]
    for name, founds in imports.items():
        yield from (replace(found, always=found.always and name in loaded) for found in founds)


def read_imports(path: Path, source: Path) -> Iterator[Import]:
    """Every import in one file under `source`."""
    parts = module_name(path, source).split(".")
    package = parts if path.name == "__init__.py" else parts[:-1]
    yield from _walk(ast.parse(path.read_text(), str(path)).body, path, package, always=True)


def module_name(path: Path, source: Path) -> str:
    """`one.two` of src/one/two.py, and of src/one/two/__init__.py."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top(module: str) -> str:
    """`torch` of `torch.nn.functional`."""
    return module.split(".")[0]


def _walk(statements: Iterable[ast.AST], path: Path, package: list[str], *, always: bool) -> Iterator[Import]:
    for node in statements:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]  # a name may be a module too
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "find_spec", "importorskip"):
            names = [
                arg.value
                for arg in node.args[:1]
                if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            ]
        for name in names:
            if not name.startswith("."):
                yield Import(name, path, getattr(node, "lineno", 0), always)
        conditional = isinstance(node, ast.If | ast.Try | ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(ast.iter_child_nodes(node), path, package, always=always and not conditional)


def _called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def check(packages: Iterable[Package], installed: Mapping[str, Iterable[str]]) -> list[str]:
    """What is wrong, a line each.

    Args:
        packages: The repository's packages.
        installed: Import name -> distributions that provide it, as `packages_distributions()` gives.
    """
    packages = list(packages)
    ours = {module: (package.name,) for package in packages for module in package.provides}
    problems: list[str] = []
    for package in packages:
        used: set[str] = set()
        for found in package.imports:
            module = top(found.module)
            if module in sys.stdlib_module_names:
                continue
            candidates = {module, *ELSEWHERE.get(module, ()), *installed.get(module, ())}
            providers = set(map(canonical, ours.get(module, candidates)))
            used |= providers
            allowed = package.required if found.always else package.required | package.optional
            if not providers & allowed:
                where = "dependencies" if found.always else "dependencies or an extra"
                problems.append(
                    f"{found.file}:{found.line}: {package.name} imports {module!r}, "
                    f"which its pyproject.toml does not declare in {where}"
                )
        problems += [
            f"{package.name} declares {name!r} in dependencies and never imports it"
            for name in sorted(package.required - used)
        ]
    problems = list(dict.fromkeys(problems))
    return problems + find_cycles({package.name: package.required | package.optional for package in packages})


def find_cycles(needs: Mapping[str, Iterable[str]]) -> list[str]:
    """Every cycle among `needs`, once, from its first name in alphabetical order."""
    cycles: list[str] = []

    def follow(path: tuple[str, ...]) -> None:
        for name in sorted(set(needs[path[-1]]) & needs.keys()):
            if name == path[0] and name == min(path) and len(path) > 1:
                cycles.append(f"packages depend on each other: {' -> '.join((*path, name))}")
            elif name not in path:
                follow((*path, name))

    for start in sorted(needs):
        follow((start,))
    return cycles


def main() -> int:
    """Check the repository; returns 1 if anything is wrong."""
    packages = [read_package(path.parent) for path in sorted((REPO / "packages").glob("*/pyproject.toml"))]
    problems = check(packages, packages_distributions())
    for problem in problems:
        print(problem.replace(f"{REPO}/", ""))
    print(f"{len(packages)} packages, {sum(len(package.imports) for package in packages)} imports, ", end="")
    print(f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
