"""One rank's run: plain DDP for the first steps, ZeRO for all of them, then the proofs.

In: `Settings`, a process group. Out: files in `settings.out_dir`, text on the first rank, an exit status. This is
the page to read to see the umbrella in use: `build`, `train` and `prove_resume` are what a user would write.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import zero_core as zero
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .. import policies, ranks
from ..api import initialize
from ..auto import Surroundings
from ..engine import Engine
from ..explain import num_bytes
from ..machine import resident_bytes
from ..resolve import effective
from . import held, report, text
from .export import export
from .gpt import GPT
from .settings import CONTEXT, Settings

INTERRUPTED = 130


@dataclass
class Stop:
    """Whether somebody wants this run to end; the ranks agree on it once a step."""

    parent: int = field(default_factory=os.getppid)
    asked: bool = False

    def install(self) -> None:
        """Let Ctrl-C ask instead of interrupt."""
        signal.signal(signal.SIGINT, self._ask)
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, signum: int, frame: Any) -> None:
        self.asked = True

    @property
    def wanted(self) -> bool:
        """Asked to stop, or left behind by the process that started this one."""
        return self.asked or os.getppid() != self.parent


@dataclass
class Run:
    """What every phase of a run needs."""

    settings: Settings
    corpus: text.Corpus
    group: dist.ProcessGroup
    device: torch.device
    bf16: bool
    stop: Stop
    losses: report.Losses = field(default_factory=report.Losses)

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.group.rank() == 0

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's samples of a step."""
        tokens, targets = self.corpus.batch(
            seed=self.settings.seed,
            step=step,
            rank=self.group.rank(),
            size=self.settings.micro_batch,
            context=CONTEXT,
        )
        return tokens.to(self.device), targets.to(self.device)

    def agree(self, loss: float) -> tuple[float, bool]:
        """Mean loss over ranks, and whether any of them was asked to stop."""
        total, asked = ranks.all_sum([loss, float(self.stop.wanted)], self.group)
        return total / self.group.size(), asked > 0


def build(run: Run) -> Engine:
    """The model, sharded as it is made, and its engine."""
    torch.manual_seed(run.settings.seed)
    mesh = init_device_mesh(run.device.type, (run.group.size(),), mesh_dim_names=("dp",))
    with zero.sharded_init(mesh, stage=run.settings.stage):
        model = GPT(run.settings.model_config())
    engine, _, _, _ = initialize(model=model, config=run.settings.config(bf16=run.bf16), mesh_device=mesh)
    return engine


def train_twin(run: Run, engine: Engine) -> list[float]:
    """The first steps with plain DDP: same initial values, same data, same optimizer, nothing sharded."""
    model = GPT(run.settings.model_config()).to(run.device)
    model.load_state_dict(
        {name: value.float() for name, value in zero.full_state_dict(engine.module).items()}
    )
    ddp = DistributedDataParallel(model)
    settings = effective(run.settings.config(bf16=run.bf16), Surroundings(world=run.group.size()))
    optimizer = policies.optimizer(settings.config, ddp.parameters())
    scheduler = policies.scheduler(settings.config, optimizer)
    losses: list[float] = []
    for step in range(min(run.settings.twin_steps, run.settings.steps)):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            loss = ddp(*run.batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), settings.config.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        mean, asked = run.agree(loss.item())
        losses.append(mean)
        if asked:
            break
    return losses


def step_once(run: Run, engine: Engine) -> torch.Tensor:
    """One step of training: what stands in a user's loop."""
    loss: torch.Tensor = engine(*run.batch(engine.global_steps))
    engine.backward(loss)
    engine.step()
    return loss


def train(run: Run, engine: Engine) -> bool:
    """Train to the last step; returns whether it was asked to stop before."""
    settings, first_step = run.settings, engine.global_steps
    tokens = settings.micro_batch * CONTEXT * run.group.size()
    bar = tqdm(
        total=settings.steps,
        initial=first_step,
        disable=not run.first,
        unit="step",
        mininterval=0.5,
        dynamic_ncols=True,
        desc=f"ZeRO-{settings.stage}",
    )
    start_s, asked = time.perf_counter(), run.agree(0.0)[1]
    with bar:
        while engine.global_steps < settings.steps and not asked:
            mean, asked = run.agree(step_once(run, engine).item())
            run.losses.ours.append(mean)
            done = engine.global_steps - first_step
            speed = done * tokens / (time.perf_counter() - start_s)
            memory = num_bytes(resident_bytes())
            bar.set_postfix_str(f"loss {mean:.3f}, {speed:,.0f} tokens/s, {memory}", refresh=False)
            bar.update()
    return asked and engine.global_steps < settings.steps


def save(run: Run, engine: Engine) -> str:
    """Save the engine and the losses so far; returns where."""
    path = engine.save_checkpoint(run.settings.checkpoints, client_state={"settings": run.settings.to_json()})
    if run.first:
        run.losses.save(run.settings.losses)
    return str(path)


def export_model(run: Run, engine: Engine) -> None:
    """Write the model for programs that serve it."""
    values = zero.full_state_dict(engine.module)
    if run.first:
        export(values, run.settings.model_config(), run.settings.model)


@torch.no_grad()
def held_out_loss(run: Run, engine: Engine, batches: int = 8) -> float:
    """Mean loss on text that was kept apart."""
    found = run.corpus.held_out_batches(count=batches, size=run.settings.micro_batch, context=CONTEXT)
    values = [float(engine(x.to(run.device), y.to(run.device))) for x, y in found]
    return sum(values) / len(values)


def measure_held(run: Run, engine: Engine) -> str:
    """Bytes on every rank after one more backward, beside what they would be without ZeRO."""
    engine.backward(engine(*run.batch(engine.global_steps)))
    everyone = ranks.gather_json(held.held_bytes(engine), run.group)
    engine.zero_grad()
    return report.held_table(everyone, held.without_zero(engine, run.settings.model_config()))


def prove_resume(run: Run, engine: Engine, steps: int = 3) -> tuple[list[float], list[float]]:
    """Losses of the next steps: going on, and from the checkpoint in an engine that knows nothing."""
    uninterrupted = [run.agree(step_once(run, engine).item())[0] for _ in range(steps)]
    fresh = build(run)
    fresh.load_checkpoint(run.settings.checkpoints)
    return uninterrupted, [run.agree(step_once(run, fresh).item())[0] for _ in range(steps)]


@torch.no_grad()
def generate(run: Run, engine: Engine) -> str:
    """Text that the model continues; every rank computes the same."""
    prompt = b"def " if run.settings.text is None else bytes(run.corpus.train[:16].tolist())
    torch.manual_seed(run.settings.seed)
    engine.eval()
    with zero.materialized(engine.module):
        tokens = torch.tensor([list(prompt)], device=run.device)
        rows = GPT.generate(engine.module, tokens, run.settings.sample_bytes)  # type: ignore[arg-type]
    engine.train()
    return bytes(rows[0].tolist()).decode("utf-8", errors="replace")
