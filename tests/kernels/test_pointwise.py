"""Short convolution, norms, activations and losses: fla's modules on a CPU against torch.nn."""

import pytest
import torch
import torch.nn.functional as F
from fla.modules import (
    FusedCrossEntropyLoss,
    FusedLinearCrossEntropyLoss,
    FusedRMSNormGated,
    GroupNorm,
    LayerNorm,
    RMSNorm,
    ShortConvolution,
)
from fla.modules.activations import logsigmoid, sigmoid, swiglu, swiglu_linear, swish
from fla.modules.norm.l2norm import l2norm
from torch import Tensor

import flame.register  # noqa: F401

DOCUMENTS = [0, 2, 2, 3, 9, 20]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator, dtype=torch.float64)
    return made.requires_grad_()


def assert_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    """Compare values and, under a random cotangent, gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    weight = normal(*ours.shape, seed=9).detach()
    for a, b in zip(
        torch.autograd.grad(ours, leaves, weight, retain_graph=True, allow_unused=True),
        torch.autograd.grad(theirs, leaves, weight, retain_graph=True, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def convolution(x: Tensor, conv: ShortConvolution, state: Tensor | None = None) -> Tensor:
    """Return the convolution of one document `[1, T, D]` by torch's conv1d."""
    width = conv.kernel_size[0]
    before = x.new_zeros(1, x.shape[2], width - 1) if state is None else state[..., 1 - width :]
    stream = torch.cat([before, x.mT], -1)
    if not x.shape[1]:
        return x
    y = F.conv1d(stream, conv.weight, conv.bias, groups=x.shape[2])
    return (F.silu(y) if conv.activation else y).mT


def short_convolution(bias: bool, activation: str | None = "silu") -> ShortConvolution:
    torch.manual_seed(0)
    return ShortConvolution(6, 4, bias=bias, activation=activation).double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", None])
def test_short_convolution_of_rows(bias: bool, activation: str | None):
    conv, x = short_convolution(bias, activation), normal(2, 7, 6)
    ours, state = conv(x, output_final_state=True)
    theirs = torch.cat([convolution(x[i : i + 1], conv) for i in range(2)])
    assert_same(ours, theirs, [x, *conv.parameters()])
    torch.testing.assert_close(state, x[:, -4:].mT)


def test_short_convolution_of_packed_documents_with_states():
    """Documents shorter than the kernel, and an empty one, keep part of their initial state."""
    conv, x, states = short_convolution(bias=True), normal(1, 20, 6), normal(5, 6, 4, seed=1)
    ours, final = conv(x, cache=states, output_final_state=True, cu_seqlens=torch.tensor(DOCUMENTS))
    outs, ends = [], []
    for i, (start, end) in enumerate(zip(DOCUMENTS, DOCUMENTS[1:], strict=False)):
        part = x[:, start:end]
        outs.append(convolution(part, conv, states[i : i + 1]))
        history = torch.cat([states[i : i + 1], part.mT], -1)
        ends.append(history[..., -4:])
    assert_same(ours, torch.cat(outs, 1), [x, states, *conv.parameters()])
    # index 0 of a state is never read; fla gives no gradient for it
    kept = torch.cat(ends)[..., 1:]
    assert_same(final[..., 1:], kept, [x])


def test_short_convolution_final_state_carries_gradient():
    conv, x, states = short_convolution(bias=False), normal(1, 20, 6), normal(5, 6, 4, seed=1)
    bounds = torch.tensor(DOCUMENTS)
    y, final = conv(x, cache=states, output_final_state=True, cu_seqlens=bounds)
    ours = torch.autograd.grad((y.sum() + (final * final.detach()).sum()), [x, states])
    ends, total = [], x.new_zeros(())
    for i, (start, end) in enumerate(zip(DOCUMENTS, DOCUMENTS[1:], strict=False)):
        part = x[:, start:end]
        total = total + convolution(part, conv, states[i : i + 1]).sum()
        ends.append(torch.cat([states[i : i + 1, :, 1:], part.mT], -1)[..., -3:])
    kept = torch.cat(ends)
    theirs = torch.autograd.grad(total + (kept * kept.detach()).sum(), [x, states])
    torch.testing.assert_close(ours, theirs)


