"""Unmodified fla models on a CPU after `import flame.register`."""

import copy
from typing import Any

import fla.layers.delta_net
import fla.layers.gated_deltanet
import fla.layers.gated_deltaproduct
import fla.layers.kda
import pytest
import torch
from fla.models import DeltaNetConfig, GatedDeltaNetConfig, GatedDeltaProductConfig, KDAConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

import flame.register  # noqa: F401
from tests.kernels import reference

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 50,
    "num_heads": 2,
}
CONFIGS = {
    "gdn": GatedDeltaNetConfig(**SHAPE, head_dim=16, expand_v=1.5),
    "gdn-gva": GatedDeltaNetConfig(**SHAPE, head_dim=16, expand_v=1.0, num_v_heads=4),
    "gdn-no-gate": GatedDeltaNetConfig(**SHAPE, head_dim=16, use_gate=False),
    "gdn-no-conv": GatedDeltaNetConfig(**SHAPE, head_dim=16, use_short_conv=False),
    "gdn-unfused": GatedDeltaNetConfig(
        **SHAPE, head_dim=16, fuse_norm=False, fuse_swiglu=False, fuse_cross_entropy=False
    ),
    "gdn-linear-loss": GatedDeltaNetConfig(
        **SHAPE, head_dim=16, fuse_cross_entropy=False, fuse_linear_cross_entropy=True
    ),
    "delta": DeltaNetConfig(**SHAPE),
    "delta-gate": DeltaNetConfig(**SHAPE, expand_k=0.5, use_gate=True),
    "product": GatedDeltaProductConfig(
        **SHAPE,
        head_dim=16,
        expand_v=1.5,
        num_householder=2,
        use_forget_gate=True,
        allow_neg_eigval=True,
    ),
    "product-plain": GatedDeltaProductConfig(
        **SHAPE, head_dim=16, expand_v=1.0, num_householder=3, use_output_gate=False
    ),
    "kda": KDAConfig(**SHAPE, head_dim=16, expand_v=1.5),
    "kda-gva": KDAConfig(
        **SHAPE,
        head_dim=16,
        num_v_heads=4,
        safe_gate=True,
        lower_bound=-5.0,
        allow_neg_eigval=True,
    ),
}
BOUNDS = [0, 30, 31, 101, 140]

pytestmark = pytest.mark.filterwarnings("ignore:.*")


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).float()


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(1))


