"""Contract of every registered adapter, against the stock models themselves."""

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flame.errors import UserError
from pruning.adapters import ADAPTERS, PRUNED, TIED, adapter_for
from pruning.adapters.widths import expansion
from pruning.spaces import HEAD_KINDS, KINDS, Kept, Kind, Space, positions, widths_of
from pruning.transform.slices import slices_of_spaces
from tests.pruning import hybrids, kda_hybrids
from tests.pruning.families import CONFIGS, build, tiny_config, tokens

LAYER = "model.layers.0.attn."


def of_kind(config: dict[str, Any], kind: str) -> list[Space]:
    adapter = ADAPTERS[config["model_type"]]
    return [space for space in adapter.spaces(config) if space.kind == kind]


def kinds_of(config: dict[str, Any]) -> list[Kind]:
    """The kinds of spaces of a model: some families tie value channels, few group value heads."""
    has = {space.kind for space in ADAPTERS[config["model_type"]].spaces(config)}
    return [kind for kind in KINDS if kind in has]


PAIRS = [(name, kind) for name, config in CONFIGS.items() for kind in kinds_of(config)]
SLIM = [name for name, config in CONFIGS.items() if f"slim_{config['model_type']}" in PRUNED]


def kept_of(kind: Kind) -> int:
    """How many to keep: fewer than any model has."""
    return 1 if kind in HEAD_KINDS else 5


def shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    state = build(config, device="meta").state_dict()
    return {name: list(tensor.shape) for name, tensor in state.items()}


def selections(spaces: list[Space], k: int) -> Iterator[tuple[Space, Kept]]:
    for space in spaces:
        generator = torch.Generator().manual_seed(space.layer)
        order = [
            torch.randperm(space.head_dim, generator=generator) for _ in range(space.num_heads)
        ]
        yield space, tuple(row[:k].sort().values for row in order)


def widths(spaces: list[Space], k: int) -> dict[str, tuple[int, ...]]:
    """k channels of every head."""
    return {space.name: (k,) * space.num_heads for space in spaces}


def sliced(state: dict[str, Tensor], spaces: list[Space], k: int) -> dict[str, Tensor]:
    state = dict(state)
    for space, kept in selections(spaces, k):
        for axis in space.axes:
            state[axis.fqn] = state[axis.fqn].index_select(axis.dim, positions(axis, kept))
    return state


def shares_kernels(config: dict[str, Any], kind: Kind) -> bool:
    """Whether convolutions have no row for what is cut: a channel, or a head."""
    if config["model_type"] != "delta_net2":
        return False
    own = {"channel": KINDS, "head": HEAD_KINDS}
    return kind not in own.get(config.get("conv_sharing", "layer"), ())


