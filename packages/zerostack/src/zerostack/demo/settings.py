"""What a run of the demo is asked to do; travels to the worker processes as JSON. Pure.

In: the command line. Out: sizes of the model and of the batch, paths, and the configuration for `initialize`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .gpt import GPTConfig

CONTEXT = 256


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run.

    Attributes:
        text: File or folder to learn from; None is Python's standard library.
        stage: ZeRO stage.
        steps: Optimizer steps in all, those before a resume included.
        num_params: About how many parameters.
        procs: Processes.
        out: Folder for everything that is written.
        seed: Of the initial values and of the samples.
        resume: Whether to go on from the last checkpoint in `out`.
        micro_batch: Sequences in one step on one process.
        twin_steps: First steps that plain DDP takes too.
        sample_bytes: Length of the text that is generated at the end.
    """

    text: str | None = None
    stage: int = 3
    steps: int = 600
    num_params: float = 4e6
    procs: int = 2
    out: str = "zerostack-demo"
    seed: int = 0
    resume: bool = False
    micro_batch: int = 4
    twin_steps: int = 25
    sample_bytes: int = 400

    def to_json(self) -> str:
        """For a worker's command line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Settings:
        """What `to_json` gave."""
        return Settings(**json.loads(text))

    @property
    def out_dir(self) -> Path:
        """`out` as a path."""
        return Path(self.out)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.out_dir / "checkpoints"

    @property
    def model(self) -> Path:
        """Where the trained model goes, as a Hugging Face directory."""
        return self.out_dir / "model"

    @property
    def losses(self) -> Path:
        """Where the loss of every step is kept."""
        return self.out_dir / "losses.json"

    def model_config(self) -> GPTConfig:
        """A model of about `num_params` parameters: heads of width 64, about one block for 48 of width."""
        sizes = [
            GPTConfig(
                context=CONTEXT, width=width, layers=max(2, round(width / 48)), heads=max(1, width // 64)
            )
            for width in (32, *range(64, 4097, 64))
        ]
        return min(sizes, key=lambda size: abs(num_params(size) - self.num_params))

    def config(self, *, bf16: bool) -> dict[str, Any]:
        """The JSON configuration that the demo trains with: DeepSpeed's own keys."""
        lr = 3e-3 * (192 / self.model_config().width)
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.1}},
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {
                    "total_num_steps": self.steps,
                    "warmup_num_steps": max(2, min(40, self.steps // 10)),
                    "warmup_type": "linear",
                    "cos_min_ratio": 0.05,
                },
            },
            "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": self.stage},
            "seed": self.seed,
        }


def num_params(size: GPTConfig) -> int:
    """Parameters of a model with tied embeddings."""
    return size.layers * (12 * size.width**2 + 4 * size.width) + size.vocab * size.width + 2 * size.width
