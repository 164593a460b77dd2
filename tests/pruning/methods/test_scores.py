"""Every method's scores after a calibration on 1, 2 and 4 processes, against plain computations.

The reference keeps what one unsharded model computes on the same sequences: activations, states
rolled out token by token, gradients by autograd of the loss of all sequences together. The scores
are then written out again with numpy.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from pruning import calibrate
from pruning.adapters import adapter_for
from pruning.calibration.data import CalibrationData, calibration_data
from pruning.calibration.stats_file import Collected
from pruning.methods import METHODS
from pruning.methods.drrqr import DeltaRuleRRQR
from pruning.methods.jrnp import JointRankNorm
from pruning.mixers import find_mixers
from pruning.op_call import OpCall
from pruning.options import DataOptions
from pruning.spaces import Space
from pruning.statistics import KeyOutputErrors, ValueOutputErrors
from pruning.statistics.row_sample import row_sample
from pruning.taps import tap_mixer_inputs, tap_ops
from tests.distributed import run_distributed
from tests.pruning.masking import difference
from tests.pruning.models import FAMILIES, select_from_whole_matrix, weights, write_hf, write_text
from tests.pruning.replays import changes

SEQUENCES, SEQ_LEN = 6, 200
CASES = [("gated_deltanet", 1), ("gated_deltanet", 2), ("gated_deltanet", 4), ("delta_net", 2)]
Array = np.ndarray


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    write_text(folder)
    for family, config in FAMILIES.items():
        write_hf(folder / family, config, weights(config))
    return folder


def data_of(home: Path, family: str) -> CalibrationData:
    options = DataOptions(
        data=str(home / "text.jsonl"),
        tokenizer=str(home / "tokenizer"),
        sequences=SEQUENCES,
        seq_len=SEQ_LEN,
    )
    return calibration_data(resolve(home / family), options)


def calibrate_here(home: Path, family: str) -> Collected:
    reference = resolve(home / family)
    kinds = calibrate.kinds_of(tuple(METHODS), reference.config)
    collected, meta = calibrate.calibrate(reference, kinds, data_of(home, family))
    assert meta.tokens == SEQUENCES * SEQ_LEN
    return collected


@cache
def calibrated(home: Path, family: str, world_size: int) -> Collected:
    """Every statistic of every method, from one calibration."""
    first, *others = run_distributed(calibrate_here, world_size, home, family)
    for other in others:
        for space, of_space in first.items():
            for kind, statistic in of_space.items():
                for name, total in statistic.state_dict().items():
                    assert torch.equal(total, other[space][kind].state_dict()[name])
    return first


@dataclass
class Seen:
    """What one model saw, kept: activations by layer, weights and gradients by name."""

    calls: dict[int, list[OpCall]] = field(default_factory=dict)
    inputs: dict[int, list[Array]] = field(default_factory=dict)
    outputs: dict[int, list[Array]] = field(default_factory=dict)
    weights: dict[str, Array] = field(default_factory=dict)
    gradients: dict[str, Array] = field(default_factory=dict)

    def rows(self, layer: int, name: str) -> Array:
        """q, k or v of all tokens: [tokens, heads, d]."""
        parts = [getattr(call, name)[0] for call in self.calls[layer]]
        return torch.cat(parts).double().numpy()


@cache
def seen(home: Path, family: str) -> Seen:
    """One process, one model, no FSDP2: forward and one backward of the loss of all sequences."""
    reference = resolve(home / family)
    model: Any = load_model(reference).train()
    adapter, found = adapter_for(reference.config), Seen()
    loader = data_of(home, family).loader(0, 1)

    def keep_call(call: OpCall) -> None:
        found.calls.setdefault(call.layer, []).append(call)

    def keep_input(layer: int, x: torch.Tensor) -> None:
        found.inputs.setdefault(layer, []).append(x.double().numpy())

    for number, layer in enumerate(model.model.layers):
        keep = found.outputs.setdefault(number, [])
        layer.attn.o_proj.register_forward_pre_hook(
            lambda module, args, keep=keep: keep.append(args[0][0].detach().double().numpy())
        )
    with tap_ops(model, adapter, keep_call), tap_mixer_inputs(model, adapter, keep_input):
        for _, (inputs, labels) in zip(range(SEQUENCES), loader, strict=False):
            out = model(inputs["input"], cu_seqlens=inputs["cu_seqlens"], use_cache=False)
            F.cross_entropy(out.logits[0], labels[0], reduction="sum").backward()
    loader.close()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found.weights[name] = parameter.detach().double().numpy()
        found.gradients[name] = parameter.grad.double().numpy()
    return found


def projections_of(space: Space) -> list[str]:
    names = {"key": "qk", "value": "vgo", "head": "qkvgbao", "value-head": "vgbao"}[space.kind]
    return [f"model.layers.{space.layer}.attn.{name}_proj.weight" for name in names]


def by_channel(space: Space, name: str, entries: Array) -> Array:
    """Entries of a projection's shape, summed to [heads, channels]."""
    along = entries.sum(0 if name.endswith("o_proj.weight") else 1)
    if space.kind == "key":
        return along.reshape(space.num_heads, space.head_dim)
    if space.kind == "value":
        return along.reshape(-1, space.head_dim).sum(0)[None]
    return along.reshape(space.num_heads, space.head_dim, -1).sum(2)


