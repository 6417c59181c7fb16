"""Run the examples of the documentation, each as a reader would: in a process and a folder of its own.

Every fenced `python` block of README.md, packages/*/README.md and docs/*.md is an example. An HTML comment on
the line before the fence says what is not plain about it:

    <!-- example: ranks=2 -->        start it on two processes, as torchrun does
    <!-- example: continues -->      it goes on from the block before it: that one's code runs first
    <!-- example: gpu -->            only where there is a CUDA device
    <!-- example: run -->            a `bash` block, which otherwise is only shown
    <!-- example: skip REASON -->    not run

    python tools/run_examples.py [PAGE ...]
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from example_processes import run_script

REPO = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "packages/*/README.md", "docs/*.md", "docs/**/*.md", "integration_tests/README.md")
TIMEOUT_S = 300
FENCE = re.compile(r"^(?P<indent>\s*)(?P<ticks>```+|~~~+)\s*(?P<language>[\w+-]*)")
MARK = re.compile(r"^\s*<!--\s*example:\s*(?P<options>.*?)\s*-->\s*$")
LANGUAGES = ("python", "bash")


class ExampleError(ValueError):
    """A mark that cannot be understood; names page and line."""


@dataclass(frozen=True)
class Example:
    """One block to run. `code` starts with empty lines so that its line numbers are the page's."""

    page: str
    line: int
    language: str
    code: str
    ranks: int = 1
    gpu: bool = False
    skip: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def find_examples(page: str, text: str) -> Iterator[Example]:
    """The examples of one page, in order.

    Raises:
        ExampleError: A mark holds an unknown option, or `continues` follows nothing.
    """
    before: Example | None = None
    for line, language, options, code in _blocks(text):
        if language not in LANGUAGES or (language == "bash" and options is None):
            continue
        example = _example(page, line, language, code, options or "", before)
        if language == "python":
            before = example
        if options != "run" or language == "bash":
            yield example


def _blocks(text: str) -> Iterator[tuple[int, str, str | None, str]]:
    """Each fenced block: line of its first code line, language, the options of the mark before it, code."""
    lines = text.splitlines()
    number = 0
    options: str | None = None
    while number < len(lines):
        if mark := MARK.match(lines[number]):
            options = mark["options"]
        elif fence := FENCE.match(lines[number]):
            start = number + 1
            number = start
            while number < len(lines) and not lines[number].strip().startswith(fence["ticks"]):
                number += 1
            yield start + 1, fence["language"], options, textwrap.dedent("\n".join(lines[start:number]))
            options = None
        elif lines[number].strip():
            options = None
        number += 1


def _example(page: str, line: int, language: str, code: str, options: str, before: Example | None) -> Example:
    """Read a mark's options into an example."""
    ranks, gpu, skip = 1, False, ""
    padded = "\n" * (line - 1) + code + "\n"
    word, _, rest = options.partition(" ")
    if word == "skip":
        if not rest:
            raise ExampleError(
                f"{page}:{line}: `skip` needs a reason, as in `<!-- example: skip needs a cluster -->`"
            )
        return Example(page, line, language, padded, skip=rest)
    for option in options.split():
        if option.startswith("ranks=") and option[6:].isdigit():
            ranks = int(option[6:])
        elif option == "gpu":
            gpu = True
        elif option == "continues" and before is not None:
            padded = before.code + padded[before.code.count("\n") :]
            ranks, gpu, skip = max(ranks, before.ranks), gpu or before.gpu, before.skip
        elif option != "run" or language != "bash":
            raise ExampleError(
                f"{page}:{line}: {option!r} is no option here; there are ranks=N, continues, gpu, "
                "skip REASON, and run for bash blocks"
            )
    return Example(page, line, language, padded, ranks, gpu, skip)


def all_examples(repo: Path = REPO) -> list[Example]:
    """Every example of the repository's documentation."""
    pages = dict.fromkeys(path for pattern in PAGES for path in sorted(repo.glob(pattern)))
    return [
        example
        for page in pages
        for example in find_examples(page.relative_to(repo).as_posix(), page.read_text())
    ]


def run_example(example: Example) -> tuple[int, str]:
    """Run one example in an empty folder; its exit code, and its output, standard output and error together."""
    with tempfile.TemporaryDirectory(prefix="example-") as folder:
        suffix = ".py" if example.language == "python" else ".sh"
        script = Path(folder, example.page.replace("/", "_") + suffix)
        script.write_text(example.code)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "MPLBACKEND": "agg"}
        if example.language == "python":
            return run_script(script, example.ranks, environ, TIMEOUT_S)
        return _run_bash(script, environ)


def _run_bash(script: Path, environ: dict[str, str]) -> tuple[int, str]:
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", script],
        cwd=script.parent,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the whole group: what it started would outlive it
        output, _ = process.communicate()
        return 1, f"{output}\nended after {TIMEOUT_S} s"
    return process.returncode, output


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def main(pages: Sequence[str]) -> int:
    """Run all examples, or those of some pages; returns 1 if any failed."""
    failed = total = 0
    for example in all_examples():
        if pages and example.page not in pages:
            continue
        skip = example.skip or ("no GPU here" if example.gpu and not has_gpu() else "")
        if skip:
            print(f"skipped  {example} ({skip})")
            continue
        total += 1
        code, output = run_example(example)
        print(f"{'FAILED' if code else 'ok':8} {example}", flush=True)
        if code:
            failed += 1
            print(textwrap.indent(output, "    "), flush=True)
    print(f"{total - failed} of {total} examples ran")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
