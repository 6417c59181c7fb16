"""Any other causal LM of transformers: its own module, whose attention reads and writes our paged cache.

The module runs on the batch as one row, `[1, T]`, with each token's position; everything but attention treats tokens
one by one. Attention comes to `hosted.paged_attention`, registered in transformers' `AttentionInterface`, with the
attention module that calls; it finds the batch in a `Slot` that our copy of the module holds, since some models drop
keyword arguments on the way. What cannot work this way (state-space layers, attention sinks, masks of their own) is
refused when loading, and a short text is run both ways to be sure.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..batch import RaggedBatch, ragged_batch
from ..errors import ModelError
from ..kv_cache import CacheLayout, KVCache
from ..linear import Linear, LinearPolicy
from ..request import Request, SamplingParams
from ..step_plan import Scheduled, StepPlan
from .hosted import Call, HostedLinear, Probe, Slot, paged_attention

_NAME = "fastgen_paged"
_KINDS = {"full_attention", "sliding_attention", "attention"}
_PROBE_LENGTHS = (7, 4)


class GenericDecoder(nn.Module):
    """A transformers module as a `CausalModel`.

    Args:
        module: the module, of the policy's dtype and on its device. It is not changed: a copy that shares its tensors
            is. Experts that are no `nn.Linear` stay dense whatever `policy.weights` says.
        policy: how its linear layers are held.
        max_len: longest sequence.

    Raises:
        ModelError: it cannot run this way; says why.
    """

    replayable = False  # what the module asks of its tensors is not known
    weights_version = 0

    def __init__(self, module: Any, policy: LinearPolicy, max_len: int) -> None:
        super().__init__()
        _refuse(module, max_len)
        self.policy = policy
        tensors = [*module.parameters(), *module.buffers()]
        self.module: Any = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}).eval()
        self._slot = Slot()
        AttentionInterface.register(_NAME, paged_attention)
        expected = self._plain_logits()
        self._host_linears()
        self._keeps_rows = "logits_to_keep" in inspect.signature(self.module.forward).parameters
        try:
            self.module.set_attn_implementation(_NAME)
            self.numbers, self._layout = self._probe()
        except ModelError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            name = type(module).__name__
            raise ModelError(
                f"{name}: expected transformers' AttentionInterface in it, got {error}; not supported"
            ) from error
        self._check(expected)

    def _host_linears(self) -> None:
        head = self.module.get_output_embeddings()
        for name, found in list(self.module.named_modules()):
            found.fastgen_slot = self._slot  # any of them may be the one that calls attention
            if type(found) is nn.Linear:
                policy = self.policy.dense() if found is head else self.policy
                self.module.set_submodule(name, HostedLinear(found, policy, self._slot))

    def _probe(self) -> tuple[dict[int, int], CacheLayout]:
        probe = Probe()
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.policy.device)
        with self._slot.holding(probe):
            self.module(input_ids=ids, position_ids=ids, use_cache=False)
        config = self.module.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or []
        if len(probe.shapes) != config.num_hidden_layers:
            raise ModelError(
                f"expected {config.num_hidden_layers} layers to attend, got {len(probe.shapes)}; not supported"
            )
        if len(set(probe.shapes.values())) != 1:
            raise ModelError(
                f"attention: expected layers of one shape, got {sorted(set(probe.shapes.values()))}"
            )
        for layer, kind in enumerate(kinds):
            if kind == "sliding_attention" and not probe.windows.get(layer):
                raise ModelError(f"layer {layer}: expected its sliding window as an argument; not supported")
        numbers = {layer: number for number, layer in enumerate(sorted(probe.shapes))}
        num_kv_heads, head_dim = next(iter(probe.shapes.values()))
        return numbers, CacheLayout(len(numbers), num_kv_heads, head_dim, self.policy.dtype)

    def _texts(self) -> list[list[int]]:
        """Two short texts of known tokens."""
        vocab = self.module.get_input_embeddings().weight.shape[0]
        return [[(7 * i + 3 * length) % vocab for i in range(length)] for length in _PROBE_LENGTHS]

    @torch.no_grad()
    def _plain_logits(self) -> Tensor:
        """Of each text's last token, as the module has them by itself."""
        texts = [torch.tensor([text], device=self.policy.device) for text in self._texts()]
        return torch.stack([self.module(text, use_cache=False).logits[0, -1] for text in texts]).float()

    def _check(self, expected: Tensor) -> None:
        """Run the texts packed, in two steps, and compare."""
        cache = KVCache(self._layout, len(_PROBE_LENGTHS), max(_PROBE_LENGTHS), self.policy.device)
        requests = [Request(str(i), text, SamplingParams()) for i, text in enumerate(self._texts())]
        logits = expected
        for start, stop in ((0, -2), (-2, None)):
            parts = []
            for number, request in enumerate(requests):
                sequence = request.sequences[0]
                sequence.block_table = [number]
                chosen = range(sequence.num_tokens)[start:stop]
                parts.append(Scheduled(sequence, chosen.start, len(chosen)))
            logits = self(ragged_batch(StepPlan(parts), cache.block_size, self.policy.device), cache)
        error = float((logits - expected).norm() / expected.norm().clamp(min=1e-20))
        allowed = 1e-3 if self.policy.dtype is torch.float32 else 0.1
        if self.policy.weights.value != "dense":
            allowed = 0.5  # quantised weights have another answer; what this looks for is noise
        if not error <= allowed:
            raise ModelError(
                f"{type(self.module).__name__}: its logits in ragged batches differ from its own by {error:.2g} "
                f"(allowed {allowed}); this model is not supported"
            )

    @torch.no_grad()
    def forward(self, batch: RaggedBatch, cache: KVCache) -> Tensor:
        """See `CausalModel`."""
        rows = batch.logits_rows_L
        kept = {"logits_to_keep": rows} if self._keeps_rows else {}
        logits = self._run(self.module, batch, cache, **kept).logits[0]
        return (logits if self._keeps_rows else logits[rows]).float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def hidden(self, batch: RaggedBatch, cache: KVCache) -> Tensor:
        """See `CausalModel`."""
        base = self.module.base_model
        base = self.module.get_decoder() if base is self.module else base
        return self._run(base, batch, cache).last_hidden_state[0]  # type: ignore[no-any-return]

    def _run(self, module: Any, batch: RaggedBatch, cache: KVCache, **others: Any) -> Any:
        ids_1T, positions_1T = batch.input_ids_T.unsqueeze(0), batch.positions_T.unsqueeze(0)
        with self._slot.holding(Call(batch, cache, self.numbers)):
            return module(input_ids=ids_1T, position_ids=positions_1T, use_cache=False, **others)

    def cache_layout(self, dtype: torch.dtype | None) -> CacheLayout:
        """See `CausalModel`."""
        own = self._layout
        return CacheLayout(own.num_layers, own.num_kv_heads, own.head_dim, dtype or own.dtype)

    def activation_bytes(self, num_tokens: int, num_logits: int) -> int:
        """See `CausalModel`: of a module that is not known, as much as of a wide block."""
        config, size = self.module.config.get_text_config(), self.policy.dtype.itemsize
        hidden, vocab = int(config.hidden_size), int(config.vocab_size)
        inner: int = max(getattr(config, "intermediate_size", None) or 0, 4 * hidden)
        return num_tokens * (8 * hidden + 4 * inner) * size + num_logits * vocab * (2 * size + 8)

    def length_class(self, longest: int) -> int:
        """See `CausalModel`."""
        return 0

    def linears(self) -> list[tuple[str, Linear]]:
        """Its linear layers but the logits', by their names in the module."""
        head = self.module.get_output_embeddings()
        return [
            (name, found.inner)
            for name, found in self.module.named_modules()
            if isinstance(found, HostedLinear) and found is not head
        ]