def by_row(space: Space, name: str, entries: Array) -> Array:
    """`by_channel` of one number for each row (column of the output projection)."""
    spread = entries[None, :] if name.endswith("o_proj.weight") else entries[:, None]
    return by_channel(space, name, spread)


def total(space: Space, found: Seen, score: Any) -> Array:
    names = [name for name in projections_of(space) if name in found.weights]
    return sum(score(name) for name in names)


def l1(space: Space, found: Seen) -> Array:
    return total(space, found, lambda n: by_channel(space, n, np.abs(found.weights[n])))


def l2(space: Space, found: Seen) -> Array:
    def score(name: str) -> Array:
        axis = 0 if name.endswith("o_proj.weight") else 1
        return by_row(space, name, np.linalg.norm(found.weights[name], axis=axis))

    return total(space, found, score)


def taylor(space: Space, found: Seen) -> Array:
    products = {name: np.abs(w * found.gradients[name]) for name, w in found.weights.items()}
    scores = total(space, found, lambda n: by_channel(space, n, products[n]))
    return scores / (SEQUENCES * SEQ_LEN)


def wanda(space: Space, found: Seen) -> Array:
    of_input = space.kind == "key"
    x = np.concatenate((found.inputs if of_input else found.outputs)[space.layer])
    size = np.sqrt(np.square(x).mean(0))
    names = projections_of(space) if of_input else projections_of(space)[-1:]
    assert all(name.endswith("o_proj.weight") is not of_input for name in names)
    return sum(by_channel(space, name, np.abs(found.weights[name]) * size) for name in names)


def output_energy(space: Space, found: Seen) -> Array:
    """Head by head, the mean square of what the output projection makes of its outputs alone."""
    z = np.concatenate(found.outputs[space.layer])
    weight = found.weights[f"model.layers.{space.layer}.attn.o_proj.weight"]
    heads = space.num_heads * space.head_dim
    pairs = zip(np.split(z, heads, 1), np.split(weight, heads, 1), strict=True)
    energies = np.stack([np.square(x @ w.T).sum(1).mean() for x, w in pairs])
    return energies.reshape(space.num_heads, -1)


def activation_norm(space: Space, found: Seen) -> Array:
    if space.kind == "value":
        rows = found.rows(space.layer, "v").reshape(1, -1, space.head_dim)
    else:
        parts = [found.rows(space.layer, name) for name in "qk"]
        rows = np.concatenate(parts).swapaxes(0, 1)
    return np.sqrt(np.square(rows).mean(1))


def pca(space: Space, found: Seen) -> Array:
    keys = found.rows(space.layer, "k")
    unit = keys / np.sqrt(np.square(keys).sum(-1, keepdims=True) + 1e-6)
    covariances = [np.cov(unit[:, head].T, bias=True) for head in range(space.num_heads)]
    return np.stack([np.linalg.eigvalsh(covariance)[::-1] for covariance in covariances])


def states(call: OpCall) -> list[Array]:
    """Token by token, the states [value heads, K, V] after 128 tokens of a document and its end."""
    k, v, beta = (getattr(call, name)[0].double().numpy() for name in ("k", "v", "beta"))
    k = k / np.sqrt(np.square(k).sum(-1, keepdims=True) + 1e-6)
    k = k.repeat(v.shape[1] // k.shape[1], 1)
    decay = np.ones(beta.shape) if call.g is None else np.exp(call.g[0].double().numpy())
    bounds, kept = set(call.cu_seqlens.tolist()), []
    state, age = np.zeros((v.shape[1], k.shape[2], v.shape[2])), 0
    for t in range(len(k)):
        if t in bounds:
            state, age = np.zeros_like(state), 0
        state = state * decay[t, :, None, None]
        missing = v[t] - np.einsum("hk,hkv->hv", k[t], state)
        state = state + np.einsum("h,hk,hv->hkv", beta[t], k[t], missing)
        age += 1
        if age % 128 == 0 or t + 1 in bounds:
            kept.append(state)
    return kept


def jrnp(space: Space, found: Seen, alpha: float, epsilon: float) -> Array:
    kept = np.stack([state for call in found.calls[space.layer] for state in states(call)])
    values = np.linalg.svd(kept, compute_uv=False)
    ranks = (values > epsilon * values[..., :1]).sum(-1).mean(0)
    norms = values.sum(-1).mean(0)
    ranks, norms = (x.reshape(space.head_dim, -1).mean(1) for x in (ranks, norms))
    return alpha * ranks / values.shape[-1] + (1 - alpha) * norms / norms.max()


SCORES = {
    "l1": l1,
    "l2": l2,
    "taylor": taylor,
    "wanda": wanda,
    "activation-norm": activation_norm,
    "output-energy": output_energy,
    "pca": pca,
}
WITHIN_HEADS = ("l1", "l2", "wanda", "activation-norm", "output-energy")


def spaces_of(home: Path, family: str, kinds: Any) -> list[Space]:
    config = resolve(home / family).config
    return [space for space in adapter_for(config).spaces(config) if space.kind in kinds]


@pytest.mark.parametrize(("family", "world_size"), CASES)
@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_of_a_plain_computation(
    name: str, family: str, world_size: int, home: Path
) -> None:
    method: Any = METHODS[name]()
    found, collected = seen(home, family), calibrated(home, family, world_size)
    tensors = {key: torch.from_numpy(value) for key, value in found.weights.items()}
    for space in spaces_of(home, family, method.kinds):
        expected = SCORES[name](space, found)
        if name in WITHIN_HEADS:
            expected = expected / expected.mean(1, keepdims=True)
        scores = method.scores(space, tensors, collected[space.name]).numpy()
        # Gradients come from other kernels in float32, what they are made of too.
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-7, err_msg=space.name)


