"""Streams of text: whole characters, no stops, nothing lost."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch
from engine_lab import TOKENIZER, engine_of, run, tiny_llama
from fake_engine import sentencepiece_like
from fastgen import SamplingParams
from fastgen.text import TextStream, continued, decoder_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

SENTENCEPIECE = sentencepiece_like()


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


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["\ufffd", "é", "a", b"\x80", b"\xf0\x9f", "<end>"]), max_size=60))
def test_long_runs_without_a_whole_character(pieces):
    ids = []
    for piece in pieces:
        ids += TOKENIZER.all_special_ids[:1] if piece == "<end>" else tokens_of(piece)
    stream = TextStream(TOKENIZER)
    shown = [*(stream.push(token) for token in ids), stream.finish()]
    assert "".join(shown) == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(deadline=None, max_examples=80)
@given(st.text("ab \u00fc\u6771", max_size=12), st.text("ab \u00fc\u6771", max_size=12))
def test_a_text_that_goes_on(before, after):
    """However the two are cut into tokens, together they are what all the tokens say."""
    for tokenizer in (TOKENIZER, SENTENCEPIECE):
        first = tokenizer.encode(before, add_special_tokens=False)
        ids = tokenizer.encode(after, add_special_tokens=False)
        stream = TextStream(tokenizer, before=first)
        shown = "".join([*(stream.push(token) for token in ids), stream.finish()])
        whole = tokenizer.decode([*first, *ids])
        assert tokenizer.decode(first) + shown == whole
        assert continued(decoder_of(tokenizer), first, ids) == shown


def test_what_completes_a_character_of_the_prompt():
    """Nobody can say what it adds; what comes after it is whole."""
    *before, last, after = TOKENIZER.encode("a\u00fcb", add_special_tokens=False)
    stream = TextStream(TOKENIZER, before=before)
    assert stream.push(last) + stream.push(after) + stream.finish() == "\ufffdb"


def tokens_of(piece: str | bytes) -> list[int]:
    """Of bytes, whether they are characters or not; the tokenizer has one for each byte."""
    return list(piece.encode() if isinstance(piece, str) else piece)


@pytest.mark.parametrize("token", [0x80, "special"])
def test_tokens_without_text_are_not_decoded_for_ever(token, monkeypatch):
    longest = 0
    decode = TOKENIZER.decode

    def watched(ids, **options):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids, **options)

    monkeypatch.setattr(TOKENIZER, "decode", watched)
    stream = TextStream(TOKENIZER)
    for _ in range(300):
        stream.push(TOKENIZER.all_special_ids[0] if token == "special" else token)
    assert longest <= 40


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


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.text("ab", max_size=5), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_stops_are_found_however_the_text_is_cut(pieces, stops):
    stream, text, shown = TextStream(TOKENIZER, stops), "", ""
    for piece in pieces:
        text += piece
        shown += stream._through_stops(piece)
        found = [text.find(stop) for stop in stops if stop in text]
        assert stream.stopped == bool(found)
        if found:
            assert shown == text[: min(found)]
            return
        held = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
        assert shown == text[: len(text) - max(held, default=0)]


def test_many_long_stops_are_read_a_character_at_a_time():
    ends = ["b" * 999 + chr(65 + number) for number in range(63)]
    stream = TextStream(TOKENIZER, ["a" * 999 + "b", *ends])
    begun = time.perf_counter()
    for character in "a" * 1100 + "c" + "b" * 999 + "A":
        stream._through_stops(character)
    assert time.perf_counter() - begun < 2.0
    assert stream.stopped


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


def test_a_tokenizer_may_have_more_tokens_than_the_model():
    """Added tokens, such as one for padding, that the model's table was never made larger for."""
    config = copy.deepcopy(tiny_llama().config)
    config.vocab_size = 256
    torch.manual_seed(0)
    engine = engine_of(model=LlamaForCausalLM(config).eval())
    assert len(TOKENIZER) > 256 + 1
    params = SamplingParams(json_schema=SCHEMA, temperature=0.0, max_tokens=200)
    outputs = run(engine, {"json": (list(b"hello"), params)})["json"]
    assert json.loads("".join(each.text for each in outputs)).keys() == {"a", "b"}


def test_no_end_by_text_before_min_tokens():
    plain = run(engine_of(), {"a": (list(b"hello"), SamplingParams(temperature=0.0, max_tokens=40))})["a"]
    text = "".join(each.text for each in plain)
    stop = text[3:5]
    for least in (0, 20):
        params = SamplingParams(temperature=0.0, max_tokens=40, min_tokens=least, stop=(stop,))
        outputs = run(engine_of(), {"a": (list(b"hello"), params)})["a"]
        ids = [token for each in outputs for token in each.new_token_ids]
        assert len(ids) >= least
        found = "".join(each.text for each in outputs)
        assert text.startswith(found)
        assert len(found) > text.find(stop) if least else len(found) == text.find(stop)


def test_a_text_that_began_a_stop_is_not_held_for_ever():
    stream = TextStream(TOKENIZER, ["xyz"])
    assert stream.push(TOKENIZER.encode("x")[0]) == ""
    assert stream.push(TOKENIZER.encode("y")[0], may_stop=False) == "xy"
    assert stream.push(TOKENIZER.encode("z")[0]) == "z"
    assert not stream.stopped
