"""Operations and bytes of a calibration's parts, from a `config.json` alone.

Legend, of one linear layer: H key heads of K channels; out numbers that enter the output
projection, w = out / H of them of one key head; D the width of the model's hidden states.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flame.model import layers, meta_model
from pruning.adapters import adapter_for
from pruning.cost.work import Work, delta_rule_operations
from pruning.repair.local_steps import LOOKS
from pruning.spaces import HEAD_KINDS, Space, output_axis

BACKWARD = 2.0
"""Of a forward pass's operations."""
PASSES = 8
"""Times that a number which a layer computes is read or written, normalisations included."""
REPLAYED_KEY, REPLAYED_VALUE = 8, 16
"""The same of a channel of q or k, and of v, under one mask of a replay."""
REPLAYED_WIDE = 8
"""Times that a float64 number of a replay's changes is read or written."""


@dataclass(frozen=True)
class LayerSizes:
    """A linear layer's widths."""

    heads: int
    key: int
    out: int
    groups: int
    """Heads that can be removed, value heads or key heads."""

    @property
    def of_head(self) -> int:
        return self.out // self.heads

    @property
    def value(self) -> int:
        return self.out // self.groups


@dataclass(frozen=True)
class Counts:
    """A model's work a token, by what a calibration does."""

    config: Mapping[str, Any]
    width: int
    """Bytes of a number that the model computes in."""

    @cached_property
    def sizes(self) -> LayerSizes:
        spaces = adapter_for(dict(self.config)).spaces(dict(self.config))
        first = {space.kind: space for space in reversed(spaces)}
        key = first["key"]
        finest: Space = first.get("value-head", first["head"])
        out = output_axis(first["head"]).layout.size
        heads = finest.num_heads * finest.head_dim
        return LayerSizes(key.num_heads, key.head_dim, out, heads)

    @cached_property
    def linear_layers(self) -> int:
        spaces = adapter_for(dict(self.config)).spaces(dict(self.config))
        return len({space.layer for space in spaces})

    @cached_property
    def hidden(self) -> int:
        return int(self.config["hidden_size"])

    @cached_property
    def _numbers(self) -> tuple[float, float, float, float]:
        """Weights and outputs a token: of all blocks, and of the linear layers' mixers."""
        from pruning.mixers import find_mixers

        model = meta_model(dict(self.config))
        mixers = find_mixers(model, adapter_for(dict(self.config))).values()
        found = []
        for modules in (layers(model), mixers):
            weights = outputs = 0.0
            for module in modules:
                for name, weight in module.named_parameters():
                    share = self._share(name) if weight.dim() == 3 else 1.0
                    if weight.dim() >= 2 and "conv" not in name:
                        weights += share * weight.numel()
                        outputs += share * weight.numel() / weight.shape[-1]
            found += [weights, outputs]
        return found[0], found[1], found[2], found[3]

    def _share(self, name: str) -> float:
        """Of stacked experts, the part that a token goes through."""
        several = self.config.get("num_experts") or 1
        each = self.config.get("num_experts_per_tok") or several
        return each / several if "expert" in name else 1.0

    def _delta_rule(self) -> Work:
        """One run of a layer's operator, all heads."""
        s = self.sizes
        return Work(delta_rule=s.heads * delta_rule_operations(s.key, s.of_head))

    def forward(self, seq_len: int) -> Work:
        """The model's forward pass, logits left out."""
        weights, outputs, _, _ = self._numbers
        blocks = int(self.config["num_hidden_layers"])
        softmax = blocks - self.linear_layers
        width = int(self.config.get("head_dim") or 0) * int(
            self.config.get("num_attention_heads") or 0
        )
        attention = Work(products=softmax * 2 * seq_len * (width or self.hidden))
        passes = Work(moved=PASSES * self.width * (outputs + 2 * blocks * self.hidden))
        own = Work(products=2 * weights) + self.linear_layers * self._delta_rule()
        return own + attention + passes

    def mixers(self) -> Work:
        """A forward pass of the linear layers' token mixers alone."""
        _, _, weights, outputs = self._numbers
        own = Work(products=2 * weights, moved=PASSES * self.width * outputs)
        return own + self.linear_layers * self._delta_rule()

    def backward(self, seq_len: int) -> Work:
        """The backward pass, and logits in both directions."""
        logits = Work(products=6 * self.hidden * int(self.config["vocab_size"]))
        return BACKWARD * self.forward(seq_len) + logits

    def query_key_grams(self) -> Work:
        s = self.sizes
        return self.linear_layers * Work(float64=4 * s.heads * s.key**2, moved=48 * s.heads * s.key)

    def replays(self, kind: str) -> Work:
        """The output errors of a kind's channels."""
        s = self.sizes
        rank = min(s.of_head, self.hidden)
        if kind == "key":
            each = delta_rule_operations(s.key, s.of_head)
            per_mask = self.width * (REPLAYED_KEY * s.key + REPLAYED_VALUE * s.of_head)
            own = Work(
                float64=2 * s.key * s.of_head * rank + 2 * s.key**2 * rank,
                delta_rule=(s.key + 1) * each,
                moved=(s.key + 1) * (per_mask + 8 * REPLAYED_WIDE * s.of_head),
            )
            return self.linear_layers * s.heads * own
        if kind == "value":
            rank = min(s.out, self.hidden)
            products = 2 * s.value * s.out * rank + 2 * s.value**2 * rank
            numbers = s.value * (self.width * REPLAYED_VALUE + 8 * REPLAYED_WIDE) * s.out
            whole = self._delta_rule() + Work(float64=products, moved=numbers)
            return self.linear_layers * whole
        assert kind in HEAD_KINDS
        return self.linear_layers * Work(float64=2 * self.hidden * (s.out + s.groups**2))

    def output_equations(self) -> Work:
        """The sums of a repair, beside its dense pass: the pruned mixers and the products."""
        out = self.sizes.out
        return self.mixers() + self.linear_layers * Work(float64=4 * out**2, moved=64 * out)

    def output_fit(self) -> Work:
        """The ridge regressions of all layers, once."""
        out = self.sizes.out
        each = out**3 / 3 + 4 * self.hidden * out**2
        return self.linear_layers * Work(float64=each)

    def local_steps(self, steps: int, batch: int, seq_len: int, held_out: int) -> Work:
        """`--repair layer` beside the pass that keeps the layers' states: steps, Adam, looks."""
        tokens = seq_len * (steps * batch * (1 + BACKWARD) + (LOOKS + 1) * held_out)
        _, _, weights, _ = self._numbers
        # Masters, two moments, gradients and their sums in float64.
        adam = Work(moved=steps * weights * 8 * 12)
        return tokens * self.mixers() + adam
