"""On CUDA: our chunked operator, run on the GPU, beside fla's Triton kernels."""

import pytest
import torch

from tests.kernels import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BOUNDS = [0, 70, 71, 200]


def compare(theirs, ours, x: dict[str, torch.Tensor]) -> None:
    """Our bfloat16 operator is, beside float64, as exact as fla's to a factor of two."""
    wide = {n: t.detach().double().requires_grad_() for n, t in x.items()}
    exact = [*(out := ours(wide)), *reference.gradients(out, wide).values()]
    found = [*(out := ours(x)), *reference.gradients(out, x).values()]
    triton = [*(out := theirs(x)), *reference.gradients(out, x).values()]
    for a, b, e in zip(found, triton, exact, strict=True):
        floor = torch.finfo(torch.bfloat16).eps * e.abs().max()
        assert (a - e).abs().max() <= 2 * (b - e).abs().max() + floor


def cuda(d_k: int = 64, **options) -> dict[str, torch.Tensor]:
    x = reference.inputs(BOUNDS[-1], d_k, 128, states=len(BOUNDS) - 1, **options)
    half = {n: t.detach().cuda().to(torch.bfloat16) for n, t in x.items()}
    half["h"], half["g"] = half["h"].float(), half["g"].float()
    return {n: t.requires_grad_() for n, t in half.items()}


@pytest.mark.parametrize("decay", [0.1, 30.0])
def test_gated_delta_rule(decay: float):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as theirs

    import flame.register  # noqa: F401
    from kernels.gated_delta_rule import chunk_gated_delta_rule as ours

    bounds = torch.tensor(BOUNDS, device="cuda")

    def run(operator):
        return lambda x: operator(
            x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=x["h"],
            output_final_state=True, cu_seqlens=bounds,
        )  # fmt: skip

    compare(run(theirs), run(ours), cuda(decay=decay, key_heads=2, heads=4))


def test_delta_rule():
    from fla.ops.delta_rule import chunk_delta_rule as theirs

    import flame.register  # noqa: F401
    from kernels.delta_rule import chunk_delta_rule as ours

    x, bounds = cuda(), torch.tensor(BOUNDS, device="cuda")
    del x["g"]

    def run(operator):
        return lambda x: operator(
            x["q"], x["k"], x["v"], x["beta"], initial_state=x["h"],
            output_final_state=True, cu_seqlens=bounds,
        )  # fmt: skip

    compare(run(theirs), run(ours), x)


@pytest.mark.parametrize("d_k", [16, 48, 80, 96, 112, 240])
@pytest.mark.parametrize("gated", [False, True])
def test_narrow_keys(gated: bool, d_k: int, monkeypatch: pytest.MonkeyPatch):
    """Our chunk kernels are as exact as fla's at widths that its blocks of 64 do not divide."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    import flame.register  # noqa: F401
    from kernels.delta_rule import chunk_delta_rule as exact_delta_rule
    from kernels.gated_delta_rule import chunk_gated_delta_rule as exact_gated_delta_rule

    x = cuda(d_k, **({"key_heads": 1, "heads": 2} if gated else {}))
    bounds = torch.tensor(BOUNDS, device="cuda")

    def outcome(operator, x):
        gates = [x["g"]] if gated else []
        out = operator(
            x["q"], x["k"], x["v"], *gates, x["beta"], initial_state=x["h"],
            output_final_state=True, cu_seqlens=bounds,
        )  # fmt: skip
        used = {name: leaf for name, leaf in x.items() if gated or name != "g"}
        return [*out, *reference.gradients(out, used).values()]

    found = {}
    for owner in ("slimstate", "fla"):
        monkeypatch.setenv("SLIMSTATE_KERNELS", owner)
        found[owner] = outcome(chunk_gated_delta_rule if gated else chunk_delta_rule, x)
    wide = {n: t.detach().double().requires_grad_() for n, t in x.items()}
    exact = outcome(exact_gated_delta_rule if gated else exact_delta_rule, wide)
    for ours, theirs, e in zip(found["slimstate"], found["fla"], exact, strict=True):
        floor = torch.finfo(torch.bfloat16).eps * e.abs().max()
        assert (ours - e).abs().max() <= 2 * (theirs - e).abs().max() + floor


@pytest.mark.parametrize("decay", [0.1, 30.0])
def test_kda(decay: float):
    from fla.ops.kda import chunk_kda as theirs

    import flame.register  # noqa: F401
    from kernels.kda import chunk_kda as ours

    bounds = torch.tensor(BOUNDS, device="cuda")

    def run(operator):
        return lambda x: operator(
            x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=x["h"],
            output_final_state=True, cu_seqlens=bounds,
        )  # fmt: skip

    compare(run(theirs), run(ours), cuda(decay=decay, channel_decay=True, heads=4))


@pytest.mark.parametrize("gated", [False, True])
def test_gated_delta_product(gated: bool):
    from fla.ops.gated_delta_product import chunk_gated_delta_product as theirs

    import flame.register  # noqa: F401
    from kernels.gated_delta_product import chunk_gated_delta_product as ours

    bounds = torch.tensor([0, 35, 36, 100], device="cuda")
    x = cuda()
    for name in ("q", "g"):
        x[name] = x[name].detach()[:, : BOUNDS[-1] // 2].contiguous().requires_grad_()
    if not gated:
        del x["g"]

    def run(operator):
        return lambda x: operator(
            x["q"], x["k"], x["v"], x.get("g"), x["beta"], 2, initial_state=x["h"],
            output_final_state=True, cu_seqlens=bounds,
        )  # fmt: skip

    compare(run(theirs), run(ours), x)


def test_models_train_on_flas_kernels_and_agree_with_the_cpu():
    """After flame.register CUDA tensors still reach Triton, and both devices agree."""
    from fla.models import GatedDeltaNetConfig
    from transformers import AutoModelForCausalLM

    import flame.register  # noqa: F401

    torch.manual_seed(0)
    config = GatedDeltaNetConfig(
        hidden_size=64, num_heads=2, head_dim=32, num_hidden_layers=2, vocab_size=50
    )
    model, x = AutoModelForCausalLM.from_config(config).float(), torch.randint(1, 50, (1, 100))
    bounds, found = torch.tensor([0, 30, 100]), {}
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        loss = model(x.to(device), labels=x.to(device), cu_seqlens=bounds.to(device)).loss
        loss.backward()
        found[device] = {n: p.grad.cpu().clone() for n, p in model.named_parameters()}
    for name, grad in found["cpu"].items():
        error = (found["cuda"][name] - grad).norm() / grad.norm()
        # Triton multiplies in TF32, which has 10 bits
        assert error < 2e-2, f"{name}: {error:.1e}"
