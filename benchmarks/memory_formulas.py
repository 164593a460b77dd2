"""What a rank holds in each stage, as formulas; `benchmarks.memory` measures beside them.

Bytes beyond the program itself. Legend: R ranks; L the largest tensor, in the stored dtype; W bytes
of a compute number; T tokens of a calibration sequence. Nothing but a rank's share of the model
(`resident`) grows with the number of layers, and the sums, which are a few matrices a layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from benchmarks.cost_formulas import Shapes, shapes_of
from flame.checkpoint.source import TensorInfo
from flame.checkpoint.streaming import BUFFER, held_by_streaming

REPLAYED = 2**25
"""`pruning.replay.NUMBERS_AT_ONCE`."""


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, from its `config.json` alone."""

    config: Mapping[str, Any]

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        from flame.hugging_face.stock_form import stock_form

        return stock_form(dict(self.config)).shapes

    @cached_property
    def shapes(self) -> Shapes:
        return shapes_of(self.config)

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """The tensors as they are on a disk."""
        return {name: TensorInfo(shape, torch.bfloat16) for name, shape in self.tensors.items()}

    @property
    def stored(self) -> int:
        """Bytes of the whole model on a disk."""
        return sum(info.nbytes for info in self.infos.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor on a disk."""
        return max(info.nbytes for info in self.infos.values())

    @cached_property
    def spaces(self) -> Any:
        from pruning.adapters import adapter_for

        return adapter_for(dict(self.config)).spaces(dict(self.config))

    def sums(self, *names: str) -> int:
        """Bytes of the statistics that these methods need, or a repair (`repair`)."""
        from pruning.calibrate import kinds_of
        from pruning.calibration.stats_file import zeros
        from pruning.statistics import OutputEquations

        kinds = (OutputEquations,) if names == ("repair",) else kinds_of(names, dict(self.config))
        found = zeros(self.spaces, kinds, int(self.config["hidden_size"]), "meta")
        every = [statistic for of_space in found.values() for statistic in of_space.values()]
        return sum(total.nbytes for one in every for total in one.state_dict().values())

    def choosing(self, method: str, repairs: bool = False) -> int:
        """Bytes that a plan for key channels holds."""
        from pruning.methods import METHODS
        from pruning.planning.held import held_by_choosing

        of_kind = [space for space in self.spaces if space.kind == "key"]
        layers = [space for space in self.spaces if space.kind == "head" and repairs]
        chosen = METHODS[method]()
        return held_by_choosing(
            dict(self.config), self.infos, of_kind, chosen, chosen.needs, layers
        )

    @property
    def mixers(self) -> int:
        """Numbers of the linear layers' mixers."""
        layers = {f".layers.{space.layer}.linear_attn." for space in self.spaces}
        named = self.tensors.items()
        return sum(math.prod(s) for n, s in named if any(layer in n for layer in layers))


def resident(sizes: Sizes, ranks: int) -> int:
    """A rank's share of the model, in float32."""
    shapes = sizes.shapes
    whole = sum(map(math.prod, [*shapes.replicated, *shapes.buffers]))
    return 4 * (sum(shapes.padded(ranks)) // ranks + whole)


def gathered(sizes: Sizes, width: int) -> int:
    """What FSDP2 gathers at once: the rest and its copy, or the rest, two blocks and theirs."""
    rest = sum(map(math.prod, sizes.shapes.rest))
    block = max(sum(map(math.prod, shapes)) for shapes in sizes.shapes.blocks)
    return width * max(2 * rest, rest + 4 * block)


def bounds(sizes: Sizes, ranks: int, tokens: int, width: int) -> dict[str, int]:
    """Most bytes that a rank holds, by stage."""
    config = sizes.config
    heads, d_k, d_v = (
        config[f"linear_{n}"] for n in ("num_key_heads", "key_head_dim", "value_head_dim")
    )
    out = config["linear_num_value_heads"] * d_v
    of_group = out // heads
    widest = max(shape[0] for block in sizes.shapes.blocks for shape in block if len(shape) == 2)
    share = resident(sizes, ranks)
    # Several tensors as wide as the widest layer, and a layer's own operator.
    working = gathered(sizes, width) + 16 * width * tokens * widest
    replay = 8 * width * min(REPLAYED, 2 * d_k * tokens * (d_k + of_group))
    replay += d_k * of_group * (width * tokens + 16 * min(tokens, 512))
    streaming = held_by_streaming(sizes.infos)
    found = {
        "load": share + 3 * sizes.largest // ranks,
        "calibrate": share + working + replay + sizes.sums("output-error", "drrqr"),
        "calibrate for the repair": share
        + 4 * sizes.mixers // ranks
        + working
        + 4 * width * tokens * out
        + sizes.sums("repair"),
    }
    found = {stage: size + BUFFER for stage, size in found.items()}
    return found | {
        "plan, by weights": sizes.choosing("l1"),
        "plan, by statistics": sizes.choosing("output-error"),
        "plan with the repair": sizes.choosing("output-error", repairs=True),
        **dict.fromkeys(("apply", "apply to dcp", "convert to dcp", "convert to hf"), streaming),
    }
