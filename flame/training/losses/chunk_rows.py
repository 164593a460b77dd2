"""How many tokens' logits exist together, where a recipe does not say."""

ON_GPU = 2**27
"""Logits of a chunk on a GPU; 256 MiB in bf16."""

ROWS_ON_GPU, ROWS_OF_FROZEN = 4096, 1024
"""The fewest tokens of a chunk on a GPU, where the output projection is trained, and where not.

A chunk of `n` tokens reads and writes the projection's whole float32 gradient, 8·V·D bytes, and
takes 6·n·V·D operations. A GPU that does 150 operations in the time of a byte (H100: 500 T/s,
3.35 TB/s) spends 200 / n of the products' time on it: 5 % at 4,096 tokens, 180 % at 110.
"""

ON_CPU = 2**23
"""Logits of a chunk on a CPU; 32 MiB in fp32, which a cache can hold."""

ROWS_ON_CPU = 256
"""The fewest tokens of a chunk on a CPU, whose memory is slower for its arithmetic's speed."""


def chunk_rows(vocabulary: int, trained: bool, device_type: str) -> int:
    """Return the tokens of a chunk.

    Args:
        vocabulary: V, logits of a token.
        trained: whether the output projection's gradient is summed over chunks.
        device_type: `cuda` or `cpu`.
    """
    if device_type == "cpu":
        return max(ROWS_ON_CPU, ON_CPU // vocabulary)
    return max(ROWS_ON_GPU if trained else ROWS_OF_FROZEN, ON_GPU // vocabulary)
