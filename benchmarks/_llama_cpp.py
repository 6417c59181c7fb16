"""llama.cpp as a peer of the serving benchmark: a process of the peers' environment, with a module's own weights.

In: a Llama module of transformers. Out: what `_llama_cpp_worker` measured of the same model. Before anything is timed
the peer's logits are held against the module's in float32: a peer that computes something else is no peer.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _processes import PEERS, EngineError, end
from _serving_jobs import VOCAB, Load
from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent
DTYPES = ("bf16", "f16")


def missing() -> str:
    """Why llama.cpp cannot run here, or nothing."""
    if PEERS.exists() and PEERS.with_name("llama-cpp.json").exists():
        return ""
    return "llama.cpp is left out: it is not set up here (python3 tools/dev.py peers)"


class LlamaCpp:
    """One model in one process; `stop` ends it.

    Attributes:
        version: of llama-cpp-python.
        system: what llama.cpp found the processor to have.
        error: of logits, by dtype.
        fastest: by job ("stream", "prompt") the dtype that takes less time.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        peers = json.loads(PEERS.read_text())
        threads = torch.get_num_threads()
        self._folder = tempfile.TemporaryDirectory(prefix="llama-cpp-")
        self.folder = Path(self._folder.name)
        model.save_pretrained(self.folder)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by stop()
        self.process = subprocess.Popen(
            [str(Path(peers["bin"], "python")), str(HERE / "_llama_cpp_worker.py")],
            env={**os.environ, **peers["environ"], "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            bufsize=1,
        )
        self.version = self.system = ""
        self.error: dict[str, float] = {}
        self.fastest: dict[str, str] = {}
        self._say({"folder": str(self.folder), "threads": threads})

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """One command, one answer.

        Raises:
            EngineError: the process has ended; the message has the end of what it said.
        """
        try:
            self._say({"do": do, **more})
            assert self.process.stdout is not None
            answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, ValueError):
            self.log.seek(0)
            said = "\n".join(self.log.read().splitlines()[-15:])
            raise EngineError(f"llama.cpp failed:\n{textwrap.indent(said, '    ')}") from None
        return answer

    def _say(self, command: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")

    def logits(self, dtype: str, ids: list[int]) -> torch.Tensor:
        """Of every token."""
        out = self.folder / "logits.npy"
        self.ask("logits", dtype=dtype, ids=ids, out=str(out))
        return torch.from_numpy(np.load(out))

    def stream(self, count: int) -> float:
        """Seconds of a token, alone, after a short prompt."""
        answer = self.ask("stream", dtype=self.fastest["stream"], ids=[1] * 16, count=count)
        return float(answer["seconds"])

    def prompt_rate(self, length: int) -> float:
        """Tokens a second of one prompt, alone."""
        ids = [at % VOCAB for at in range(length)]
        return length / float(self.ask("prompt", dtype=self.fastest["prompt"], ids=ids)["seconds"])

    def rate(self, load: Load, places: int) -> float:
        """Tokens a second of a mixed load."""
        answer = self.ask("serve", dtype=self.fastest["prompt"], load=load, places=places)
        if answer["tokens"] != sum(count for _, count in load):
            raise EngineError(f"llama.cpp made {answer['tokens']} tokens, other than were asked for")
        return float(answer["tokens"] / answer["seconds"])

    def describe(self) -> dict[str, Any]:
        """Version, what the processor was found to have, errors, chosen dtypes."""
        errors = {f"llama_cpp_{dtype}_error": error for dtype, error in self.error.items()}
        chosen = {f"llama_cpp_{job}": dtype for job, dtype in self.fastest.items()}
        return {"llama_cpp": self.version, "llama_cpp_system": self.system, **errors, **chosen}

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        end(self.process)
        self.log.close()
        self._folder.cleanup()


def begin(model: LlamaForCausalLM) -> LlamaCpp:
    """llama.cpp with a model's weights in both dtypes, checked, and tried: `fastest` has the better one for each job.

    Raises:
        EngineError: it computes something else than the model.
    """
    peer = LlamaCpp(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (256,), generator=generator).tolist()
    try:
        whole: Any = copy.deepcopy(model)
        exact = logits(whole.float(), ids[:64])
        allowed = 2.0 * off(logits(model, ids[:64]), exact)  # transformers in bfloat16 is not exact either
        for dtype in DTYPES:
            answer = peer.ask("load", dtype=dtype)
            peer.version, peer.system = answer["version"], answer["system"]
            peer.error[dtype] = off(peer.logits(dtype, ids[:64]), exact)
            if not peer.error[dtype] <= allowed:
                raise EngineError(
                    f"llama.cpp in {dtype}: expected logits within {allowed:.2%} of the module's, "
                    f"got {peer.error[dtype]:.2%}"
                )
        jobs: dict[str, dict[str, Any]] = {"prompt": {"ids": ids}, "stream": {"ids": ids[:16], "count": 32}}
        for job, more in jobs.items():
            tries = {
                dtype: min(peer.ask(job, dtype=dtype, **more)["seconds"] for _ in range(3))
                for dtype in DTYPES
            }
            peer.fastest[job] = min(DTYPES, key=tries.__getitem__)
    except BaseException:
        peer.stop()
        raise
    return peer


def check(model: LlamaForCausalLM) -> None:
    """Hold llama.cpp against a small model with weights in float32 whose attention looks at few tokens.

    Random weights attend to all tokens alike, so that a wrong order of rotary pairs would hardly show in them.

    Raises:
        EngineError: other logits, or other greedy tokens.
    """
    whole: Any = copy.deepcopy(model)
    sharp = whole.float()
    for layer in sharp.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= 10.0
    ids = torch.randint(model.config.vocab_size, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = sharp.generate(torch.tensor([ids]), max_new_tokens=32, min_new_tokens=32, do_sample=False)
    peer = LlamaCpp(sharp)
    try:
        peer.ask("load", dtype="f32")
        far = off(peer.logits("f32", ids), logits(sharp, ids))
        chosen = peer.ask("stream", dtype="f32", ids=ids, count=32)["output"]
    finally:
        peer.stop()
    if far > 2e-3 or chosen != expected[0, len(ids) :].tolist():  # its cache is float16
        raise EngineError(
            f"llama.cpp computes another model: logits off by {far:.2%}, greedy tokens {chosen}"
        )


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Of every token, by transformers."""
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits[0].float()
    return found


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|difference| / |expected|, over all tokens."""
    return float((found - expected).norm() / expected.norm())
