"""Streams of text: whole characters, no stops, nothing lost."""

from __future__ import annotations

import pytest
from engine_lab import TOKENIZER, engine_of, run
from fastgen import SamplingParams
from fastgen.text import TextStream
from hypothesis import given, settings
from hypothesis import strategies as st


def streamed(text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(TOKENIZER, stops)
    shown = []
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        shown.append(stream.push(token))
        if stream.stopped:
            break
    return [*shown, stream.finish()], stream.stopped


@settings(deadline=None, max_examples=80)
@given(st.text(max_size=30))
def test_pieces_make_the_text(text):
    shown, _ = streamed(text)
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown) or "\ufffd" in text


def test_characters_come_whole():
    shown, _ = streamed("a東é😀")
    assert [piece for piece in shown if piece] == ["a", "東", "é", "😀"]


@settings(deadline=None, max_examples=150)
@given(st.text("ab<>", max_size=24), st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop(text, stops):
    shown, stopped = streamed(text, tuple(stops))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert ("".join(shown), stopped) == (text, False)
        return
    assert stopped
    whole = text[: min(ends)]  # what had been said when the first stop was complete
    assert "".join(shown) == whole[: min(whole.find(stop) for stop in stops if stop in whole)]


def test_a_fork_goes_its_own_way():
    stream = TextStream(TOKENIZER, ("xyz",))
    stream.push(TOKENIZER.encode("x")[0])
    other = stream.fork()
    assert stream.push(TOKENIZER.encode("y")[0]) == ""
    assert other.push(TOKENIZER.encode("a")[0]) == "xa"


SCHEMA = """{"type": "object", "additionalProperties": false, "required": ["a", "b"], "properties":
    {"a": {"type": "integer", "minimum": 0, "maximum": 999}, "b": {"enum": ["x", "y"]}}}"""


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_structured_output_has_the_structure(temperature):
    import json
    import re

    settings_ = {"temperature": temperature, "seed": 1, "max_tokens": 200}
    jobs = {
        "json": (list(b"hello"), SamplingParams(json_schema=SCHEMA, n=2, **settings_)),
        "regex": (list(b"hello"), SamplingParams(regex="[a-c]{3}-[0-9]{2}", **settings_)),
        "free": (list(b"hello"), SamplingParams(**{**settings_, "max_tokens": 5})),
    }
    outputs = run(engine_of(), jobs)
    for index in range(2):
        mine = [each for each in outputs["json"] if each.index == index]
        value = json.loads("".join(each.text for each in mine))
        assert type(value["a"]) is int
        assert value["b"] in ("x", "y")
        assert mine[-1].finish_reason.value == "stop"
    assert re.fullmatch("[a-c]{3}-[0-9]{2}", "".join(each.text for each in outputs["regex"]))
