"""The server in front of a real engine with a small random model: what it says is what the engine says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from fake_engine import tiny_tokenizer
from fastgen.config import CachePolicy, EngineConfig, SchedulePolicy
from fastgen.llm import build_engine
from fastgen.serve import Server, ServerConfig
from server_lab import Served, wait_until
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    policies = {"cache": CachePolicy(max_bytes=2**22), "schedule": SchedulePolicy(token_budget=64)}
    engine = build_engine(folder, EngineConfig(**policies, device=torch.device("cpu")))
    server = Server(engine, ServerConfig(port=0, served_name="tiny"))
    with server.background() as url:
        yield Served(url, server, engine)  # type: ignore[arg-type]


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


HELLO: Any = [{"role": "user", "content": "Hello"}]


def test_streamed_and_whole_answers_agree(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "n": 3, "max_tokens": 24, "seed": 5, "temperature": 1.0}
    whole = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    streamed = dict.fromkeys(range(3), "")
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == dict(enumerate(texts))
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 3 * 24


def test_a_prompt_is_scored(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=2, echo=True, logprobs=1, temperature=0
    )
    logprobs = made.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens[:5] == list("Hello")
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    # Greedy: the chosen token is the likeliest.
    assert logprobs.token_logprobs[5] == max(logprobs.top_logprobs[5].values())


def test_json_and_calls(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "boolean"}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    shape: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    made = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=1000, seed=0, response_format=shape
    )
    assert set(json.loads(made.choices[0].message.content or "")) == {"answer"}
    tools: Any = [{"type": "function", "function": {"name": "answer", "parameters": schema}}]
    made = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=1000, seed=0, tools=tools, tool_choice="required"
    )
    (call,) = made.choices[0].message.tool_calls or []
    assert set(json.loads(call.function.arguments)) == {"answer"}
    shape["json_schema"]["schema"] = {"type": "bogus"}
    with pytest.raises(openai.BadRequestError, match="bogus"):
        client.chat.completions.create(model="tiny", messages=HELLO, response_format=shape)


def test_a_client_that_goes_away_frees_its_blocks(served: Served) -> None:
    connection = served.send(
        "/v1/completions", {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "n": 4}
    )
    wait_until(lambda: served.get("/stats").json["blocks_used"] > 0)
    connection.close()
    wait_until(lambda: served.get("/stats").json["blocks_used"] == 0)
    assert served.get("/stats").json["requests"] == 0
