"""The demo's model, exported, has the same logits in transformers; the command that serves it is in test_demo."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from zerostack.demo.export import export
from zerostack.demo.gpt import GPT, GPTConfig

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_demos_model(tied, tmp_path):
    torch.manual_seed(0)
    size = GPTConfig(layers=3, width=48, heads=4, context=64, tied=tied)
    model = GPT(size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # norms, too
    export(model.state_dict(), size, tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(size.vocab, (2, size.context))
    with torch.no_grad():
        ours, theirs = model(tokens), loaded(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    other = GPT(dataclasses.replace(size))
    assert not torch.allclose(other(tokens), theirs, atol=0.1)


def test_every_byte_is_its_own_token(tmp_path):
    size = GPTConfig(layers=1, width=32, heads=2)
    export(GPT(size).state_dict(), size, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    dice = random.Random(0)
    text = "def f(x):\n\treturn  'ä€😀' \r\n" + "".join(chr(dice.randrange(1, 0xD800)) for _ in range(500))
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(list(range(128))) == bytes(range(128)).decode()
