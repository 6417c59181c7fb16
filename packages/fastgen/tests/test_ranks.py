"""Two processes with one model say what one says, and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_lab import TOKENIZER, embedded, prompts, run, tiny_llama, tokens
from fake_engine import FakeEngine
from fastgen import CachePolicy, EngineConfig, SamplingParams, SchedulePolicy, Speculation, build_engine
from fastgen.errors import ConfigError, ModelError, RankError, RequestError
from fastgen.ranks import Leader, lead
from fastgen.ranks.calls import Add, Call, Digest, Step, packed
from fastgen.ranks.follower import obey
from fastgen.ranks.places import narrow, shares
from server_lab import wait_until
from transformers import LlamaConfig, LlamaForCausalLM


def few_blocks(folder: Path) -> EngineConfig:
    """So few that requests give way to each other; guesses by a copy of the model, which is right."""
    return EngineConfig(
        cache=CachePolicy(block_size=8, max_bytes=9 * 2**13, swap_bytes=2**17),
        schedule=SchedulePolicy(max_sequences=8, gap_s=1e-3),  # rank 0's clock decides for both
        speculation=Speculation(num_drafts=3, draft_model=str(folder / "model")),
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    tiny_llama().save_pretrained(made / "model")
    TOKENIZER.save_pretrained(made / "model")
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    wrapped.save_pretrained(made / "adapter")
    wrapped.unload()
    return made


def test_swaps_guesses_samples_and_adapters_are_those_of_one_process(folder: Path) -> None:
    with lead(folder / "model", few_blocks(folder), ranks=2) as leader:
        _says_what_one_process_says(leader, folder)
        _refused_calls_are_refused_everywhere(leader)
    assert not torch.distributed.is_initialized()


def _says_what_one_process_says(leader: Leader, folder: Path) -> None:
    alone = build_engine(folder / "model", few_blocks(folder))
    greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    drawn = SamplingParams(max_tokens=24, temperature=1.0, ignore_eos=True, n=2)  # by the engine's own seeds
    texts = prompts(6, longest=30)
    jobs = {f"job-{number}": (ids, drawn if number % 3 == 2 else greedy) for number, ids in enumerate(texts)}
    found = [run(engine, jobs) for engine in (leader, alone)]  # type: ignore[arg-type]
    for name, (_, params) in jobs.items():
        for index in range(params.n):
            assert tokens(found[0][name], index) == tokens(found[1][name], index)
    for stats in (leader.stats(), alone.stats()):
        assert stats.preempted_total > 0
        assert stats.accepted_tokens_total > 0
    plain = tokens(found[1]["job-0"])
    told = []
    for engine in (leader, alone):
        engine.load_adapter("a", str(folder / "adapter"))
        engine.add("adapted", texts[0], greedy, adapter="a")
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        told.append(tokens(outputs))
    assert told[0] == told[1] != plain


def _refused_calls_are_refused_everywhere(leader: Leader) -> None:
    """And the ranks stay together."""
    with pytest.raises(RequestError, match="token ids below"):
        leader.add("wrong", [10**6], SamplingParams())
    with pytest.raises(ModelError):
        leader.load_adapter("none", "/no/such/folder")
    ids = TOKENIZER.encode("Once upon a time")
    leader.add("left", ids, SamplingParams(max_tokens=50))
    leader.step()
    leader.abort("left")
    leader.abort("unknown")
    assert leader.stats().blocks_used == 0
    assert embedded(leader, ids) == pytest.approx(embedded(leader, ids))
    leader.add("after", ids, SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
    told = []
    while leader.has_work:
        told += leader.step()
    assert len(tokens(told)) == 5


def test_a_rank_that_says_something_else_gives_up() -> None:
    def messages(expected: list[int]) -> Callable[[], bytes]:
        """A request, a step, and another step with what rank 0 has said so far."""
        params = SamplingParams(max_tokens=9)
        calls: list[list[Call]] = [[Add("x", [1, 2], params), Add("y", [10**6], params), Step()], [Step()]]
        left = [packed(each, digest) for each, digest in zip(calls, expected, strict=True)]
        return lambda: left.pop(0)

    digest, engine = Digest(), FakeEngine()
    engine.add("x", [1, 2], SamplingParams(max_tokens=9))
    digest.refused(RequestError())
    digest.outputs(engine.step())
    with pytest.raises(IndexError):  # all messages are obeyed
        obey(FakeEngine(), messages([0, digest.value]))  # type: ignore[arg-type]
    with pytest.raises(RankError, match="expected the same tokens and errors as rank 0"):
        obey(FakeEngine(), messages([0, digest.value ^ 1]))  # type: ignore[arg-type]


def test_what_cannot_be_cut_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **shape)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="multiple of 2 ranks, got 1"):
        lead(tmp_path, EngineConfig(device=torch.device("cpu")), ranks=2)
    assert not torch.distributed.is_initialized()
    assert "Traceback" not in capfd.readouterr().err


def test_what_cannot_be_started_is_refused_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="use build_engine"):
        lead("model", ranks=1)
    with pytest.raises(ConfigError, match="expected 'cuda' for 2 processes"):
        lead("model", EngineConfig(device=torch.device("cuda:1")), ranks=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match="a GPU for each of 4 processes, got 3"):
        lead("model", EngineConfig(device=torch.device("cuda")), ranks=4)


def test_each_process_has_a_device_or_its_part_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    configs = shares(EngineConfig(device=torch.device("cuda")), 3, processes=6)
    assert [(each.device, each.cache.fraction) for each in configs] == [
        (torch.device("cuda", rank), 0.8) for rank in range(3)
    ]
    configs = shares(EngineConfig(device=torch.device("cpu")), 2, processes=4)
    assert [each.cache.fraction for each in configs] == [0.2, 0.2]
    for seen, narrowed in [("", "2,3"), ("7,5,3,1", "3,1")]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        narrow(2, 2)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == narrowed


PROGRAM = """
import sys
import torch
from fastgen import EngineConfig, CachePolicy, SamplingParams, SchedulePolicy
from fastgen.ranks import lead
if __name__ == "__main__":
    config = EngineConfig(cache=CachePolicy(max_bytes=2**20), device=torch.device("cpu"))
    with lead(sys.argv[1], config, ranks=2) as leader:
        print(leader._followers[0].process.pid, flush=True)
        leader.add("x", [1], SamplingParams(max_tokens=400, ignore_eos=True))
        while True:
            leader.step()
"""


def test_a_killed_leader_leaves_no_process(folder: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(folder / "model")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as popen:
        assert popen.stdout is not None
        follower = int(popen.stdout.readline())
        popen.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_alive(follower))


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
