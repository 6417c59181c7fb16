"""The documentation's examples run; and what finds and runs them can be trusted."""

from __future__ import annotations

import pytest
import run_examples
from run_examples import Example, ExampleError, find_examples, run_example

PAGE = """
# Title

```python
x = 1
```

<!-- example: continues -->

```python
assert x == 1
```

<!-- example: ranks=2 -->
```python
import os
assert os.environ["WORLD_SIZE"] == "2"
```

<!-- example: skip needs a cluster -->
```python
raise SystemExit(1)
```

<!-- example: run -->
```bash
exit 0
```

```bash
exit 1
```

- in a list:
  ```python
  y = 2
  ```

```
not code
```
"""


@pytest.mark.parametrize("example", run_examples.all_examples(), ids=str)
def test_documentation_example(example: Example) -> None:
    if example.skip:
        pytest.skip(example.skip)
    if example.gpu and not run_examples.has_gpu():
        pytest.skip("no GPU here")
    code, output = run_example(example)
    assert code == 0, output


def test_marks_and_languages_decide_what_runs() -> None:
    found = list(find_examples("page.md", PAGE))
    assert [(e.line, e.language, e.ranks, e.skip) for e in found] == [
        (5, "python", 1, ""),
        (11, "python", 1, ""),
        (16, "python", 2, ""),
        (22, "python", 1, "needs a cluster"),
        (27, "bash", 1, ""),
        (36, "python", 1, ""),
    ]
    assert found[-1].code.strip() == "y = 2"


def test_code_keeps_the_line_numbers_of_its_page() -> None:
    for example in find_examples("page.md", PAGE):
        first = example.code.splitlines()[example.line - 1]
        assert first.strip() == PAGE.splitlines()[example.line - 1].strip()


def test_a_block_that_continues_sees_the_one_before() -> None:
    assert run_example(list(find_examples("page.md", PAGE))[1]) == (0, "")


def test_a_failing_example_fails_and_names_the_line_of_the_page() -> None:
    (example,) = find_examples("page.md", "\ntext\n\n```python\nok = 1\nraise RuntimeError('as told')\n```\n")
    code, output = run_example(example)
    assert code == 1
    assert "line 6" in output
    assert "as told" in output


def test_ranks_are_started_and_one_that_fails_is_noticed() -> None:
    script = (
        "import os, pathlib, time\n"
        "rank = int(os.environ['RANK'])\n"
        "os.write(1, f'rank {rank} threads {os.environ[\"OMP_NUM_THREADS\"]}\\n'.encode())\n"
        "pathlib.Path(str(rank)).touch()\n"
        "while not pathlib.Path('0').exists(): time.sleep(0.01)\n"
        "raise SystemExit(rank)\n"
    )
    code, output = run_example(Example("page.md", 1, "python", script, ranks=2))
    assert code == 1
    assert "rank 0 threads 1" in output
    assert "rank 1 threads 1" in output


@pytest.mark.parametrize("options", ["rank=2", "ranks=two", "skip", "continues", "run"])
def test_a_mark_that_means_nothing_is_an_error(options: str) -> None:
    with pytest.raises(ExampleError, match=r"page\.md:3"):
        list(find_examples("page.md", f"<!-- example: {options} -->\n```python\npass\n```\n"))


def test_an_example_that_hangs_is_ended_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_examples, "TIMEOUT_S", 2)
    script = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    code, output = run_example(Example("page.md", 1, "python", script))
    assert code != 0
    assert "ended after 2 s" in output
