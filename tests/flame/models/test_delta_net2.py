"""DeltaNet2: its convolutions by their definition, its modes by each other, and its rotations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flame.register  # noqa: F401
from flame.errors import UserError
from flame.model import initialise, meta_model, stock_config
from flame.models.shared_convolution import SharedConvolution, TokenShift
from pruning.adapters import ADAPTERS
from pruning.methods.pca import PCA
from pruning.op_call import OpCall
from pruning.spaces import positions
from pruning.statistics import NormalisedGrams
from pruning.taps import tap_ops
from tests.flame.models.test_ragged import difference, logits
from tests.pruning.families import build, enlarge_stream_, tiny_config, tokens

NAME = "delta_net2, a kernel a head"
RECIPES = Path(__file__).parents[3] / "launch" / "recipes"
VARIANTS: list[dict[str, Any]] = [
    {},
    {"conv_sharing": "head", "qk_activation": "identity"},
    {"conv_sharing": "head", "share_kv_conv": True, "shift_only_conv": True},
    {"conv_sharing": "layer", "share_kv_conv": True, "qk_activation": "relu"},
    {"conv_sharing": "layer", "shift_only_conv": True, "qk_norm": "sum"},
    {"conv_sharing": "channel", "qk_activation": "identity"},
]


def variant(options: dict[str, Any]) -> dict[str, Any]:
    return tiny_config(NAME, qk_activation="silu") | options


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Causal depthwise convolution of [B, T, D] by [D, 1, W], in PyTorch's words."""
    padded = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
    return F.conv1d(padded, weight, groups=len(weight)).transpose(1, 2)


def test_a_shared_convolution_is_the_depthwise_one_of_repeated_kernels() -> None:
    torch.manual_seed(0)
    module, x = SharedConvolution(2, 4), torch.randn(2, 9, 6)
    y, cache = module(x, None, output_final_state=True)
    repeated = module.weight.detach().repeat_interleave(3, 0).requires_grad_()
    expected = convolved(x, repeated)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert repeated.grad is not None
    torch.testing.assert_close(module.weight.grad, repeated.grad.unflatten(0, (2, 3)).sum(1))
    after = torch.randn(2, 1, 6)
    with torch.no_grad():
        step, _ = module(after, "silu", cache)
    torch.testing.assert_close(step, F.silu(convolved(torch.cat([x, after], 1), repeated)[:, -1:]))


def test_a_token_shift_mixes_a_token_with_the_one_before() -> None:
    module, x = TokenShift(2), torch.randn(2, 5, 4)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.25, 2.0]).view(2, 1, 1))
        y, _ = module(x, None)
    shift = torch.tensor([0.25, 0.25, 2.0, 2.0])
    before = F.pad(x, (0, 0, 1, 0))[:, :-1]
    torch.testing.assert_close(y, (1 - shift) * x + shift * before)
    assert TokenShift(3).weight.flatten().tolist() == [0.5] * 3


