"""The answer of /v1/embeddings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence

from .answer_schemas import Embedding, Embeddings, EmbeddingUsage
from .schemas import EmbeddingRequest


def embeddings(
    request: EmbeddingRequest, prompts: Sequence[Sequence[int]], vectors: Sequence[list[float]], model: str
) -> Embeddings:
    """Vectors of the prompts as they were asked for: numbers, or base64 of little-endian 32-bit floats."""
    packed = request.encoding_format == "base64"
    num_tokens = sum(map(len, prompts))
    return Embeddings(
        object="list",
        model=model,
        data=[
            Embedding(object="embedding", index=index, embedding=_packed(vector) if packed else vector)
            for index, vector in enumerate(vectors)
        ],
        usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )


def _packed(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
