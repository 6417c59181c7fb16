"""The command as a user starts it: a process that serves a model, OpenAI's client, and an end on SIGTERM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
from engine_lab import TOKENIZER, expected, tiny_llama
from openai import OpenAI


@pytest.fixture(scope="module")
def client(tmp_path_factory):
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
    yield OpenAI(base_url=f"{address}/v1", api_key="none")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_completions_are_those_of_transformers(client):
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


def test_embeddings(client):
    assert len(client.embeddings.create(model="tiny", input="a text").data[0].embedding) == 64
