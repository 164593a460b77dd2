"""What a job of R ranks sends and reads, as formulas; `benchmarks.cost_model` counts beside them.

Legend: R ranks of one FSDP2 mesh; a group is what FSDP2 gathers at a time, a block or the rest;
N⁺ the parameters of a group with each tensor's rows rounded up to a multiple of R, as FSDP2 pads
them; W bytes of a compute number; A accumulations. Bytes are those that a collective brings to a
rank or takes from it, padding included.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flame.training.estimate import PLAN_ENTRY, RESULT_ENTRY

Cost = tuple[Counter[str], Counter[str]]
"""Calls and bytes by the kind of the collective."""


@dataclass(frozen=True)
class Shapes:
    """The parameters of a model as FSDP2 sees them."""

    blocks: Sequence[Sequence[tuple[int, ...]]]
    """Of each block, the shapes of its sharded tensors."""
    rest: Sequence[tuple[int, ...]]
    """Of the embedding, the last norm and the output projection."""
    replicated: Sequence[tuple[int, ...]]
    """Of what every rank keeps whole: `A_log`, `dt_bias`."""
    buffers: Sequence[tuple[int, ...]] = ()

    def padded(self, ranks: int) -> tuple[int, int]:
        """N⁺ of all blocks together, and of the rest."""
        sizes = [
            sum(-(-shape[0] // ranks) * ranks * math.prod(shape[1:]) for shape in shapes)
            for shapes in (sum(map(list, self.blocks), []), self.rest)
        ]
        return sizes[0], sizes[1]

    @property
    def numbers(self) -> int:
        """All numbers that a fresh model begins with."""
        every = [*sum(map(list, self.blocks), []), *self.rest, *self.replicated, *self.buffers]
        return sum(map(math.prod, every))


def shapes_of(config: Mapping[str, object]) -> Shapes:
    """The shapes of a model from its `config.json`, without its weights."""
    from flame.model import full_precision_parameters, layers, meta_model

    model = meta_model(dict(config))
    kept = full_precision_parameters(model)
    whole = {id(parameter) for parameter in kept.values()}
    of_blocks = [[p for p in block.parameters() if id(p) not in whole] for block in layers(model)]
    in_blocks = {id(p) for block in of_blocks for p in block} | whole
    return Shapes(
        [[tuple(p.shape) for p in block] for block in of_blocks],
        [tuple(p.shape) for p in model.parameters() if id(p) not in in_blocks],
        [tuple(p.shape) for p in kept.values()],
        [tuple(b.shape) for b in model.buffers()],
    )


def fresh_start(shapes: Shapes, ranks: int) -> Cost:
    """Rank 0 draws the weights and broadcasts them, tensor by tensor: 4 N bytes; and a seed."""
    tensors = sum(map(len, shapes.blocks)) + len(shapes.rest)
    tensors += len(shapes.replicated) + len(shapes.buffers)
    return _cost(ranks, broadcast=(tensors + 1, 4 * shapes.numbers + 8))


def training_step(shapes: Shapes, ranks: int, width: int = 4, accumulations: int = 1) -> Cost:
    """All-gathers of W N⁺ (of the blocks twice), reduce-scatters of 4 N⁺, and a few small sums.

    Summed are the gradients of replicated parameters, four counts, the norms of all gradients, and
    six figures of each rank. With `reduce_gradients = "once_a_step"` the reduce-scatters are those
    of one accumulation.
    """
    calls, size = gathers(shapes, ranks, width, passes=1, backward=True)
    norms = 4 * (sum(map(len, shapes.blocks)) + len(shapes.rest))
    replicated = 4 * sum(map(math.prod, shapes.replicated))
    return _cost(
        ranks,
        all_gather=(accumulations * calls, accumulations * size),
        reduce_scatter=(
            accumulations * (len(shapes.blocks) + 1),
            accumulations * 4 * sum(shapes.padded(ranks)),
        ),
        all_reduce=(
            3 + (replicated > 0),
            replicated + norms + 32 + 24 * ranks,
        ),
    )


def gathers(shapes: Shapes, ranks: int, width: int, passes: int, backward: bool) -> tuple[int, int]:
    """All-gathers of some passes: blocks each time, again backward; the rest once until then."""
    blocks, rest = shapes.padded(ranks)
    times = passes * (2 if backward else 1)
    once = passes if backward else 1
    return times * len(shapes.blocks) + once, width * (times * blocks + once * rest)


def calibration(
    shapes: Shapes, statistics: Sequence[int], ranks: int, rounds: int, width: int = 4
) -> Cost:
    """Forward passes, a sum of all statistics, two agreements a round and a few more.

    Four gathers of small objects (a step's identity, counts, positions in the data) besides grow
    with the ranks: some 200 bytes each of each rank.

    Args:
        shapes: the model's.
        statistics: the bytes of each tensor of the statistics.
        ranks: of the job.
        rounds: sequences a rank.
        width: bytes of a compute number.
    """
    return _cost(
        ranks,
        all_gather=gathers(shapes, ranks, width, passes=rounds, backward=False),
        all_reduce=(len(statistics) + 2 * rounds, sum(statistics) + 16 * rounds),
    )


def gathered_by_a_save(sizes: Mapping[str, float], ranks: int) -> tuple[float, float]:
    """Least and most bytes that rank 0 receives for a save: plans and results of R × entries.

    All are as long as the longest, rank 0's, whose plan has all entries; each rank writes its own
    rows of every tensor and its share of the rest.
    """
    plans = ranks * PLAN_ENTRY * sizes["entries"]
    return plans, plans + ranks * RESULT_ENTRY * sizes["entries"]


READ_OF_FORM = 0.45
"""How much of an archive is read beside its numbers: directory and pickle, but no padding."""


def read_on_resume(sizes: Mapping[str, float], ranks: int, node: int) -> float:
    """Bytes that a node reads of a step on a folder that all nodes share.

    The hashes of its share of the files, the values of its share of the weights, and its own rows
    of everything; besides, on each rank, the index twice and the entries that all ranks need, and
    both once more on rank 0, whose node this is.

    Args:
        sizes: `step`, `weights`, `index` and `common`, as `benchmarks.cost_counts.sizes_of` has
            them. The index grows with the chunks: ranks that wrote the step × tensors.
        ranks, node: ranks of the job, and of the node.
    """
    shared = 2 * sizes["step"] - sizes["index"] - sizes["common"] + sizes["weights"]
    common = READ_OF_FORM * sizes["common"]
    own = 2 * sizes["index"] + common
    return shared * node / ranks + node * own + sizes["index"] + common


def read_on_init(sizes: Mapping[str, float], ranks: int, node: int) -> float:
    """As `read_on_resume`, but that only the weights are loaded."""
    shared = sizes["step"] + 2 * sizes["weights"]
    return shared * node / ranks + 2 * node * sizes["index"]


def read_on_calibration(sizes: Mapping[str, float], ranks: int, node: int) -> float:
    """As `read_on_init`; rank 0 also reads the index, and samples of the weights."""
    return read_on_init(sizes, ranks, node) + sizes["index"]


def read_by_apply(sizes: Mapping[str, float]) -> float:
    """Bytes of the step that rank 0 reads to prune it, while the others wait.

    All files once, hashed as they are read, and the form of each chunk once more; before, the
    index and samples of the weights, which are at most 12 KiB of a tensor (or three rows).
    """
    samples = min(sizes["weights"], 3 * 4096 * sizes["tensors"])
    return sizes["step"] + samples + 2 * sizes["index"] + READ_OF_FORM * sizes["form"]


def _cost(ranks: int, **kinds: tuple[int, int]) -> Cost:
    if ranks == 1:
        return Counter(), Counter()
    return (
        Counter({kind: calls for kind, (calls, _) in kinds.items()}),
        Counter({kind: size for kind, (_, size) in kinds.items()}),
    )