def _refuse(module: Any, max_len: int) -> None:
    """What is known from the config alone not to work."""
    config = module.config
    name = type(module).__name__
    if getattr(config, "is_encoder_decoder", False) or not hasattr(module, "get_output_embeddings"):
        raise ModelError(f"{name}: expected a decoder-only causal LM; not supported")
    if getattr(module, "_is_stateful", False):
        raise ModelError(f"{name}: expected attention in every layer, got layers with a state; not supported")
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or []) - _KINDS
    if kinds:
        raise ModelError(
            f"{name}: layer_types: expected {sorted(_KINDS)}, got {sorted(kinds)}; not supported"
        )
    for kind, limit in _rope_limits(config.get_text_config()):
        if max_len > limit:
            raise ModelError(
                f"{name}: rope_type {kind!r}: its angles depend on the longest text of a batch; expected at most "
                f"{limit} tokens, got {max_len}; set max_model_len={limit}"
            )


def _rope_limits(config: Any) -> list[tuple[str, int]]:
    """(kind, length up to which its angles are constant) of rotary embeddings whose angles depend on the length."""
    stated = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    several = [each for each in stated.values() if isinstance(each, dict)] or [stated]
    limits = []
    for parameters in several:
        kind = parameters.get("rope_type", parameters.get("type"))
        if kind == "dynamic":
            limits.append((kind, config.max_position_embeddings))
        elif kind == "longrope":
            original = parameters.get("original_max_position_embeddings")
            limits.append((kind, original or config.original_max_position_embeddings))
    return limits
