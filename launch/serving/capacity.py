"""How many requests a GPU holds, and what a decoded token moves through its memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from flame.options.shared import StoredAs
from launch.serving.footprint import Footprint

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}
"""Bytes of a number."""

SCALE_BYTES = 4
"""Bytes of the scale of a state's row."""

CONV_BYTES = 2
"""Bytes of a number in the convolutions' windows, which engines keep in the model's own bf16."""


@dataclass(frozen=True)
class Server:
    """How an engine keeps models on a GPU."""

    memory: float
    """Bytes that the engine may use for weights and caches."""
    slots: int = 1
    """Recurrent states that the engine sets aside for each request."""
    weight: StoredAs = "bfloat16"
    state: StoredAs = "float32"
    kv: StoredAs = "bfloat16"


@dataclass(frozen=True)
class Capacity:
    """A model on a server; everything in bytes unless said otherwise."""

    model: Footprint
    server: Server

    @property
    def weights(self) -> int:
        return self.model.parameters * BYTES[self.server.weight]

    @property
    def state(self) -> int:
        """Recurrent states of one sequence, one slot; float8 and int8 with a scale a row."""
        scales = self.model.state_rows * SCALE_BYTES if BYTES[self.server.state] == 1 else 0
        return self.model.state * BYTES[self.server.state] + scales

    @property
    def conv(self) -> int:
        """Windows of the short convolutions of one sequence, one slot."""
        return self.model.conv * CONV_BYTES

    def kv(self, context: int) -> int:
        """Caches of the softmax layers of one sequence after `context` tokens."""
        return self.model.kv(context) * BYTES[self.server.kv]

    def request(self, context: int) -> int:
        """A request of `context` tokens: all its slots, and its key-value cache."""
        return self.server.slots * (self.state + self.conv) + self.kv(context)

    def requests(self, context: int) -> int:
        """Requests of `context` tokens that fit beside the weights; 0 if the weights do not fit."""
        return max(0, math.floor((self.server.memory - self.weights) / self.request(context)))

    def traffic(self, batch_size: int, context: int) -> float:
        """Read and written for one decoded token, where `batch_size` sequences decode together.

        Weights are read once a step and shared by the batch; states and windows are read and
        written, and the key-value cache is read whole. Activations are left out.
        """
        read = self.model.parameters_read(batch_size) * BYTES[self.server.weight]
        return read / batch_size + 2 * (self.state + self.conv) + self.kv(context)


def contexts(longest: int) -> list[int]:
    """Powers of two from 256 tokens to at least `longest`, for a plot."""
    return list(_doubled(256, longest))


def _doubled(length: int, longest: int) -> Iterator[int]:
    while True:
        yield length
        if length >= longest:
            return
        length *= 2
