"""Tiny random models of every family, and a driver that runs sequences through a decoder without a scheduler."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from fastgen.batch import ragged_batch
from fastgen.config import CachePolicy, EngineConfig
from fastgen.kv_cache import KVCache, build_cache
from fastgen.replays import Replays
from fastgen.request import Request, SamplingParams, Sequence
from fastgen.step_plan import Scheduled, StepPlan
from fastgen.weights import LoadedModel

VOCAB = 128
BLOCK = 4
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GQA = {**_COMMON, "num_key_value_heads": 2}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
_FALCON = {name: value for name, value in _COMMON.items() if name != "intermediate_size"}
_OPT = {**_FALCON, "ffn_dim": 96}
_BLOOM = {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4}


def _scaled(kind: str, **parameters: Any) -> dict[str, Any]:
    if int(transformers.__version__.split(".")[0]) < 5:
        return {"rope_theta": 10000.0, "rope_scaling": {"rope_type": kind, **parameters}}
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GQA),
    "llama-biases": (
        "llama",
        {**_GQA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-linear": ("llama", {**_GQA, **_scaled("linear", factor=4.0)}),
    "llama-dynamic": ("llama", {**_GQA, **_scaled("dynamic", factor=4.0)}),
    "llama-yarn": (
        "llama",
        {**_GQA, **_scaled("yarn", factor=4.0, original_max_position_embeddings=64)},
    ),
    "llama3": (
        "llama",
        {
            **_GQA,
            **_scaled(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        },
    ),
    "mistral": ("mistral", {**_GQA, "sliding_window": 8, "head_dim": 32}),
    "qwen2": ("qwen2", _GQA),
    "qwen2-windows": (
        "qwen2",
        {**_GQA, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {**_GQA, "head_dim": 32}),
    "gemma": ("gemma", {**_COMMON, "num_key_value_heads": 1, "head_dim": 32}),
    "gemma2": ("gemma2", {**_GQA, **_TWO_KINDS, "head_dim": 32, "query_pre_attn_scalar": 24}),
    "gemma3": ("gemma3_text", {**_GQA, **_TWO_KINDS, "head_dim": 32, "query_pre_attn_scalar": 24}),
    "phi": ("phi", _GQA),
    "phi-qk-norm": ("phi", {**_COMMON, "qk_layernorm": True}),
    "phi3": ("phi3", {**_GQA, "sliding_window": 8}),
    "phi3-longrope": (
        "phi3",
        {
            **_GQA,
            "original_max_position_embeddings": 32,
            **_scaled(
                "longrope",
                short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                long_factor=[2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
                original_max_position_embeddings=32,
            ),
        },
    ),
    "falcon": ("falcon", _FALCON),
    "falcon-new": ("falcon", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-new-one-norm": (
        "falcon",
        {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-alibi": (
        "falcon",
        {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "opt": ("opt", _OPT),
    "opt-norm-after": ("opt", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "gpt2": ("gpt2", _GPT),
    "gpt2-scales": ("gpt2", {**_GPT, "scale_attn_by_inverse_layer_idx": True, "n_inner": 80}),
    "gpt-neox": ("gpt_neox", {**_COMMON, "use_parallel_residual": True}),
    "gpt-neox-serial": ("gpt_neox", {**_COMMON, "use_parallel_residual": False, "attention_bias": False}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 8}),
    "bloom": ("bloom", {**_BLOOM, "n_head": 4}),
    "bloom-normed": ("bloom", {**_BLOOM, "apply_residual_connection_post_layernorm": True}),
    "mixtral": ("mixtral", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "qwen2_moe",
        {
            **_GQA,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {
            **_GQA,
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
}


def make_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model with every parameter random: ones and zeros would hide a norm or bias that is lost."""
    model_type, fields = MODELS[name]
    return random_model(model_type, {**fields, **changes}, seed)