def loss_gradients(model: torch.nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(x, labels=x, **options).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def naive(q, k, v, beta, g=None, initial_state=None, **flags):
    """The token loop behind the flags with which the layers call the operator."""
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if flags.get("use_gate_in_kernel"):
        g = gated(g, **flags)
    beta = beta.sigmoid() if flags.get("use_beta_sigmoid_in_kernel") else beta
    beta = 2 * beta if flags.get("allow_neg_eigval") else beta
    bounds, steps = flags.get("cu_seqlens"), flags.get("num_householder", 1)
    q, g = (x if x is None else spread(x, steps, place) for x, place in ((q, -1), (g, 0)))
    cuts = [0, q.shape[1]] if bounds is None else (steps * bounds).tolist()
    parts = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        cut = [x if x is None else x[:, start:end] for x in (q, k, v, g, beta)]
        parts.append(reference.gated_delta_rule(*cut, initial_state)[0])
    return torch.cat(parts, 1)[:, steps - 1 :: steps], None


def gated(g: Tensor, A_log: Tensor, dt_bias: Tensor, **flags: Any) -> Tensor:
    if g.ndim == 3:
        return reference.gate(g, A_log, dt_bias)
    A_log, dt_bias = A_log.unsqueeze(-1), dt_bias.view(g.shape[2:])
    if flags["lower_bound"] is None:
        return reference.gate(g, A_log, dt_bias)
    return flags["lower_bound"] * (A_log.exp() * (g + dt_bias)).sigmoid()


def spread(x: Tensor, steps: int, place: int) -> Tensor:
    """Each token at one of its `steps` places, zeros elsewhere."""
    wide = x.new_zeros(*x.shape[:2], steps, *x.shape[2:])
    wide[:, :, place] = x
    return wide.flatten(1, 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_each_alone(name: str):
    model, x = build(name).eval(), tokens(1, BOUNDS[-1])
    with torch.no_grad():
        packed = model(x, cu_seqlens=torch.tensor(BOUNDS)).logits
        pairs = zip(BOUNDS, BOUNDS[1:], strict=False)
        alone = [model(x[:, start:end]).logits for start, end in pairs]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_gradients_equal_float64_token_loop(name: str, monkeypatch: pytest.MonkeyPatch):
    """All parameters' gradients, packed, with the fused kernels' defaults."""
    model, x, bounds = build(name), tokens(1, BOUNDS[-1]), torch.tensor(BOUNDS)
    ours = loss_gradients(model, x, cu_seqlens=bounds)
    assert len(ours) == len(list(model.parameters()))
    monkeypatch.setattr(fla.layers.gated_deltanet, "chunk_gated_delta_rule", naive)
    monkeypatch.setattr(fla.layers.delta_net, "chunk_delta_rule", naive)
    monkeypatch.setattr(fla.layers.gated_deltaproduct, "chunk_gated_delta_product", naive)
    monkeypatch.setattr(fla.layers.kda, "chunk_kda", naive)
    exact = loss_gradients(model.double(), x, cu_seqlens=bounds)
    for parameter, grad in exact.items():
        error = (ours[parameter].double() - grad).norm() / grad.norm()
        assert error < 2e-5, f"{parameter}: {error:.1e}"


def test_fused_and_unfused_modules_give_the_same_gradients():
    fused, x = build("gdn").double(), tokens(2, 70)
    plain = copy.deepcopy(CONFIGS["gdn"])
    plain.fuse_norm = plain.fuse_swiglu = plain.fuse_cross_entropy = False
    unfused = AutoModelForCausalLM.from_config(plain).double()
    unfused.load_state_dict(fused.state_dict())
    theirs = loss_gradients(unfused, x)
    for name, grad in loss_gradients(fused, x).items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_equals_the_full_forward(name: str):
    """Token by token through the caches, from prompts with and without padding."""
    model, x = build(name).eval(), tokens(2, 20)
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        found = model.generate(x, attention_mask=mask, **options)
        rows = [found[:1, 5:], found[1:]]
        for row in rows:
            logits = model(row).logits[:, :-1]
            chosen = logits.gather(-1, row[:, 1:, None])[..., -6:, 0]
            best = logits.amax(-1)[:, -6:]
            torch.testing.assert_close(chosen, best, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["gdn", "gdn-gva", "delta", "product", "product-plain", "kda-gva"])
@pytest.mark.parametrize("prompt", [1, 70])
def test_cached_steps_equal_the_full_forward(name: str, prompt: int):
    model, x = build(name).eval(), tokens(2, prompt + 5)
    with torch.no_grad():
        whole = model(x).logits
        out = model(x[:, :prompt], use_cache=True)
        for t in range(prompt, prompt + 5):
            torch.testing.assert_close(out.logits[:, -1], whole[:, t - 1], rtol=1e-5, atol=2e-6)
            cache = out.past_key_values
            out = model(x[:, t : t + 1], past_key_values=cache, use_cache=True)


def test_unpadded_batch_in_training_uses_the_fused_convolution(monkeypatch):
    """No cache and no packing: the layer concatenates q, k and v into one convolution."""
    model, x, calls = build("gdn"), tokens(2, 70), []
    theirs = fla.layers.gated_deltanet.causal_conv1d
    counted = lambda **options: calls.append(1) or theirs(**options)  # noqa: E731
    monkeypatch.setattr(fla.layers.gated_deltanet, "causal_conv1d", counted)
    batch = hidden_gradients(model, x)
    assert len(calls) == 2
    packed = hidden_gradients(model, x.view(1, -1), cu_seqlens=torch.tensor([0, 70, 140]))
    assert len(calls) == 2
    for name, grad in batch.items():
        torch.testing.assert_close(grad, packed[name], rtol=1e-4, atol=1e-6)


def hidden_gradients(model: torch.nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(x, use_cache=False, **options).logits.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}
