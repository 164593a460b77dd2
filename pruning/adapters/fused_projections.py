"""Where channels lie in the mixers of transformers' hybrids, which fuse projections.

All fuse the short convolutions into one over [all q, all k, all v]. Qwen3.5 fuses the projections
of q, k and v in the same order; Qwen3-Next interleaves those of q, k, v and the gate z by key head:
[q, k, v of the group, z of the group] for each; Olmo-Hybrid has them apart.
"""

from pruning.adapters.projections import MixerSizes
from pruning.layouts import Blocks, GroupedBlocks, HeadMajor, Joined, Layout, SharedHeads, Strided
from pruning.spaces import Kind


def qkv_flat(kind: Kind, sizes: MixerSizes) -> Layout:
    """The rows of [all q, all k, all v] that a kind of space indexes."""
    heads, d_k, d_v = sizes.heads, sizes.key_width, sizes.value_width
    keys, group = heads * d_k, sizes.group
    size = 2 * keys + sizes.value_heads * d_v
    if kind == "key":
        counts, strides = (heads, d_k, 1), (d_k, 1, 0)
        return Joined(tuple(Strided(size, counts, strides, start) for start in (0, keys)))
    if kind == "value":
        return Strided(size, (1, d_v, sizes.value_heads), (0, 1, d_v), 2 * keys)
    if kind == "value-head":
        return Strided(size, (heads, group, d_v), (group * d_v, d_v, 1), 2 * keys)
    of_keys = [Strided(size, (1, heads, d_k), (0, d_k, 1), start) for start in (0, keys)]
    block = group * d_v
    return Joined((*of_keys, Strided(size, (1, heads, block), (0, block, 1), 2 * keys)))


def qkvz_by_head(kind: Kind, sizes: MixerSizes) -> Layout:
    """The rows of [q, k, v of the group, z of the group] of each key head, one after another."""
    heads, d_k, d_v = sizes.heads, sizes.key_width, sizes.value_width
    group = sizes.group
    length = 2 * d_k + 2 * group * d_v
    size = heads * length
    if kind == "head":
        return Blocks(heads, length)
    if kind == "key":
        counts, strides = (heads, d_k, 1), (length, 1, 0)
        return Joined(tuple(Strided(size, counts, strides, start) for start in (0, d_k)))
    if kind == "value-head":
        counts, strides = (heads, group, d_v), (length, d_v, 1)
        of_v_and_z = (2 * d_k, 2 * d_k + group * d_v)
        return Joined(tuple(Strided(size, counts, strides, start) for start in of_v_and_z))
    starts = [2 * d_k + place * d_v for place in range(2 * group)]
    return Joined(tuple(Strided(size, (1, d_v, heads), (0, 1, length), at) for at in starts))


def ba_by_head(kind: Kind, sizes: MixerSizes) -> Layout:
    """The rows of [b of the group, a of the group] of each key head, by head or value head."""
    heads, group = sizes.heads, sizes.group
    if kind == "head":
        return Blocks(heads, 2 * group)
    size, counts, strides = 2 * heads * group, (heads, group, 1), (2 * group, 1, 0)
    return Joined(tuple(Strided(size, counts, strides, start) for start in (0, group)))


def value_heads(kind: Kind, sizes: MixerSizes) -> Layout:
    """A position for each value head, by head or value head."""
    if kind == "head":
        return Blocks(sizes.heads, sizes.group)
    return GroupedBlocks(sizes.heads, sizes.group, 1)


def value_channels(kind: Kind, sizes: MixerSizes) -> Layout:
    """Positions of every value channel of every value head, for all but key spaces."""
    if kind == "value":
        return SharedHeads(sizes.value_heads, sizes.value_width)
    if kind == "value-head":
        return GroupedBlocks(sizes.heads, sizes.group, sizes.value_width)
    return Blocks(sizes.heads, sizes.group * sizes.value_width)


def key_channels(kind: Kind, sizes: MixerSizes) -> Layout:
    """Positions of every key channel of every key head, for a key or a head space."""
    if kind == "key":
        return HeadMajor(sizes.heads, sizes.key_width)
    return Blocks(sizes.heads, sizes.key_width)