def random_model(model_type: str, fields: dict[str, Any], seed: int = 0) -> Any:
    """See `make_model`."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **fields)
    # the plainest oracle; but Falcon's eager attention adds ALiBi twice, once in the mask
    plain = "sdpa" if model_type == "falcon" else "eager"
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=plain
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() == 1 else 0.15
            parameter.add_(torch.randn_like(parameter) * spread)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random tokens."""
    chosen = random.Random(seed)
    return [[chosen.randrange(VOCAB) for _ in range(length)] for length in lengths]


@dataclass
class Driver:
    """Sequences in a decoder's cache, their blocks handed out in a shuffled order."""

    model: LoadedModel
    cache_dtype: torch.dtype | None = None
    num_blocks: int = 256
    replays: Replays | None = None
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        layout = self.model.decoder.cache_layout(self.cache_dtype)
        policy = CachePolicy(block_size=BLOCK, max_bytes=self.num_blocks * BLOCK * layout.token_bytes)
        self.cache: KVCache = build_cache(layout, policy, self.model.device)
        self._free = random.Random(1).sample(range(self.num_blocks), self.num_blocks)

    def add(self, token_ids: list[int], max_tokens: int = 1, adapter: str | None = None) -> Sequence:
        """A sequence of which nothing is computed yet."""
        params = SamplingParams(max_tokens=max_tokens)
        request = Request(str(len(self.sequences)), token_ids, params, adapter=adapter)
        self.sequences.append(request.sequences[0])
        return request.sequences[0]

    def forward(self, parts: list[tuple[Sequence, int]], drafts: tuple[int, ...] = ()) -> torch.Tensor:
        """The next so many tokens of each sequence; logits of each one's last."""
        scheduled = []
        for sequence, count in parts:
            last = sequence.num_computed + count + len(drafts)
            while len(sequence.block_table) * BLOCK < last:
                sequence.block_table.append(self._free.pop())
            scheduled.append(Scheduled(sequence, sequence.num_computed, count, drafts))
            sequence.num_computed += count
        batch = ragged_batch(StepPlan(scheduled), BLOCK, self.model.device)
        if self.replays is not None:
            return self.replays.run(batch).clone()
        return self.model.decoder(batch, self.cache)

    def replay(self) -> Driver:
        """Make forwards of the same shapes again."""
        self.replays = Replays(self.model.decoder, self.cache, self.model.device, 256)
        return self

    def hidden(self, sequence: Sequence) -> torch.Tensor:
        """Hidden states of a sequence's tokens, all at once."""
        while len(sequence.block_table) * BLOCK < sequence.num_tokens:
            sequence.block_table.append(self._free.pop())
        plan = StepPlan([Scheduled(sequence, 0, sequence.num_tokens)])
        return self.model.decoder.hidden(ragged_batch(plan, BLOCK, self.model.device), self.cache)

    def prefill(self, sequences: list[Sequence], chosen: random.Random) -> None:
        """All but the last token, in random chunks of random sequences."""
        while waiting := [each for each in sequences if each.num_uncomputed > 1]:
            some = chosen.sample(waiting, chosen.randint(1, len(waiting)))
            self.forward([(each, chosen.randint(1, min(9, each.num_uncomputed - 1))) for each in some])

    def greedy(self, sequences: list[Sequence], num_tokens: int) -> list[list[int]]:
        """Prefill in chunks, then decode all in one batch."""
        self.prefill(sequences, random.Random(0))
        for _ in range(num_tokens):
            logits = self.forward([(each, 1) for each in sequences])
            for each, token in zip(sequences, logits.argmax(dim=-1).tolist(), strict=True):
                each.token_ids.append(token)
        return [each.output_ids for each in sequences]


def engine_config(**changes: Any) -> EngineConfig:
    """On the CPU."""
    return EngineConfig(device=torch.device("cpu"), **changes)


@torch.no_grad()
def reference_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Of every position, by transformers."""
    logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0].float()
    return logits


@torch.no_grad()
def reference_greedy(model: Any, token_ids: list[int], num_tokens: int) -> list[int]:
    """By transformers' generate."""
    ids = torch.tensor([token_ids])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
    )
    return list(made[0, len(token_ids) :].tolist())


def save(model: Any, folder: Path, **options: Any) -> Path:
    """As `save_pretrained` does."""
    model.save_pretrained(folder, **options)
    return folder
