"""The official `openai` client, unmodified, against a real server on a free port."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
from fake_engine import FakeEngine
from fastgen.request import SamplingParams
from server_lab import Served, serving


def reply(prompt: str, params: SamplingParams, index: int) -> str:
    if params.json_schema is not None and '"const"' in params.json_schema:
        return json.dumps({"name": "weather", "arguments": {"town": "Bern"}})
    if params.json_schema is not None:
        return json.dumps({"answer": 42})
    if "<tools>" in prompt:
        return 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"town": "Zürich"}}\n</tool_call>'
    return f"Grüezi {index}, " + "so it goes on. " * 5


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(FakeEngine(reply=reply), adapters=("pirate",), api_keys=("secret",)) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_models_and_adapters(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "pirate"]
    assert client.models.retrieve("pirate").id == "pirate"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("absent")


def test_chat(client: openai.OpenAI, served: Served) -> None:
    made = client.chat.completions.create(model="pirate", messages=HELLO, temperature=0.5, seed=7, top_p=0.9)
    assert made.model == "pirate"
    assert made.choices[0].message.role == "assistant"
    assert made.choices[0].message.content == reply("", SamplingParams(), 0)
    assert made.choices[0].finish_reason == "stop"
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    assert made.usage.completion_tokens == len(reply("", SamplingParams(), 0).encode())
    seen = served.engine.seen[-1]
    assert (seen["adapter"], seen["params"].seed, seen["params"].top_p) == ("pirate", 7, 0.9)
    assert served.engine.tokenizer.decode(seen["prompt_ids"]) == "<|user|>Hello<|end|>\n<|assistant|>"


def test_chat_streams_what_it_would_say_whole(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, n=3, stream=True, stream_options={"include_usage": True}
        )
    )
    texts, finishes, roles = {}, {}, {}
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        finishes[choice.index] = choice.finish_reason
        if choice.delta.role:
            roles.setdefault(choice.index, []).append(choice.delta.role)
    assert texts == {index: reply("", SamplingParams(), index) for index in range(3)}
    assert finishes == dict.fromkeys(range(3), "stop")
    assert roles == {index: ["assistant"] for index in range(3)}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == sum(len(text.encode()) for text in texts.values())


def test_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=HELLO) as stream:
        assert stream.get_final_completion().choices[0].message.content == reply("", SamplingParams(), 0)


def test_completions(client: openai.OpenAI) -> None:
    made = client.completions.create(model="tiny", prompt=["one", "two"], n=2, max_tokens=8, logprobs=2)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in made.choices} == {"length"}
    logprobs = made.choices[0].logprobs
    assert "".join(logprobs.tokens) == "Gr" + "bytes:\\xc3bytes:\\xbc" + "ezi "
    assert logprobs.text_offset == [0, 1, 2, 2, 3, 4, 5, 6]
    assert len(logprobs.top_logprobs) == len(logprobs.token_logprobs) == 8
    chunks = client.completions.create(model="tiny", prompt=[72, 73], max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == made.choices[0].text == "Grüezi "


def test_echo_and_scoring(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=4, echo=True, logprobs=1
    ).choices[0]
    assert made.text == "HelloGrü"
    assert made.logprobs.tokens[:6] == ["H", "e", "l", "l", "o", "G"]
    assert made.logprobs.token_logprobs[0] is None
    assert made.logprobs.text_offset == [0, 1, 2, 3, 4, 5, 6, 7, 7]
    scored = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    assert (scored.text, len(scored.logprobs.tokens)) == ("Hello", 5)
    whole = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(
            model="tiny", prompt="Hello", max_tokens=4, echo=True, stream=True
        )
    )
    assert whole == "HelloGrü"


def test_stop(client: openai.OpenAI, served: Served) -> None:
    made = client.chat.completions.create(model="tiny", messages=HELLO, stop=["goes", "never"])
    assert made.choices[0].message.content == "Grüezi 0, so it "
    assert served.engine.seen[-1]["params"].stop == ("goes", "never")
    streamed = client.chat.completions.create(model="tiny", messages=HELLO, stop="goes", stream=True)
    assert "".join(chunk.choices[0].delta.content for chunk in streamed) == "Grüezi 0, so it "


def test_logprobs_of_chats(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=3, max_completion_tokens=5
    )
    content = made.choices[0].logprobs.content
    assert (
        b"".join(bytes(each.bytes) for each in content).decode() == made.choices[0].message.content == "Grüe"
    )
    assert all(len(each.top_logprobs) == 3 for each in content)


def test_json(client: openai.OpenAI, served: Served) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}}
    made = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        response_format={"type": "json_schema", "json_schema": {"name": "it", "schema": schema}},
    )
    assert json.loads(made.choices[0].message.content) == {"answer": 42}
    assert json.loads(served.engine.seen[-1]["params"].json_schema) == schema
    asked = served.engine.seen[-1]["params"].json_schema
    assert any(asked == schema and "grammar" in name for schema, name in served.engine.prepared), (
        "compiled where steps wait for it"
    )
    client.chat.completions.create(model="tiny", messages=HELLO, response_format={"type": "json_object"})
    assert json.loads(served.engine.seen[-1]["params"].json_schema) == {"type": "object"}


def test_tools(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS).choices[0]
    assert made.finish_reason == "tool_calls"
    assert made.message.content == "Let me see.\n"
    assert made.message.tool_calls[0].function.name == "weather"
    assert json.loads(made.message.tool_calls[0].function.arguments) == {"town": "Zürich"}
    with client.chat.completions.stream(model="tiny", messages=HELLO, tools=TOOLS) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.content == "Let me see.\n"
    assert json.loads(streamed.message.tool_calls[0].function.arguments) == {"town": "Zürich"}
    told = [
        *HELLO,
        made.message,
        {"role": "tool", "tool_call_id": made.message.tool_calls[0].id, "content": "rain"},
    ]
    assert client.chat.completions.create(model="tiny", messages=told, tools=TOOLS, tool_choice="none")


def test_a_tool_that_must_be_called(client: openai.OpenAI, served: Served) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    made = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=TOOLS, tool_choice=choice
    ).choices[0]
    assert made.message.content is None
    assert json.loads(made.message.tool_calls[0].function.arguments) == {"town": "Bern"}
    schema = json.loads(served.engine.seen[-1]["params"].json_schema)
    assert schema["properties"]["name"] == {"const": "weather"}


def test_embeddings(client: openai.OpenAI) -> None:
    # The client asks for base64 unless it is told otherwise.
    made = client.embeddings.create(model="tiny", input=["a", "bcd"])
    assert [each.embedding for each in made.data] == [[1.0, 0.5, -1.25], [3.0, 0.5, -1.25]]
    plain = client.embeddings.create(model="tiny", input="bcd", encoding_format="float")
    assert plain.data[0].embedding == made.data[1].embedding
    assert made.usage.prompt_tokens == 4


def test_errors_have_their_classes(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=10**6)
    with pytest.raises(openai.NotFoundError, match="expected one of tiny, pirate, got 'gpt'"):
        client.chat.completions.create(model="gpt", messages=HELLO)
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_what_was_told_may_be_sent_back_as_it_was(client: openai.OpenAI) -> None:
    """Fields that the client adds, or that chunks have, are no reason to refuse a conversation."""
    made = client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS).choices[0].message
    with client.chat.completions.stream(model="tiny", messages=HELLO, tools=TOOLS) as stream:
        streamed = stream.get_final_completion().choices[0].message
    for message in (made.model_dump(), streamed.model_dump(), streamed.to_dict()):
        calls = message["tool_calls"]
        told = [*HELLO, message, {"role": "tool", "tool_call_id": calls[0]["id"], "content": "rain"}]
        client.chat.completions.create(model="tiny", messages=told, tools=TOOLS, tool_choice="none")
    chunks = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
    )
    assert [*chunks][-1].usage is not None


def test_an_answer_of_a_shape_beside_tools(client: openai.OpenAI, served: Served) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS, response_format=shape)
    schema = json.loads(served.engine.seen[-1]["params"].json_schema)
    assert schema["anyOf"][0] == {"type": "object"}
    assert schema["anyOf"][1]["properties"]["name"] == {"const": "weather"}
