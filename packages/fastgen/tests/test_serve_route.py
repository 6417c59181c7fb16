"""Which replica a prompt goes to; and sums of what replicas count."""

from __future__ import annotations

import json
from typing import Any

from fastgen.serve.replicas.route import MOST_AHEAD, PIECE, Load, beginnings, choose
from fastgen.serve.replicas.totals import added, read

SYSTEM = {"role": "system", "content": "Answer briefly. " * 40}


def pieces(**body: Any) -> list[int]:
    return beginnings(json.dumps(body).encode())


def chat(*said: str, **more: Any) -> list[int]:
    return pieces(messages=[SYSTEM, *({"role": "user", "content": each} for each in said)], **more)


def test_beginnings_are_shared_as_far_as_the_prompts_are_alike() -> None:
    one, two = chat("a" * 500), chat("b" * 500)
    shared = sum(a == b for a, b in zip(one, two, strict=True))
    assert 0 < shared < len(one)
    assert one[:shared] == two[:shared]
    assert chat("a" * 500, temperature=0.3, stream=True) == one
    assert not set(one) & set(chat("a" * 500, model="legal"))  # an adapter's cache is its own
    assert pieces(prompt="x" * 3 * PIECE) == pieces(prompt=["x" * 3 * PIECE, "y"])
    assert len(pieces(prompt=list(range(200)))) > 2


def test_what_is_no_prompt_has_no_beginning() -> None:
    for body in (
        b"",
        b"{",
        b"[1]",
        b'"x"',
        b"{}",
        b'{"prompt": null}',
        b'{"prompt": []}',
        b'{"prompt": "short"}',
        b'{"prompt": "x", "regex": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    ):
        assert beginnings(body) == []


def test_the_idlest_gets_it_in_turns() -> None:
    loads = {number: Load() for number in range(3)}
    order = []
    for at in range(6):
        number = choose(loads, [])
        loads[number].last = at + 1
        order.append(number)
    assert order == [0, 1, 2, 0, 1, 2]
    loads[0].running = loads[2].running = 1
    assert choose(loads, []) == 1


def test_one_that_knows_the_beginning_is_preferred_until_it_is_far_busier() -> None:
    loads = {0: Load(), 1: Load()}
    loads[1].learn(chat("a"))
    assert choose(loads, chat("something else")) == 1
    loads[1].running = MOST_AHEAD
    assert choose(loads, chat("a")) == 1
    loads[1].running += 1
    assert choose(loads, chat("a")) == 0
    loads[0].running = 1
    assert choose(loads, chat("a")) == 1
    assert choose(loads, chat("a")[:0]) == 0


FIRST = """# HELP fastgen_a_total A
# TYPE fastgen_a_total counter
fastgen_a_total{reason="stop"} 3.0
# HELP fastgen_running Running
# TYPE fastgen_running gauge
fastgen_running 2.0
# HELP fastgen_s Seconds
# TYPE fastgen_s histogram
fastgen_s_bucket{le="1.0"} 1.0
fastgen_s_bucket{le="+Inf"} 2.0
fastgen_s_count 2.0
fastgen_s_sum 2.5
# HELP fastgen_cache_usage_ratio Part
# TYPE fastgen_cache_usage_ratio gauge
fastgen_cache_usage_ratio 0.5
"""


def test_sums() -> None:
    total = added([read(FIRST), read(FIRST.replace('"stop"', '"length"')), read("")])
    assert total["fastgen_a"].samples == {
        ("fastgen_a_total", (("reason", "stop"),)): 3.0,
        ("fastgen_a_total", (("reason", "length"),)): 3.0,
    }
    assert total["fastgen_running"].samples["fastgen_running", ()] == 4.0
    assert total["fastgen_s"].samples["fastgen_s_bucket", (("le", "+Inf"),)] == 4.0
    assert total["fastgen_s"].samples["fastgen_s_sum", ()] == 5.0
    assert "fastgen_cache_usage_ratio" not in total  # a ratio has no sum
    assert [total[name].grows for name in ("fastgen_a", "fastgen_running", "fastgen_s")] == [
        True,
        False,
        True,
    ]
