"""Calls of tools are found in a model's text, however it is cut into pieces, and text stays text."""

from __future__ import annotations

import json
import time

import pytest
from fake_engine import tiny_tokenizer
from fastgen.grammar import GrammarFactory
from fastgen.request import SamplingParams
from fastgen.serve.schemas import FunctionSpec
from fastgen.serve.tools import ToolReader, call_schema
from hypothesis import given
from hypothesis import strategies as st

CALL = '{"name": "weather", "arguments": {"town": "Bern"}}'
TEXTS = [
    # (text, what is shown, names that are called)
    ("It rains.", "It rains.", []),
    (f"<tool_call>\n{CALL}\n</tool_call>", "", ["weather"]),
    (f"See:\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "See:\n", ["weather", "weather"]),
    (CALL, "", ["weather"]),
    (f"  [{CALL}, {CALL}]", "", ["weather", "weather"]),
    ('{"name": "weather", "parameters": {"town": "Bern"}}', "", ["weather"]),
    ('{"name": "weather", "arguments": "{\\"town\\": \\"Bern\\"}"}', "", ["weather"]),
    ('{"name": "absent", "arguments": {}}', '{"name": "absent", "arguments": {}}', []),
    ('{"answer": 42}', '{"answer": 42}', []),
    ("[see above] it rains", "[see above] it rains", []),
    ("a <tool_call>not json</tool_call> b", "a <tool_call>not json</tool_call> b", []),
    (
        "<tool_call>a</tool_call><tool_call>" + CALL + "</tool_call> c",
        "<tool_call>a</tool_call> c",
        ["weather"],
    ),
    ("1 <tool, 2 < 3", "1 <tool, 2 < 3", []),
    (f"cut: <tool_call>{CALL}", "cut: ", ["weather"]),
    ("", "", []),
]


@pytest.mark.parametrize(("text", "shown", "called"), TEXTS)
@given(data=st.data())
def test_calls(text: str, shown: str, called: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    reader = ToolReader(["weather"])
    given_text = "".join(reader.add(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))
    rest, calls = reader.finish()
    assert given_text + rest == shown
    assert [call.name for call in calls] == called
    assert all(json.loads(call.arguments) == {"town": "Bern"} for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    # What templates of Mistral's models demand of ids that clients send back.
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)


def test_text_does_not_wait_where_no_call_can_be() -> None:
    reader = ToolReader(["weather"])
    assert reader.add("It rains. ") == "It rains. "
    assert reader.add("Look <tool") == "Look "
    assert reader.add("box") == "<toolbox"


@pytest.mark.parametrize(
    "pieces", [["<tool_call>x", " " * 60_000, "y"], [" "] * 60_000, ["<tool_call>"] * 20_000, ["a"] * 60_000]
)
def test_long_texts_take_no_longer_a_character(pieces: list[str]) -> None:
    begun = time.perf_counter()
    reader = ToolReader(["weather"])
    shown = "".join(map(reader.add, pieces))
    assert (shown + reader.finish()[0], reader.finish()[1]) == ("".join(pieces), [])
    assert time.perf_counter() - begun < 2.0


def test_the_schema_of_a_call() -> None:
    functions = [
        FunctionSpec(name="a", parameters={"type": "object", "required": ["x"]}),
        FunctionSpec(name="b"),
    ]
    one, two = (json.loads(call_schema(functions[:count])) for count in (1, 2))
    assert one["properties"]["name"] == {"const": "a"}
    assert one["properties"]["arguments"]["required"] == ["x"]
    assert [each["properties"]["name"]["const"] for each in two["anyOf"]] == ["a", "b"]


@pytest.mark.parametrize("name", ['["weather"]', '{"a": 1}', "1", "null"])
def test_names_that_are_no_text_are_no_calls(name: str) -> None:
    text = f'{{"name": {name}, "arguments": {{}}}}'
    reader = ToolReader(["weather"])
    assert reader.add(text) + reader.finish()[0] == text


def test_half_a_character_in_arguments() -> None:
    reader = ToolReader(["weather"])
    reader.add('{"name": "weather", "arguments": {"town": "\\ud800"}}')
    (call,) = reader.finish()[1]
    assert json.loads(call.arguments.encode().decode())["town"] == "\ud800"


def fits(schema: str, text: str) -> bool:
    """As the engine's own grammars have it."""
    tokenizer = tiny_tokenizer()
    factory = GrammarFactory(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    grammar = factory.make(SamplingParams(json_schema=schema))
    assert grammar is not None
    is_complete = False
    for token in tokenizer.encode(text, add_special_tokens=False):
        if not grammar.allowed()[token]:
            return False
        is_complete = grammar.advance(token)
    return is_complete


ORDER = {
    "type": "object",
    "properties": {"item": {"$ref": "#/$defs/Item"}, "then": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["item"],
    "additionalProperties": False,
    "$defs": {"Item": {"enum": ["tea", "$ref"]}},
}


@pytest.mark.parametrize("others", [0, 1])
def test_schemas_that_refer_to_themselves(others: int) -> None:
    functions = [FunctionSpec(name="order", parameters=ORDER), FunctionSpec(name="look")][: 1 + others]
    schema = call_schema(functions)
    good = '{"name":"order","arguments":{"item":"tea","then":{"item":"$ref"}}}'
    assert fits(schema, good)
    assert not fits(schema, good.replace("tea", "pea"))
    assert not fits(schema, good.replace('{"item":"$ref"}', '{"thing":1}'))


def test_an_answer_or_a_call() -> None:
    answer = {"type": "object", "properties": {"total": {"$ref": "#/$defs/N"}}, "required": ["total"],
              "additionalProperties": False, "$defs": {"N": {"type": "integer"}}}  # fmt: skip
    schema = call_schema([FunctionSpec(name="order", parameters=ORDER)], answer)
    assert fits(schema, '{"total":3}')
    assert fits(schema, '{"name":"order","arguments":{"item":"tea"}}')
    assert not fits(schema, '{"total":"3"}')
