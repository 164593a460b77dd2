"""Packed documents in transformers' hybrids, which keep them apart in part only.

fla's models and ours take `cu_seqlens`, the boundaries of the documents in one row. Transformers'
hybrids take `cu_seq_lens_q` for the delta rule and restarting positions for softmax attention, but
their short convolutions run on across the boundaries unless the package causal_conv1d is there.
Qwen4's layers of token n-grams (`ple`) and GLM-5.3's indexed attention know of no boundaries at
all, and run document by document.
"""

import sys
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from flame.errors import UserError
from flame.models.document_bounds import on_host

KDA = ("kimi_linear", "glm5_next_text")
"""Those of Kimi Delta Attention, which hand `cu_seqlens` on to the operator under that name."""

HYBRIDS = (
    *KDA,
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "qwen4_exp_text",
    "qwen3_next",
    "olmo_hybrid",
)
"""The families, by `model_type`, in which packed documents were found to equal separate ones."""


def is_hybrid(config: Any) -> bool:
    """Whether a transformers config is that of a family in `HYBRIDS`."""
    return config.model_type in HYBRIDS


def take_packed_documents(model: nn.Module) -> None:
    """Let a hybrid take `cu_seqlens` `[n + 1]` beside `input_ids` `[1, T]`.

    Every document then gets what it would get alone. Other calls are as they were.

    Raises:
        UserError: this version of transformers builds its hybrids in another way.
    """
    modeling = sys.modules[type(model.base_model).__module__]
    if not callable(getattr(modeling, "causal_conv1d_fn", None)):
        raise UserError(
            f"{type(model).__name__} of transformers {metadata.version('transformers')} calls its "
            "convolutions in an older way: hybrids need transformers 5.23"
        )
    if not hasattr(modeling.causal_conv1d_fn, "within_documents"):
        modeling.causal_conv1d_fn = _within_documents(modeling.causal_conv1d_fn)  # type: ignore[attr-defined]
    model.register_forward_pre_hook(_translated, with_kwargs=True)
    for layer in model.modules():
        if isinstance(ngrams := getattr(layer, "ple", None), nn.Module):
            ngrams.forward = partial(_each_document, ngrams)  # type: ignore[method-assign]
            layer.register_forward_pre_hook(_tell_ngrams, with_kwargs=True)
        if hasattr(layer, "build_attention_mask_from_topk"):
            layer.forward = partial(_attend_in_each, layer)  # type: ignore[method-assign]


def _attend_in_each(
    attention: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    prev_topk_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None, Tensor | None]:
    """The forward of indexed attention within each document of a packed row.

    The chosen tokens that one layer hands to the next are counted from their document's beginning.
    """
    forward = partial(type(attention).forward, attention)
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None:
        return forward(hidden_states, attention_mask, prev_topk_indices=prev_topk_indices, **kwargs)
    lengths = on_host(bounds).diff().tolist()
    before = (
        [None] * len(lengths) if prev_topk_indices is None else prev_topk_indices.split(lengths, 1)
    )
    parts = zip(
        hidden_states.split(lengths, 1), attention_mask.split(lengths, 1), before, strict=True
    )
    found = [forward(x, mask, prev_topk_indices=chosen) for x, mask, chosen in parts]
    outputs, _, after = zip(*found, strict=True)
    return torch.cat(outputs, 1), None, None if after[0] is None else torch.cat(after, 1)


def _tell_ngrams(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Leave the boundaries with the n-grams' layer, to which its block does not hand them on."""
    layer.ple.documents = kwargs.get("cu_seq_lens_q")


def _each_document(
    ngrams: Any, stream: Tensor, tokens: Tensor, cache: Any, conv_mask: Tensor | None = None
) -> Tensor:
    """The forward of an n-grams' layer within each document of a packed row."""
    forward = type(ngrams).forward
    if ngrams.documents is None:
        return forward(ngrams, stream, tokens, cache, conv_mask=conv_mask)
    lengths = on_host(ngrams.documents).diff().tolist()
    parts = zip(stream.split(lengths, 1), tokens.split(lengths, 1), strict=True)
    return torch.cat([forward(ngrams, *part, cache) for part in parts], 1)


def _translated(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
    bounds = kwargs.pop("cu_seqlens", None)
    if bounds is not None:
        known = on_host(bounds)
        tokens, longest = int(known[-1]), int(known.diff().max())
        starts = bounds[:-1].repeat_interleave(bounds.diff(), output_size=tokens)
        positions = torch.arange(tokens, device=bounds.device) - starts
        kwargs |= {
            "position_ids": positions[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        if module.config.model_type in KDA:  # type: ignore[union-attr]
            kwargs["cu_seqlens"] = bounds
    return args, kwargs


def _within_documents(convolution: Any) -> Any:
    """`causal_conv1d_fn` of a modeling file, by fla's operator where there are boundaries."""
    from fla.modules.convolution import causal_conv1d

    def convolved(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is None:
            return convolution(hidden_states, weight, bias, activation=activation, **kwargs)
        rows = hidden_states.transpose(1, 2).contiguous()
        out, _ = causal_conv1d(rows, weight, bias, activation=activation, cu_seqlens=bounds)
        return out.transpose(1, 2)

    convolved.within_documents = True  # type: ignore[attr-defined]
    return convolved
