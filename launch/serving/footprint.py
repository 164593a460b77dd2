"""What serving a model keeps in memory and reads for a token, in numbers and not yet in bytes.

All of it is read off the model's modules, built without memory from its config.json.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from flame.errors import UserError, first_line
from flame.model import count_parameters, stock_config

CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token")
"""Names, in configs, of the number of experts that a token goes through."""


@dataclass(frozen=True)
class KeyValues:
    """The cache of one softmax layer."""

    per_token: int
    """Numbers kept for a token: keys and values, or the latent vector of latent attention."""
    window: int | None = None
    """Tokens after which the oldest is dropped; None if all are kept."""

    def numbers(self, context: int) -> int:
        """Numbers kept after `context` tokens."""
        return self.per_token * min(context, self.window or context)


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer."""

    count: int
    chosen: int
    """Experts that a token goes through."""
    parameters: int
    """Of all experts of the layer together."""

    def read(self, batch_size: int) -> float:
        """Parameters read, on average, for one token of each of `batch_size` sequences.

        The experts of a token are taken to be independent of another token's and equally likely.
        """
        return self.parameters * (1 - (1 - self.chosen / self.count) ** batch_size)


@dataclass(frozen=True)
class Footprint:
    """The sizes of one model, each in numbers."""

    parameters: int
    dense: int
    """Parameters that every token reads: without experts, and without an embedding that is only
    looked up."""
    experts: tuple[Experts, ...]
    state: int
    """Recurrent states of one sequence, over all layers."""
    state_rows: int
    """Value channels of all heads of these layers: a row of a state has one scale where its dtype
    needs scales."""
    conv: int
    """Inputs of the short convolutions that one sequence keeps: for each channel one less than the
    taps."""
    key_values: tuple[KeyValues, ...]
    indexed: bool
    """Whether layers keep keys for choosing what to attend to, which are not counted."""

    def parameters_read(self, batch_size: int) -> float:
        """Parameters read for one token of each of `batch_size` sequences."""
        return self.dense + sum(experts.read(batch_size) for experts in self.experts)

    def kv(self, context: int) -> int:
        """Numbers that the softmax layers keep of one sequence after `context` tokens."""
        return sum(layer.numbers(context) for layer in self.key_values)


def footprint(config: Mapping[str, Any]) -> Footprint:
    """Return the sizes of the model of a config.json; a vision tower counts as parameters.

    Raises:
        UserError: transformers and fla cannot build the model, or a layer's token mixer is of a
            kind that this module cannot read.
    """
    model = _build(dict(config))
    text = model.config.get_text_config()
    linear = [found for module in model.modules() if (found := _linear(module))]
    softmax = [kept for module in model.modules() if (kept := _softmax(module))]
    if len(linear) + len(softmax) != text.num_hidden_layers:
        raise UserError(
            f"{config['model_type']!r}: {text.num_hidden_layers} layers, of which {len(linear)} "
            f"are known as linear and {len(softmax)} as softmax attention: the others' caches "
            "cannot be told from the config"
        )
    experts = tuple(_experts(model, text))
    table = model.get_input_embeddings()
    head = model.get_output_embeddings()
    looked_up = 0 if head is None or head.weight is table.weight else table.weight.numel()
    parameters = count_parameters(model.parameters())
    return Footprint(
        parameters=parameters,
        dense=parameters - looked_up - sum(layer.parameters for layer in experts),
        experts=experts,
        state=sum(state for state, _, _ in linear),
        state_rows=sum(rows for _, rows, _ in linear),
        conv=sum(conv for _, _, conv in linear),
        key_values=tuple(softmax),
        indexed=any(getattr(module, "indexer", None) is not None for module in model.modules()),
    )


def _build(config: dict[str, Any]) -> Any:
    """Return the whole model on the meta device: with its vision tower where it has one."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    stock = stock_config(config)
    with_vision = type(stock) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if with_vision else AutoModelForCausalLM
    try:
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = auto.from_config(stock)
    except (ImportError, ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f"cannot build {config['model_type']!r}: {first_line(error)}") from error
    model.tie_weights()
    return model


def _linear(module: nn.Module) -> tuple[int, int, int] | None:
    """A linear-attention layer's state, its rows and convolutions' inputs; None for others."""
    widths = getattr(module, "widths", None)
    if widths is not None:
        kernels = (each for each in module.parameters() if each.dim() == 3 and each.shape[1] == 1)
        taps = next((each.shape[-1] for each in kernels), 1)
        window = (2 * widths.key_rows + widths.value_rows) * (taps - 1)
        return widths.state_floats, widths.value_rows, window
    if hasattr(module, "head_k_dim") and hasattr(module, "head_v_dim"):
        heads = getattr(module, "num_v_heads", None) or module.num_heads
        rows = int(heads * module.head_v_dim)
        return rows * int(module.head_k_dim), rows, _window(module)
    if hasattr(module, "qkv_dim") and hasattr(module, "forget_gate"):
        rows = int(module.num_heads * module.head_dim)
        return rows * int(module.head_dim), rows, _window(module)
    return None


def _window(mixer: nn.Module) -> int:
    convolutions = [module for module in mixer.modules() if isinstance(module, nn.Conv1d)]
    return sum(each.out_channels * (each.kernel_size[0] - 1) for each in convolutions)


def _softmax(module: nn.Module) -> KeyValues | None:
    """The cache of a softmax-attention layer; None for others."""
    if _linear(module) is not None:
        return None
    window = getattr(module, "window_size", None) or getattr(module, "sliding_window", None)
    if getattr(module, "kv_lora_rank", None):
        return KeyValues(module.kv_lora_rank + module.qk_rope_head_dim, window)
    key, value = (getattr(module, name, None) for name in ("k_proj", "v_proj"))
    if isinstance(key, nn.Linear) and isinstance(value, nn.Linear):
        return KeyValues(key.out_features + value.out_features, window)
    return None


def _experts(model: nn.Module, text: Any) -> Iterator[Experts]:
    chosen = next((getattr(text, name) for name in CHOSEN_EXPERTS if hasattr(text, name)), None)
    for name, module in model.named_modules():
        stacked = [each for each in module.parameters(recurse=False) if each.dim() == 3]
        if chosen and stacked and name.endswith("experts"):
            yield Experts(len(stacked[0]), chosen, count_parameters(stacked))