def test_one_kernel_a_channel_is_stock_delta_net_bit_for_bit() -> None:
    options = {"conv_sharing": "channel", "qk_activation": "silu"}
    model = build(tiny_config(NAME, **options))
    stock = build(tiny_config("delta_net"))
    model.load_state_dict(stock.state_dict())
    for length in (100, 12):
        assert torch.equal(logits(model, tokens(2, length)), logits(stock, tokens(2, length)))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_token_by_token_packed_and_padded_are_parallel(options: dict[str, Any]) -> None:
    model = build(variant(options))
    ids = tokens(2, 70)
    whole = logits(model, ids)
    for parts in ([65, 1, 1, 1, 1, 1], [1] * 12 + [58]):
        cache, found = None, []
        with torch.no_grad():
            for part in ids.split(parts, 1):
                out = model(part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                found.append(out.logits)
        assert difference(torch.cat(found, 1), whole) < 3e-5
    packed = logits(model, ids[:1], cu_seqlens=torch.tensor([0, 33, 70]))
    alone = torch.cat([logits(model, ids[:1, :33]), logits(model, ids[:1, 33:])], 1)
    assert difference(packed, alone) < 1e-5
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[0, :9] = 0
    padded = logits(model, ids, attention_mask=mask)
    assert difference(padded[:1, 9:], logits(model, ids[:1, 9:])) < 1e-5


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_shapes_initialisation_and_gradients(options: dict[str, Any]) -> None:
    config = variant(options)
    model = meta_model(config)
    kernels = {"layer": 1, "head": 2, "channel": 32}[config.get("conv_sharing", "layer")]
    taps = 1 if config.get("shift_only_conv") else 4
    mixer = model.model.layers[0].attn
    assert mixer.k_conv1d.weight.shape == (kernels, 1, taps)
    assert hasattr(mixer, "v_conv1d") != config.get("share_kv_conv", False)
    model.to_empty(device="cpu")
    initialise(model, config, seed=1)
    weight = mixer.q_conv1d.weight
    assert (weight == 0.5).all() if taps == 1 else 0.05 < weight.std() < 0.5
    model(tokens(2, 70), labels=tokens(2, 70)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = build(variant({"share_kv_conv": True}))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded).__name__ == "DeltaNet2ForCausalLM" and loaded.config.share_kv_conv
    assert torch.equal(logits(loaded, tokens(2, 9)), logits(model, tokens(2, 9)))
    assert "delta_net2" in (tmp_path / "README.md").read_text()


def test_beams_follow_the_cache() -> None:
    model = build(variant({"share_kv_conv": True}))
    prompt = tokens(2, 8)
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), num_beams=3, max_new_tokens=5,
        do_sample=False, pad_token_id=0, eos_token_id=None,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    scores = logits(model, found.sequences).log_softmax(-1)[:, 7:-1]
    chosen = scores.gather(-1, found.sequences[:, 8:, None]).sum((1, 2)) / 5
    torch.testing.assert_close(found.sequences_scores, chosen, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"conv_sharing": "group"}, "conv_sharing is 'group': choose layer, head, channel"),
        ({"conv_sharing": "channel", "share_kv_conv": True}, "needs conv_sharing layer or head"),
        ({"use_short_conv": False, "shift_only_conv": True}, "need use_short_conv true"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        stock_config(variant(options))


def test_the_recipe_names_a_model_that_pca_prunes_exactly() -> None:
    from flame.config import job_from_tables
    from flame.recipe import read_tables

    job = job_from_tables(read_tables(RECIPES / "delta_net2.toml"))
    config = json.loads((RECIPES.parents[1] / job.model.config).read_text())
    assert meta_model(config).config.model_type == "delta_net2"
    assert ADAPTERS["delta_net2"].spaces(config)[0].head_dim == 32
    assert "is exact" in PCA().notes(config, ["key"])[0]


# Rotations ------------------------------------------------------------------------------------


def rotate_(model: nn.Module, rotations: dict[int, Tensor]) -> None:
    """Turn the key channels of each head: rows of q_proj and k_proj by [H, d, d] a layer."""
    for layer, rotation in rotations.items():
        mixer = model.model.layers[layer].attn
        for projection in (mixer.q_proj, mixer.k_proj):
            heads = projection.weight.data.unflatten(0, rotation.shape[:2])
            projection.weight.data = (rotation @ heads).flatten(0, 1)


def random_rotations() -> dict[int, Tensor]:
    torch.manual_seed(7)
    return {layer: torch.linalg.qr(torch.randn(2, 16, 16)).Q for layer in range(3)}


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({"conv_sharing": "head", "qk_activation": "identity"}, True),
        ({"conv_sharing": "layer", "qk_activation": "identity", "share_kv_conv": True}, True),
        ({"conv_sharing": "head", "qk_activation": "identity", "shift_only_conv": True}, True),
        ({"conv_sharing": "channel", "qk_activation": "identity"}, False),
        ({"conv_sharing": "head", "qk_activation": "silu"}, False),
        ({"conv_sharing": "head", "qk_activation": "identity", "qk_norm": "sum"}, False),
    ],
    ids=str,
)
def test_pca_says_rightly_whether_keys_may_be_rotated(options: dict[str, Any], exact: bool) -> None:
    config = variant(options)
    model = build(config)
    before = logits(model, tokens(2, 70))
    rotate_(model, random_rotations())
    change = difference(logits(model, tokens(2, 70)), before)
    assert change < 2e-5 if exact else change > 1e-3
    assert ("is exact" in PCA().notes(config, ["key"])[0]) == exact