def test_every_family_has_a_tiny_model() -> None:
    tiny = {config["model_type"] for config in CONFIGS.values()}
    tiny |= hybrids.CONFIGS.keys() | kda_hybrids.CONFIGS.keys()
    assert tiny == set(ADAPTERS) - set(PRUNED)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_resized_models_have_exactly_the_sliced_shapes(name: str, kind: Kind) -> None:
    config = tiny_config(name)
    adapter = adapter_for(config)
    spaces = of_kind(config, kind)
    k = kept_of(kind)
    assert spaces and len({space.name for space in spaces}) == len(spaces)
    expected = shapes(config)
    for space in spaces:
        for axis in space.axes:
            assert expected[axis.fqn][axis.dim] == axis.layout.size
            table = axis.layout.table()
            assert table.shape[:2] == (space.num_heads, space.head_dim)
            assert len(table.unique()) == table.numel()
            removed = table[:, k:].numel()
            expected[axis.fqn][axis.dim] -= removed
    before = copy.deepcopy(config)
    resized = adapter.resize(config, widths(spaces, k))
    assert config == before
    assert shapes(resized) == expected
    left = {space.head_dim for space in of_kind(resized, kind)}
    # One value head a key head is no group.
    assert left == (set() if kind == "value-head" and k == 1 else {k})
    assert adapter.state_bytes(resized) < adapter.state_bytes(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_sliced_weights_load_into_the_resized_model(name: str) -> None:
    config = tiny_config(name)
    adapter = adapter_for(config)
    for kind in kinds_of(config):
        spaces = of_kind(config, kind)
        state = sliced(build(config).state_dict(), spaces, kept_of(kind))
        resized = build(adapter.resize(config, widths(spaces, kept_of(kind))))
        resized.load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_keeping_everything_changes_nothing(name: str) -> None:
    config = tiny_config(name)
    adapter = adapter_for(config)
    spaces = adapter.spaces(config)
    everything = {space.name: (space.head_dim,) * space.num_heads for space in spaces}
    assert adapter.resize(config, everything) == config
    assert adapter.resize(config, {}) == config
    state = build(config).state_dict()
    for kind in kinds_of(config):
        of = of_kind(config, kind)
        for key, tensor in sliced(state, of, of[0].head_dim).items():
            assert torch.equal(tensor, state[key])


@pytest.mark.parametrize("name", CONFIGS)
def test_softmax_layers_have_no_space(name: str) -> None:
    config = tiny_config(name)
    layers = {space.layer for space in adapter_for(config).spaces(config)}
    assert layers == ({0, 2} if "hybrid" in name else {0, 1, 2})


@pytest.mark.parametrize("name", CONFIGS)
def test_axes_cover_every_tensor_of_the_mixer(name: str) -> None:
    """q, k and KDA's decays for key channels; what belongs to values for those; all for heads; all
    but q and k for value heads."""
    config = tiny_config(name)
    of_layer = {key.removeprefix(LAYER) for key in shapes(config) if key.startswith(LAYER)}
    keys = {key for key in of_layer if key[:2] in ("q_", "k_")}
    assert len(keys) == (4 if config.get("use_short_conv", True) else 2)
    decays = {"f_proj.1.weight", "dt_bias"} if "f_proj.1.weight" in of_layer else set()
    keys |= decays
    per_head = {key for key in of_layer if key[:2] in ("a_", "b_") or "." not in key}
    narrow = {"f_proj.0.weight", "g_proj.0.weight"}
    expected = {
        "key": keys,
        "value": of_layer - keys - per_head,
        "head": of_layer - {"o_norm.weight"} - narrow,
        "value-head": of_layer - {"o_norm.weight"} - narrow - keys | decays,
    }
    for kind in kinds_of(config):
        space = of_kind(config, kind)[0]
        apart = {key for key in expected[kind] if "conv1d" in key and shares_kernels(config, kind)}
        assert {axis.fqn.removeprefix(LAYER) for axis in space.axes} == expected[kind] - apart
        for axis in space.axes:
            assert (axis.role == "convolution") == ("conv1d" in axis.fqn)
            assert (axis.role == "gate") == ("_proj.1.weight" in axis.fqn)
            assert (axis.role == "projection") == ("_proj.weight" in axis.fqn)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_wrong_widths_are_refused(name: str, kind: Kind) -> None:
    config = tiny_config(name)
    adapter = adapter_for(config)
    spaces = of_kind(config, kind)
    d, noun = spaces[0].head_dim, spaces[0].noun
    for k in (0, -1, d + 1):
        with pytest.raises(ValueError, match=f"keep {k} of {d} {noun}"):
            adapter.resize(config, widths(spaces, k))
    with pytest.raises(ValueError, match=f"spaces differ: {spaces[0].name}"):
        adapter.resize(config, widths(spaces[1:], 1))
    with pytest.raises(ValueError, match="spaces differ: layers.9.key"):
        adapter.resize(config, widths(spaces, 1) | {"layers.9.key": (5,)})
    with pytest.raises(ValueError, match=f"{spaces[0].name} has widths of 5 heads"):
        adapter.resize(config, widths(spaces, 1) | {spaces[0].name: (1,) * 5})


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(SLIM)))
def test_widths_that_differ_are_refused_without_a_slim_class(name: str) -> None:
    config = tiny_config(name)
    ragged = {
        space.name: (space.layer + 1, *(2,) * (space.num_heads - 1))
        for space in of_kind(config, "key")
    }
    with pytest.raises(ValueError, match="use --allocate uniform, or --pad"):
        adapter_for(config).resize(config, ragged)


@pytest.mark.parametrize(
    "name", [name for name, config in CONFIGS.items() if "value-head" in kinds_of(config)]
)
def test_key_heads_that_serve_unequal_numbers_of_value_heads_are_refused(name: str) -> None:
    ragged = {
        space.name: (1, *(space.head_dim,) * (space.num_heads - 1))
        for space in of_kind(CONFIGS[name], "value-head")
    }
    with pytest.raises(ValueError, match="every key head must keep as many value heads"):
        adapter_for(CONFIGS[name]).resize(CONFIGS[name], ragged)


