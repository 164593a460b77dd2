"""Softmax attention and rotary positions without flash-attn: operators, and fla's hybrids."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fla.modules.rotary.ops import rotary_embedding_ref
from torch import Tensor, nn

from kernels.rotary import rotary_embedding_fwdbwd
from kernels.softmax_attention import flash_attn_func, flash_attn_varlen_func
from tests.pruning.families import CONFIGS, build, tiny_config, tokens

HYBRIDS = [name for name in CONFIGS if "hybrid" in name]
BOUNDS = [0, 30, 31, 70]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def naive(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int]) -> Tensor:
    """Query by query, over a list of the keys that it sees."""
    rows, length, heads, width = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(rows):
        for h in range(heads):
            for t in range(length):
                own = t + keys - length
                last = own if causal else keys - 1 if window[1] < 0 else own + window[1]
                first = 0 if window[0] < 0 else max(0, own - window[0])
                seen = slice(first, min(last, keys - 1) + 1)
                scores = k[b, seen, h // group] @ q[b, t, h] / width**0.5
                out[b, t, h] = scores.softmax(0) @ v[b, seen, h // group]
    return out


@pytest.mark.parametrize(
    ("length", "keys", "causal", "window"),
    [
        (7, 7, True, (-1, -1)),
        (7, 7, True, (2, 0)),
        (3, 9, True, (-1, -1)),
        (3, 9, True, (4, 0)),
        (1, 9, True, (-1, -1)),
        (1, 9, True, (8, 0)),
        (1, 9, True, (3, 0)),
        (4, 6, False, (-1, -1)),
        (6, 6, False, (1, 2)),
    ],
)
def test_attention_is_the_naive_one(
    length: int, keys: int, causal: bool, window: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    inputs = random(2, length, 4, 8), random(2, keys, 2, 8), random(2, keys, 2, 8)
    ours = flash_attn_func(*inputs, causal=causal, window_size=window)
    theirs = naive(*inputs, causal=causal, window=window)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for mine, reference in zip(
        torch.autograd.grad(ours, inputs, weight),
        torch.autograd.grad(theirs, inputs, weight),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference)


def test_queries_that_would_see_no_key_are_refused() -> None:
    with pytest.raises(ValueError, match="3 queries for 2 keys"):
        flash_attn_func(random(1, 3, 1, 4), random(1, 2, 1, 4), random(1, 2, 1, 4), causal=True)


def test_documents_of_unequal_queries_and_keys() -> None:
    """As after padding is removed while decoding: one query for each document's keys."""
    torch.manual_seed(0)
    q, k, v = random(2, 4, 8), random(9, 2, 8), random(9, 2, 8)
    queries, keys = torch.tensor([0, 1, 2]), torch.tensor([0, 4, 9])
    out = flash_attn_varlen_func(q, k, v, queries, keys, 1, 5, causal=True, window_size=(2, 0))
    for i, (first, last) in enumerate(((0, 4), (4, 9))):
        alone = (x[None] for x in (q[i : i + 1], k[first:last], v[first:last]))
        torch.testing.assert_close(out[i : i + 1], naive(*alone, True, (2, 0))[0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_flas_reference(interleaved: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 12, dtype=torch.float64)
    angles = torch.rand(20, 4, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()

    def reference(rows: Tensor, first: int) -> Tensor:
        table = slice(first, first + rows.shape[-3])
        return rotary_embedding_ref(rows, cos[table], sin[table], interleaved)

    def ours(rows: Tensor, *offsets: Any, **options: Any) -> Tensor:
        return rotary_embedding_fwdbwd(rows, cos, sin, *offsets, interleaved=interleaved, **options)

    torch.testing.assert_close(ours(x, 3), reference(x, 3))
    offsets = torch.tensor([5, 0])
    expected = torch.stack([reference(x[0], 5), reference(x[1], 0)])
    torch.testing.assert_close(ours(x, offsets), expected)
    padded = ours(x, torch.tensor([-2, 0]))
    torch.testing.assert_close(padded[0, 2:], reference(x[0, 2:], 0))
    assert not padded[0, :2, :, :8].any()
    packed, bounds = x.reshape(1, 12, 3, 12), torch.tensor([0, 5, 12])
    expected = torch.cat([reference(packed[:, :5], 0), reference(packed[:, 5:], 0)], 1)
    torch.testing.assert_close(ours(packed, cu_seqlens=bounds), expected)
    torch.testing.assert_close(ours(ours(x, 3), 3, conjugate=True), x)
    changed = x.clone()
    assert ours(changed, 3, inplace=True) is changed
    torch.testing.assert_close(changed, ours(x, 3))
    with pytest.raises(ValueError, match="position 20 is beyond 20"):
        ours(x, 15)


def hybrid(name: str, window: int | None) -> nn.Module:
    """A tiny hybrid of fla in float64, with grouped heads in its softmax layer where they fit."""
    config = tiny_config(name)
    attention = config["attn"][0] if isinstance(config["attn"], list) else config["attn"]
    attention |= {"window_size": window, "num_kv_heads": 1, "qkv_bias": True}
    return build(config).double()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("name", HYBRIDS)
def test_packed_documents_are_separate_ones(name: str, window: int | None) -> None:
    model, text = hybrid(name, window).train(), tokens(1, BOUNDS[-1])
    weight = torch.randn(1, BOUNDS[-1], 80, dtype=torch.float64)

    def gradients(logits: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (logits * weight).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    packed = model(text, cu_seqlens=torch.tensor(BOUNDS)).logits
    pairs = zip(BOUNDS, BOUNDS[1:], strict=False)
    apart = torch.cat([model(text[:, first:last]).logits for first, last in pairs], 1)
    torch.testing.assert_close(packed, apart, atol=1e-9, rtol=1e-9)
    ours, theirs = gradients(packed), gradients(apart)
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-7)
    assert any("layers.1.attn.k_proj" in name for name in ours)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("name", HYBRIDS)
def test_cached_steps_are_the_whole_computation(name: str, window: int | None) -> None:
    """A prompt, a second part longer than the window, single tokens; and padding on the left."""
    model, text = hybrid(name, window), tokens(1, 52)
    whole, cache, parts = model(text).logits, None, []
    for part in text.split([20, 20, *[1] * 12], 1):
        out = model(part, past_key_values=cache, use_cache=True)
        parts, cache = [*parts, out.logits], out.past_key_values
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-7, rtol=1e-7)
    prompts = torch.cat([text[:, :20], text[:, :20].roll(9, 1)])
    mask = torch.ones_like(prompts)
    mask[1, :9] = 0
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(prompts, attention_mask=mask, max_new_tokens=9, **options)
    for row, padding in zip(found, (0, 9), strict=True):
        again = model(row[None, padding:]).logits[0].argmax(-1)
        assert torch.equal(again[19 - padding : -1], row[20:])


STAND_IN = """
def flash_attn_func(q, k, v, **options): return q
def flash_attn_varlen_func(q, k, v, **options): return q
"""
CHECK = """
import flame.register, torch, flash_attn
from fla.layers.attn import Attention, flash_attn_func
from fla.layers import attn
x = torch.randn(1, 5, 2, 8)
assert not torch.equal(flash_attn_func(x, x, x, causal=True), x)
there = x.to("meta")
assert flash_attn_func(there, there, there, causal=True) is there
assert attn.flash_attn_varlen_func(there[0], there[0], there[0])[0].is_meta
"""


@pytest.mark.slow
def test_an_accelerator_keeps_flash_attention_where_it_is_installed(tmp_path: Path) -> None:
    """A stand-in package that gives the queries back shows which of the two was called."""
    (tmp_path / "flash_attn.py").write_text(STAND_IN)
    path = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]"
    command = [sys.executable, "-W", "ignore", "-c", f"{path}\n{CHECK}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
