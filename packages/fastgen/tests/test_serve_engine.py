"""The command, the server and the engine together: a process that serves a model, and OpenAI's client."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from engine_lab import TOKENIZER, expected, tiny_llama
from openai import OpenAI


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    tiny_llama().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    command = [
        sys.executable,
        "-m",
        "fastgen.serve.cli",
        "serve",
        str(folder),
        "--port",
        "0",
        "--cache-gib",
        "0.05",
    ]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
    line = ""
    while "http://" not in line:
        line = process.stdout.readline()
        assert line, "the server ended before it was ready"
    address = re.search(r"http://[\w.:]+", line).group().rstrip("/")
    yield OpenAI(base_url=f"{address}/v1", api_key="none"), folder
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_completions_are_those_of_transformers(server):
    client, _ = server
    found = client.completions.create(
        model="tiny",
        prompt="Once upon a time",
        max_tokens=12,
        temperature=0.0,
        extra_body={"ignore_eos": True},
    )
    ids = TOKENIZER.encode("Once upon a time")
    assert found.choices[0].text == TOKENIZER.decode(expected(tuple(ids), 12), skip_special_tokens=True)
    assert found.usage.prompt_tokens == len(ids)


def test_a_stream_says_the_same_as_a_whole_answer(server):
    client, _ = server
    asked = {
        "model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20, "seed": 5,
        "temperature": 0.9, "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(stream=True, **asked)
    ]
    assert "".join(pieces) == whole
    assert len(pieces) > 1


def test_a_schema_is_kept(server):
    client, _ = server
    schema = {
        "type": "object", "additionalProperties": False, "required": ["ok"], "properties": {"ok": {"type": "boolean"}}
    }  # fmt: skip
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "well?"}],
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema}},
    )
    assert type(json.loads(answer.choices[0].message.content)["ok"]) is bool


def test_embeddings(server):
    client, _ = server
    assert len(client.embeddings.create(model="tiny", input="a text").data[0].embedding) == 64