@pytest.mark.parametrize("name", SLIM)
def test_widths_that_differ_make_the_slim_class(name: str) -> None:
    config = tiny_config(name, architectures=["Stock"])
    adapter = adapter_for(config)
    depth = range(config["num_hidden_layers"])
    key, value, head = (of_kind(config, kind) for kind in ("key", "value", "head"))
    linear = {space.layer for space in key}
    ragged = {space.name: (space.layer + 1, *(2,) * (space.num_heads - 1)) for space in key}
    slim = adapter.resize(config, ragged)
    assert slim["model_type"] == f"slim_{config['model_type']}" and "architectures" not in slim
    assert slim["widths"]["key"] == [
        list(ragged[f"layers.{layer}.key"]) if layer in linear else None for layer in depth
    ]
    assert slim | config == config | {"widths": slim["widths"]}
    both = widths(head, 1) | {space.name: (space.layer + 1,) for space in value}
    lists = adapter.resize(config, both)["widths"]
    assert lists["value"] == [layer + 1 if layer in linear else None for layer in depth]
    assert lists["heads"] == [1 if layer in linear else None for layer in depth]
    assert set(lists) == {"value", "heads"}
    assert ADAPTERS[slim["model_type"]].state_bytes(slim) < adapter.state_bytes(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_kinds_at_once(name: str) -> None:
    """Key widths are of the heads that survive; of a dimension, what every space keeps is left."""
    config = tiny_config(name)
    adapter = adapter_for(config)
    spaces = adapter.spaces(config)
    rows = {"key": torch.arange(5), "value": torch.arange(5)}
    kept = {
        space.name: (rows.get(space.kind, torch.arange(1, space.head_dim)),) * space.num_heads
        for space in spaces
    }
    resized = adapter.resize(config, widths_of(spaces, kept))
    before, after = of_kind(config, "key")[0], of_kind(resized, "key")[0]
    assert (after.num_heads, after.head_dim) == (before.num_heads - 1, 5)
    assert all(space.head_dim == 5 for space in of_kind(resized, "value"))
    state = build(config).state_dict()
    for fqn, slices in slices_of_spaces(spaces, kept, kept).items():
        for part in slices:
            state[fqn] = state[fqn].index_select(part.dim, part.kept)
    build(resized).load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_state_bytes_are_those_of_the_recurrent_states(name: str) -> None:
    config = tiny_config(name)
    model = build(config)
    with torch.no_grad():
        cache = model(tokens(1, 5), use_cache=True).past_key_values
    layers = {space.layer for space in adapter_for(config).spaces(config)}
    measured = sum(cache[layer]["recurrent_state"].numel() * 4 for layer in layers)
    assert adapter_for(config).state_bytes(config) == measured > 0


@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - set(PRUNED)))
def test_absent_keys_have_the_stock_defaults(name: str) -> None:
    from transformers import AutoConfig

    import flame.register  # noqa: F401

    stock = AutoConfig.for_model(name).to_dict()
    bare = {"model_type": name}
    assert adapter_for(bare).spaces(bare) == adapter_for(stock).spaces(stock)
    assert adapter_for(bare).state_bytes(bare) == adapter_for(stock).state_bytes(stock)
    kinds = ("key", "value") if adapter_for(bare).tied_width else ("key",)
    spaces = [space for space in adapter_for(bare).spaces(bare) if space.kind in kinds]
    half = widths(spaces, spaces[0].head_dim // 2)
    for config in (bare, stock):
        found = adapter_for(config).resize(config, half, undo_gain=True)
        eps = "norm_eps" if "norm_eps" in stock else "rms_norm_eps"
        assert found[eps] == 2 ** len(kinds) * stock[eps]


@pytest.mark.parametrize("eps", ["1e-6", -1e-6, float("nan"), float("inf"), None, True])
def test_an_eps_that_is_no_number_is_refused(eps: Any) -> None:
    with pytest.raises(UserError, match="config: norm_eps is .*, expected a number of 0 or more"):
        adapter_for(tiny_config("kda", norm_eps=eps))


def test_float_knobs_round_trip_for_every_width() -> None:
    nudged = 0
    for base in range(1, 257):
        for target in range(1, 769, 7):
            factor = expansion(base, target)
            assert int(base * factor) == target == round(base * factor)
            nudged += factor != target / base
    assert nudged > 100, "none of these needed care, so the test tests nothing"


def test_delta_net_knobs_round_trip_for_every_width() -> None:
    for hidden, heads in ((1000, 10), (2048, 16), (1536, 12), (2560, 20)):
        config: dict[str, Any] = {
            "model_type": "delta_net",
            "hidden_size": hidden,
            "num_heads": heads,
        }
        adapter = ADAPTERS["delta_net"]
        spaces = of_kind(config, "key")
        for k in range(1, spaces[0].head_dim):
            resized = adapter.resize(config, widths(spaces, k))
            assert int(hidden * resized["expand_k"]) == heads * k
            assert adapter.spaces(resized)[0].head_dim == k


@pytest.mark.parametrize("family", ["delta_net", "gated_deltanet"])
def test_sizes_of_several_kinds_round_trip_through_the_knobs(family: str) -> None:
    """As the stock layers compute them, with their demand that products be whole numbers."""
    adapter, checked = ADAPTERS[family], 0
    for hidden, heads, d_k, d_v in ((1000, 10, 100, 50), (1536, 12, 98, 128), (720, 6, 120, 77)):
        config: dict[str, Any] = {"model_type": family, "hidden_size": hidden, "num_heads": heads}
        config["num_hidden_layers"] = 2
        if family == "delta_net":
            config |= {"expand_k": heads * d_k / hidden, "expand_v": heads * d_v / hidden}
        else:
            config |= {"num_v_heads": 3 * heads, "head_dim": d_k, "expand_v": d_v / d_k}
        spaces = adapter.spaces(config)
        sizes = {space.kind: space.head_dim for space in spaces}
        for k, v, h in itertools.product(
            range(1, sizes["key"], 7), range(1, sizes["value"], 5), (1, heads - 1, heads)
        ):
            of = {"key": (k,) * h, "value": (v,), "head": (h,), "value-head": (3,) * h}
            resized = adapter.resize(config, {space.name: of[space.kind] for space in spaces})
            assert sizes_of(resized) == (h, k, v)
            checked += 1
    assert checked > 1000


def sizes_of(config: dict[str, Any]) -> tuple[int, int, int]:
    """Heads, key width and value width as fla's layers compute them."""
    heads = config["num_heads"]
    if config["model_type"] == "delta_net":
        rows = [config["hidden_size"] * config[knob] for knob in ("expand_k", "expand_v")]
        assert all(math.isclose(row, round(row)) and round(row) % heads == 0 for row in rows)
        return heads, round(rows[0]) // heads, round(rows[1]) // heads
    value_width = config["head_dim"] * config["expand_v"]
    assert math.isclose(value_width, int(value_width), rel_tol=1e-5)
    assert config["num_v_heads"] == 3 * heads
    return heads, config["head_dim"], int(value_width)


def test_gated_deltanet_keeps_its_value_width() -> None:
    adapter = ADAPTERS["gated_deltanet"]
    for head_dim, expand_v in ((128, 1.0), (256, 2.0), (98, 49 / 98), (100, 1.29)):
        config: dict[str, Any] = {"model_type": "gated_deltanet", "head_dim": head_dim}
        config["expand_v"] = expand_v
        spaces = of_kind(config, "key")
        for k in range(1, head_dim):
            resized = adapter.resize(config, widths(spaces, k))
            assert int(k * resized["expand_v"]) == int(head_dim * expand_v)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "delta_net", "qk_activation": "elu"}, "qk_activation is 'elu'"),
        ({"model_type": "delta_net", "num_heads": 7}, "not a multiple of num_heads 7"),
        ({"model_type": "gated_deltanet", "num_heads": 4, "num_v_heads": 6}, "num_v_heads 6"),
        ({"model_type": "gated_deltanet", "head_dim": "wide"}, "head_dim is 'wide'"),
        ({"model_type": "gated_deltanet", "expand_v": -1}, "expand_v is -1"),
        ({"model_type": "delta_net", "hidden_size": 0}, "hidden_size is 0"),
        ({"model_type": "delta_net", "num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"model_type": "delta_net", "attn": {"num_heads": 2}}, "attn is"),
        ({"model_type": "delta_net", "attn": [3]}, "attn is 3"),
        ({"model_type": "llama"}, "'llama'.*delta_net, .*gated_deltanet"),
        ({}, "no model_type.*delta_net, .*gated_deltanet"),
    ],
)
def test_models_that_cannot_be_pruned_are_refused_with_the_reason(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        adapter_for(changes)


@pytest.mark.parametrize("family", TIED)
def test_tied_families_are_refused_and_pointed_to_the_way_out(family: str) -> None:
    with pytest.raises(UserError, match=f"{family}.*both its key and its value.*delta_net"):
        adapter_for({"model_type": family})


def test_a_model_of_softmax_layers_alone_is_refused() -> None:
    config = tiny_config("gated_deltanet", attn={"layers": [0, 1, 2], "num_heads": 3})
    with pytest.raises(UserError, match="no linear-attention layer"):
        adapter_for(config)
