"""A mixture of experts: tokens sorted by expert, one product for each expert that has any, no padding.

Where torch has a grouped product that is fast (bf16 on CUDA), all experts' products are one call, which does not wait
for the device to say how many tokens each has, so that it can be part of a CUDA graph.

In: the activations of T tokens. A router chooses `top_k` experts a token; the results come back to the tokens' order
and are added with the router's weights, in the order of choice: a token's sum does not depend on its neighbours.

Sources: Shazeer et al., arXiv:1701.06538, section 2 (routing); Gale et al., arXiv:2211.15841 (grouped, no padding).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import Weights
from ..linear import Linear, LinearPolicy
from ..parallel import Shard, TensorParallel
from . import spec as specs
from .layers import MlpLayer, rowwise


class MoeLayer(nn.Module):
    """Experts in place of an MLP; every rank holds a part of each.

    Attributes:
        grouped: all experts' products are one call.
        stacked_up: then, their weights `[experts, rows, columns]`; each expert's own is a view of it.
        stacked_down: likewise.
    """

    stacked_up: Tensor
    stacked_down: Tensor

    def __init__(
        self, spec: specs.Experts, width: int, policy: LinearPolicy, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self.spec, self.policy = spec, policy
        self.router = Linear(Shard.whole(spec.num_experts, width=width), policy.dense(), False)
        self.experts = nn.ModuleList(
            MlpLayer(spec.mlp, width, policy, parallel) for _ in range(spec.num_experts)
        )
        self.grouped = (
            policy.device.type == "cuda"
            and policy.dtype is torch.bfloat16
            and policy.weights is Weights.DENSE
            and not (policy.batch_invariant or spec.mlp.bias)
            and hasattr(F, "grouped_mm")
        )
        self.shared = MlpLayer(spec.shared, width, policy, parallel) if spec.shared else None
        gated = spec.shared is not None and spec.shared_gated
        self.shared_gate = Linear(Shard.whole(1, width=width), policy.dense(), False) if gated else None

    def forward(self, x_TE: Tensor, adapter_rows: dict[str, Tensor]) -> Tensor:
        """`[T, width]` to `[T, width]`; with several ranks, their sum is the result."""
        weights_TK, chosen_TK = self._route(x_TE)
        y_TKE = self._experts(x_TE, chosen_TK)
        y_TE: Tensor = (y_TKE * weights_TK.to(y_TKE.dtype).unsqueeze(2)).sum(dim=1)
        if self.shared is None:
            return y_TE
        shared_TE: Tensor = self.shared(x_TE, adapter_rows)
        if self.shared_gate is not None:
            shared_TE = shared_TE * rowwise(torch.sigmoid, self.shared_gate(x_TE, {}), self.policy)
        return y_TE + shared_TE

    def _route(self, x_TE: Tensor) -> tuple[Tensor, Tensor]:
        scores_TX = self.router(x_TE, {}).float().softmax(dim=-1)
        weights_TK, chosen_TK = scores_TX.topk(self.spec.top_k, dim=-1)
        if self.spec.normalized:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return weights_TK, chosen_TK

    def finish(self) -> None:
        """Once the weights are loaded: put them into one tensor where products are grouped."""
        if self.grouped:
            for name in ("up", "down"):
                layers: list[Linear] = [getattr(expert, name) for expert in self.experts]
                stacked = torch.stack([layer.weight for layer in layers])
                self.register_buffer(f"stacked_{name}", stacked, persistent=False)
                for layer, own in zip(layers, stacked, strict=True):
                    layer.weight = own

    def _experts(self, x_TE: Tensor, chosen_TK: Tensor) -> Tensor:
        """Each token's choices through their experts: `[T, top_k, width]`."""
        num_tokens, top_k = chosen_TK.shape
        chosen, order = chosen_TK.flatten().sort(stable=True)
        numbers = torch.arange(self.spec.num_experts, device=chosen.device)
        ends_X = torch.searchsorted(chosen, numbers, right=True)
        sorted_x = x_TE[order // top_k]
        y = self._grouped(sorted_x, ends_X) if self.grouped else self._one_by_one(sorted_x, ends_X.tolist())
        unsorted = torch.empty_like(y)
        unsorted[order] = y
        return unsorted.view(num_tokens, top_k, x_TE.shape[1])

    def _one_by_one(self, sorted_x: Tensor, ends: list[int]) -> Tensor:
        y = torch.empty_like(sorted_x)
        start = 0
        for expert, end in zip(self.experts, ends, strict=True):
            if end > start:
                y[start:end] = expert(sorted_x[start:end], {})
            start = end
        return y

    def _grouped(self, sorted_x: Tensor, ends_X: Tensor) -> Tensor:
        ends_X = ends_X.to(torch.int32)
        first = self.experts[0]
        assert isinstance(first, MlpLayer)
        hidden = F.grouped_mm(sorted_x, self.stacked_up.transpose(1, 2), offs=ends_X)
        return F.grouped_mm(first.activate(hidden), self.stacked_down.transpose(1, 2), offs=ends_X)
