"""Calls that ranks repeat survive the wire, small; and what two engines said differs as soon as a token does."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import numpy as np
import pytest
from fastgen.errors import RequestError
from fastgen.output import Output
from fastgen.ranks.calls import Abort, Add, Digest, Embed, LoadAdapter, Step, checked, packed, unpacked
from fastgen.request import FinishReason, SamplingParams


def test_every_call_comes_back() -> None:
    params = SamplingParams(
        max_tokens=7,
        stop=("a", "é"),
        stop_token_ids=(1, 2),
        seed=2**63,
        json_schema="{}",
        n=3,
        logit_bias={4: -1.5, 2: 100.0},
    )
    calls = [
        Add("one", [1, 2, 3], params, -4, "legal"),
        Add("two", [], SamplingParams()),
        Abort("one"),
        LoadAdapter("legal", "/some/where"),
        Embed([5]),
        Step(),
        Step(12),
    ]
    assert unpacked(packed(calls, 77)) == (calls, 77)


def test_a_decode_costs_a_few_bytes() -> None:
    assert len(packed([Step()], 2**32 - 1)) < 20
    assert len(packed([Add("x", [], SamplingParams(temperature=0.0))], 0)) < 50


def test_nothing_but_plain_values_is_read() -> None:
    values = msgpack.unpackb(packed([Add("x", [1], SamplingParams(seed=1))], 3))
    assert values == [3, [["Add", "x", [1], {"seed": 1}, 0, None]]]


def test_digests_tell_tokens_ends_and_errors_apart() -> None:
    output = Output("x", 0, [1, 2], "ab", None, 3)

    def digest(*outputs: Output) -> int:
        made = Digest()
        made.outputs(outputs)
        return made.value

    others = [
        replace(output, new_token_ids=[1, 3]),
        replace(output, index=1),
        replace(output, request_id="y"),
        replace(output, finish_reason=FinishReason.STOP),
    ]
    assert len({digest(), digest(output), *map(digest, others)}) == 6
    assert digest(output) == digest(replace(output, text="other text of the same tokens"))
    refused = Digest()
    refused.refused(ValueError())
    assert refused.value not in (0, digest(output))


def test_what_cannot_be_told_is_refused_before_it_is_done() -> None:
    with pytest.raises(RequestError, match="to tell the other ranks"):
        checked(Add("a", [np.int64(3)], SamplingParams()))
    with pytest.raises(RequestError, match="to tell the other ranks"):
        checked(Add("a", [3], SamplingParams(seed=2**64)))
    call = Add("a", [3], SamplingParams(seed=2**64 - 1))
    assert checked(call) is call