def test_short_convolution_token_by_token():
    conv, x = short_convolution(bias=True), normal(3, 7, 6).detach()
    with torch.no_grad():
        whole, _ = conv(x)
        out, cache = conv(x[:, :2], output_final_state=True)
        steps = [out]
        for t in range(2, 7):
            step, cache = conv(x[:, t : t + 1], cache=cache, output_final_state=True)
            steps.append(step)
    torch.testing.assert_close(torch.cat(steps, 1), whole)


@pytest.mark.parametrize("residual", [False, True])
def test_norms(residual: bool):
    x, extra = normal(3, 5, 8), normal(3, 5, 8, seed=1) if residual else None
    summed = x if extra is None else x + extra
    leaves = [x] if extra is None else [x, extra]
    for ours, theirs in (
        (RMSNorm(8, eps=1e-3), lambda s, w: F.rms_norm(s, (8,), w, 1e-3)),
        (LayerNorm(8, eps=1e-3), lambda s, w: F.layer_norm(s, (8,), w, None, 1e-3)),
        (GroupNorm(2, 8, eps=1e-3, is_rms_norm=True), lambda s, w: group_rms_norm(s, w, 2)),
    ):
        ours = ours.double()
        with torch.no_grad():
            ours.weight.copy_(normal(8, seed=2))
        assert_same(ours(x, residual=extra), theirs(summed, ours.weight), [*leaves, ours.weight])
        if extra is not None:
            y, kept = ours(x, residual=extra, prenorm=True)
            both = theirs(summed, ours.weight) + 2 * summed
            assert_same(y + 2 * kept, both, [*leaves, ours.weight])


def group_rms_norm(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    parts = x.unflatten(-1, (groups, -1))
    return F.rms_norm(parts, parts.shape[-1:], None, 1e-3).flatten(-2) * weight


@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
def test_gated_norm(activation: str):
    norm = FusedRMSNormGated(8, eps=1e-3, activation=activation).double()
    x, gate = normal(3, 5, 8), normal(3, 5, 8, seed=1)
    opened = F.silu(gate) if activation == "swish" else gate.sigmoid()
    theirs = F.rms_norm(x, (8,), norm.weight, 1e-3) * opened
    assert_same(norm(x, gate), theirs, [x, gate, norm.weight])


def test_l2_norm():
    x = normal(3, 5, 8)
    assert_same(l2norm(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt(), [x])


def test_activations():
    x, y, weight = normal(3, 5), normal(3, 5, seed=1), normal(4, 5, seed=2)
    assert_same(swish(x), F.silu(x), [x])
    assert_same(sigmoid(x), x.sigmoid(), [x])
    assert_same(logsigmoid(x, 2.0), F.logsigmoid(x) / 2, [x])
    assert_same(swiglu(x, y), F.silu(x) * y, [x, y])
    assert_same(swiglu_linear(x, y, weight, None), (F.silu(x) * y) @ weight.T, [x, y, weight])


def targets() -> Tensor:
    target = torch.arange(12) % 9
    target[3] = -100
    return target


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(smoothing: float, reduction: str):
    logits, target = normal(12, 9), targets()
    ours = FusedCrossEntropyLoss(label_smoothing=smoothing, reduction=reduction)(logits, target)
    theirs = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction=reduction)
    assert_same(ours, theirs, [logits])


def test_cross_entropy_with_scale_cap_and_z_loss():
    logits, target = normal(12, 9), targets()
    options = {"logit_scale": 0.7, "logit_softcapping": 2.0, "lse_square_scale": 0.05}
    ours = FusedCrossEntropyLoss(**options, inplace_backward=False)(logits, target)
    capped = 2.0 * torch.tanh(0.7 * logits / 2.0)
    penalty = 0.05 * capped.logsumexp(-1).square()[target != -100].mean()
    assert_same(ours, F.cross_entropy(capped, target) + penalty, [logits])


def test_linear_cross_entropy():
    x, weight, target = normal(12, 6), normal(9, 6, seed=1), targets()
    single = [tensor.detach().float().requires_grad_() for tensor in (x, weight)]
    loss = FusedLinearCrossEntropyLoss()(single[0].view(1, 12, 6), target.view(1, 12), single[1])
    theirs = F.cross_entropy(x @ weight.T, target)
    torch.testing.assert_close(loss.double(), theirs, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(2 * loss, single)
    for ours, exact in zip(found, torch.autograd.grad(2 * theirs, [x, weight]), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