def keys_seen(model: nn.Module) -> tuple[dict[int, Tensor], dict[int, NormalisedGrams]]:
    """L2-normalised keys [tokens, H, d] of each layer, and pca's statistics of the same tokens."""
    adapter = ADAPTERS["delta_net2"]
    spaces = {s.layer: s for s in adapter.spaces(model.config.to_dict()) if s.kind == "key"}
    sums = {layer: NormalisedGrams.zeros(space) for layer, space in spaces.items()}
    keys = {}

    def see(call: OpCall) -> None:
        sums[call.layer].update(call)
        keys[call.layer] = F.normalize(call.k.double(), dim=-1).flatten(0, 1)

    with tap_ops(model, adapter, see), torch.no_grad():
        model(tokens(4, 70, seed=5))
    return keys, sums


@pytest.mark.parametrize("sharing", ["head", "layer"])
def test_pca_projects_to_the_rotated_and_masked_model(sharing: str) -> None:
    """The rotation made afresh, by the SVD of the centred keys; 6 of 16 components are kept."""
    config = variant({"conv_sharing": sharing, "qk_activation": "identity"})
    adapter, model = ADAPTERS["delta_net2"], enlarge_stream_(build(config))
    keys, sums = keys_seen(model)
    spaces = [space for space in adapter.spaces(config) if space.kind == "key"]
    projected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for space in spaces:
        weights = {axis.fqn: projected[axis.fqn] for axis in space.axes}
        made = PCA().new_tensors(space, 6, weights, {NormalisedGrams: sums[space.layer]})
        projected |= {name: tensor.float() for name, tensor in made.items()}
    small = build(adapter.resize(config, {s.name: (6, 6) for s in spaces}, undo_gain=True))
    small.load_state_dict(projected)

    rotations = {}
    for layer, of_layer in keys.items():
        centred = of_layer.transpose(0, 1) - of_layer.mean(0)[:, None]
        rotations[layer] = torch.linalg.svd(centred, full_matrices=False).Vh.float()
    rotate_(model, rotations)
    for layer in model.model.layers:
        for projection in (layer.attn.q_proj, layer.attn.k_proj):
            projection.weight.data.unflatten(0, (2, 16))[:, 6:] = 0
    assert difference(logits(small, tokens(2, 70)), logits(model, tokens(2, 70))) < 2e-5


# Spaces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS[:3] + VARIANTS[5:], ids=str)
@pytest.mark.parametrize("kind", ["key", "head"])
def test_masked_is_sliced(options: dict[str, Any], kind: str) -> None:
    config = variant(options)
    adapter, model = ADAPTERS["delta_net2"], enlarge_stream_(build(config))
    spaces = [space for space in adapter.spaces(config) if space.kind == kind]
    kept = {
        s.name: tuple(torch.arange(1, s.head_dim, 2) for _ in range(s.num_heads)) for s in spaces
    }
    state = dict(model.state_dict())
    for space in spaces:
        for axis in space.axes:
            places = positions(axis, kept[space.name])
            state[axis.fqn] = state[axis.fqn].index_select(axis.dim, places)
    sizes = {name: tuple(len(row) for row in of_space) for name, of_space in kept.items()}
    small = build(adapter.resize(config, sizes, undo_gain=True))
    small.load_state_dict(state)
    parameters = dict(model.named_parameters())
    for space in spaces:
        for axis in space.axes:
            if axis.role == "projection":
                mask = torch.zeros(axis.layout.size)
                mask[positions(axis, kept[space.name])] = 1
                weight = parameters[axis.fqn].data
                weight *= mask[:, None] if axis.dim == 0 else mask
    for length in (70, 12):
        ids = tokens(2, length)
        assert difference(logits(small, ids), logits(model, ids)) < 2e-5