@pytest.mark.parametrize(("family", "world_size"), CASES)
def test_jrnp_is_that_of_states_rolled_out_token_by_token(
    family: str, world_size: int, home: Path
) -> None:
    found, collected = seen(home, family), calibrated(home, family, world_size)
    for space in spaces_of(home, family, ("head",)):
        for alpha, epsilon in ((0.5, 1e-4), (1.0, 10**-1.5), (0.0, 1e-3)):
            method = JointRankNorm(alpha=alpha, epsilon=epsilon, direction="low")
            scores = method.scores(space, {}, collected[space.name])[0].numpy()
            expected = jrnp(space, found, alpha, epsilon)
            np.testing.assert_allclose(scores, expected, rtol=1e-4, err_msg=space.name)


@pytest.mark.parametrize(("family", "world_size"), CASES)
def test_drrqr_is_that_of_the_matrix_of_all_rows_or_of_the_sample(
    family: str, world_size: int, home: Path
) -> None:
    found, collected = seen(home, family), calibrated(home, family, world_size)
    sample = row_sample(SEQUENCES, SEQ_LEN, DataOptions().seed).chosen.numpy()
    assert len(sample) == 2 * SEQUENCES * SEQ_LEN
    for space in spaces_of(home, family, ("key",)):
        stacked = np.concatenate([found.rows(space.layer, name) for name in "qk"])
        for rows, chosen in ((None, slice(None)), (5000, sample)):
            kept = DeltaRuleRRQR(rows=rows).select(space, 16, {}, collected[space.name])
            for head in range(space.num_heads):
                matrix = torch.from_numpy(stacked[chosen, head])
                assert kept[head].tolist() == select_from_whole_matrix(matrix, 16), space.name


@cache
def output_errors(home: Path, family: str) -> dict[str, Tensor]:
    """By space of the last layer, products of the changes of its last head, from zeroed weights."""
    reference, data = resolve(home / family), data_of(home, family)
    model, adapter = load_model(reference), adapter_for(reference.config)
    given: list[tuple[tuple, dict]] = []
    layer, mixer = list(find_mixers(model, adapter).items())[-1]
    hook = mixer.register_forward_pre_hook(
        lambda module, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    loader = data.loader(0, 1)
    with torch.no_grad():
        for _, (inputs, _labels) in zip(range(SEQUENCES), loader, strict=False):
            model(inputs["input"], cu_seqlens=inputs["cu_seqlens"], use_cache=False)
    loader.close()
    hook.remove()
    model.double()
    found = {}
    for space in (s for s in spaces_of(home, family, ("key", "value")) if s.layer == layer):
        of_sequences = [
            changes(model, space, space.num_heads - 1, *_doubled(*some)).flatten(1)
            for some in given
        ]
        found[space.name] = sum((x @ x.mT for x in of_sequences), torch.zeros(()))
    return found


def _doubled(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    def double(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floats else value

    return tuple(map(double, args)), {name: double(value) for name, value in kwargs.items()}


@pytest.mark.parametrize(("family", "world_size"), CASES)
def test_output_errors_are_those_of_layers_with_zeros(
    family: str, world_size: int, home: Path
) -> None:
    collected = calibrated(home, family, world_size)
    for name, expected in output_errors(home, family).items():
        kind = KeyOutputErrors if name.endswith("key") else ValueOutputErrors
        # Calibration runs in float32, what it is compared with in float64.
        assert difference(collected[name][kind].gram[-1], expected) < 1e-5


def test_every_method_is_compared() -> None:
    assert set(METHODS) == {*SCORES, "jrnp", "drrqr", "output-error", "random"}
