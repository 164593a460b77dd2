"""Where channels lie in the mixers of transformers' hybrids, which fuse projections.

All fuse the short convolutions into one over [all q, all k, all v]. Qwen3.5 fuses the projections
of q, k and v in the same order; Qwen3-Next interleaves those of q, k, v and the gate z by key head:
[q, k, v of the group, z of the group] for each; Olmo-Hybrid has them apart.
"""

from pruning.adapters.projections import MixerSizes
from pruning.layouts import Blocks, HeadMajor, Joined, Layout, SharedHeads, Strided
from pruning.spaces import Kind


def qkv_flat(kind: Kind, sizes: MixerSizes) -> Layout:
    """The rows of [all q, all k, all v] that a kind of space indexes."""
    heads, d_k, d_v = sizes.heads, sizes.key_width, sizes.value_width
    keys, group = heads * d_k, sizes.value_heads // heads
    size = 2 * keys + sizes.value_heads * d_v
    if kind == "key":
        counts, strides = (heads, d_k, 1), (d_k, 1, 0)
        return Joined(tuple(Strided(size, counts, strides, start) for start in (0, keys)))
    if kind == "value":
        return Strided(size, (1, d_v, sizes.value_heads), (0, 1, d_v), 2 * keys)
    of_keys = [Strided(size, (1, heads, d_k), (0, d_k, 1), start) for start in (0, keys)]
    block = group * d_v
    return Joined((*of_keys, Strided(size, (1, heads, block), (0, block, 1), 2 * keys)))


def qkvz_by_head(kind: Kind, sizes: MixerSizes) -> Layout:
    """The rows of [q, k, v of the group, z of the group] of each key head, one after another."""
    heads, d_k, d_v = sizes.heads, sizes.key_width, sizes.value_width
    group = sizes.value_heads // heads
    length = 2 * d_k + 2 * group * d_v
    size = heads * length
    if kind == "head":
        return Blocks(heads, length)
    if kind == "key":
        counts, strides = (heads, d_k, 1), (length, 1, 0)
        return Joined(tuple(Strided(size, counts, strides, start) for start in (0, d_k)))
    starts = [2 * d_k + place * d_v for place in range(2 * group)]
    return Joined(tuple(Strided(size, (1, d_v, heads), (0, 1, length), at) for at in starts))


def ba_by_head(sizes: MixerSizes) -> Layout:
    """The rows of [b of the group, a of the group] of each key head, for a head space."""
    return Blocks(sizes.heads, 2 * sizes.value_heads // sizes.heads)


def value_heads(sizes: MixerSizes) -> Layout:
    """A position for each value head, for a head space."""
    return Blocks(sizes.heads, sizes.value_heads // sizes.heads)


def value_channels(kind: Kind, sizes: MixerSizes) -> Layout:
    """Positions of every value channel of every value head, for a value or a head space."""
    if kind == "value":
        return SharedHeads(sizes.value_heads, sizes.value_width)
    return Blocks(sizes.heads, sizes.value_heads // sizes.heads * sizes.value_width)


def key_channels(kind: Kind, sizes: MixerSizes) -> Layout:
    """Positions of every key channel of every key head, for a key or a head space."""
    if kind == "key":
        return HeadMajor(sizes.heads, sizes.key_width)
    return Blocks(sizes.heads, sizes.key_width)
