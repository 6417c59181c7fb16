"""What a decoder is made of: the one description that all families are translated to.

A family (`models.families`) turns a config into a `DecoderSpec`; `decoder` builds the modules from it. Every difference
between families is a value here, so that no layer asks which family it belongs to.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Placement(enum.Enum):
    """Where the norms of a block are; a is attention, m the MLP, n1 to n4 norms.

    PRE: x += a(n1(x)); x += m(n2(x)). POST: x = n1(x + a(x)); x = n2(x + m(x)). SANDWICH: x += n3(a(n1(x)));
    x += n4(m(n2(x))). PARALLEL: x += a(n1(x)) + m(n2(x)), or n1 for both. NORMED: as PRE, but what is added to is
    n1(x) and n2(x).
    """

    PRE = "pre"
    POST = "post"
    SANDWICH = "sandwich"
    PARALLEL = "parallel"
    NORMED = "normed"


@dataclass(frozen=True)
class Norm:
    """RMSNorm, or LayerNorm where `centered`.

    Attributes:
        offset: added to the weight (Gemma holds it as a difference from one).
        affine: has a weight.
        bias: has a bias.
    """

    eps: float
    centered: bool = False
    offset: float = 0.0
    affine: bool = True
    bias: bool = False


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding.

    Attributes:
        inv_freq: angle of each pair of elements for one position; the first `2 * len(inv_freq)` elements are rotated.
        interleaved: pairs are neighbours (GPT-J), not halves (Llama).
        factor: multiplies sine and cosine.
        long_inv_freq: angles of sequences that may grow longer than `original_len`; None: the same.
    """

    inv_freq: tuple[float, ...]
    interleaved: bool = False
    factor: float = 1.0
    long_inv_freq: tuple[float, ...] | None = None
    original_len: int = 0


@dataclass(frozen=True)
class Mlp:
    """A feed-forward layer.

    Attributes:
        width: of its hidden layer.
        activation: name as in transformers.
        gated: down(act(gate(x)) * up(x)), else down(act(up(x))).
        bias: of both products.
    """

    width: int
    activation: str
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True)
class Experts:
    """A mixture of experts.

    Attributes:
        num_experts: that a token is routed among.
        top_k: that it goes to.
        mlp: each expert.
        normalized: the weights of the chosen ones sum to one.
        shared: an expert for every token, added; None: none.
        shared_gated: the shared one is multiplied by a sigmoid.
    """

    num_experts: int
    top_k: int
    mlp: Mlp
    normalized: bool = True
    shared: Mlp | None = None
    shared_gated: bool = False


@dataclass(frozen=True)
class Attention:
    """An attention layer.

    Attributes:
        scale: of queries times keys.
        window: a token sees itself and `window - 1` before it; 0: all.
        rotary: which of the spec's; None: none.
    """

    scale: float
    window: int = 0
    rotary: int | None = 0


@dataclass(frozen=True)
class Layer:
    """A block: attention and an MLP, or experts."""

    attention: Attention
    mlp: Mlp | Experts


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder.

    Attributes:
        vocab_size: tokens.
        width: of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: elements of each.
        layers: in order.
        norm: of all blocks.
        placement: where the norms are.
        final_norm: before the logits.
        max_len: longest sequence it is made for.
        shared_norm: with PARALLEL, the MLP reads what attention reads.
        qkv_bias: attention's input products have a bias.
        o_bias: its output product has.
        qk_norm: of each head's queries and keys.
        softcap: of attention scores; 0: none.
        alibi_slopes: one a head, in place of positions; empty: none.
        rotaries: that layers refer to.
        embed_width: of the token embedding, projected to `width` where they differ.
        embed_scale: multiplies token embeddings.
        embed_norm: after the embedding.
        num_positions: rows of a learned position embedding; 0: none.
        position_offset: row of position 0.
        tied: the logits' weight is the embedding's.
        logits_bias: the logits have a bias.
        logits_scale: multiplies logits.
        logits_softcap: of logits; 0: none.
    """

    vocab_size: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    norm: Norm
    placement: Placement
    final_norm: Norm | None
    max_len: int
    shared_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Norm | None = None
    softcap: float = 0.0
    alibi_slopes: tuple[float, ...] = ()
    rotaries: tuple[Rotary, ...] = ()
    embed_width: int | None = None
    embed_scale: float = 1.0
    embed_norm: Norm | None = None
    num_positions: int = 0
    position_offset: int = 0
    tied: bool = False
    logits_bias: bool = False
    logits_scale: float = 1.0
    logits_softcap: float = 0.0
