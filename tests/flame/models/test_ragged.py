"""Ragged models: stock where all widths agree, the masked dense model where they do not."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flame.errors import UserError
from flame.model import initialise, meta_model, stock_config
from flame.models.head_groups import gather_heads, gather_keys, head_groups, merge_heads
from flame.models.widths import LayerWidths, layer_widths, slim_config
from pruning.adapters import ADAPTERS
from tests.pruning.families import CONFIGS, build, tiny_config, tokens

FAMILIES = ("delta_net", "gated_deltanet")
NAMES = [name for name in CONFIGS if CONFIGS[name]["model_type"] in FAMILIES]
LENGTHS = [100, 12]
"""In evaluation mode fla takes the chunked operator above 64 tokens, the recurrent one below."""


def cut(
    config: dict[str, Any], keys_alone: bool = False
) -> tuple[dict[str, Any], dict[int, tuple]]:
    """A ragged config, and by layer the heads, key channels by head, value channels that it keeps.

    The first layer loses a head, the last some value channels, unless keys alone are cut; key
    widths are 5, 9 and the full ones, in an order that brings heads of equal width apart.
    """
    dense = build(slim_config(config, {}), device="meta").config.layer_widths()
    kept = {}
    for layer, full in dense.items():
        heads = list(range(full.heads))[layer == 0 and not keys_alone :]
        widths = [(5, full.keys[0], 9)[(head + layer) % 3] for head in heads]
        keys = [
            torch.randperm(full.keys[0], generator=torch.Generator().manual_seed(head))[:width]
            for head, width in zip(heads, widths, strict=True)
        ]
        values = [c for c in range(full.value) if keys_alone or layer != max(dense) or c % 3]
        kept[layer] = (heads, [sorted(row.tolist()) for row in keys], values, full)
    depth = range(config["num_hidden_layers"])
    lists = {
        "key": [[len(row) for row in kept[i][1]] if i in kept else None for i in depth],
        "value": [len(kept[i][2]) if i in kept else None for i in depth],
        "heads": [len(kept[i][0]) if i in kept else None for i in depth],
    }
    return slim_config(config, lists, undo_gain=True), kept


def rows(name: str, heads: list[int], keys: list[list[int]], values: list[int], full: Any) -> Any:
    """(dimension, kept positions) of a mixer's tensor; None if it is not cut."""
    value_heads = [head * full.group + i for head in heads for i in range(full.group)]
    of_values = [head * full.value + c for head in value_heads for c in values]
    if name[:2] in ("q_", "k_"):
        width = full.keys[0]
        return 0, [h * width + c for h, row in zip(heads, keys, strict=True) for c in row]
    if name[:2] in ("v_", "g_"):
        return 0, of_values
    if name.startswith("o_proj"):
        return 1, of_values
    return (0, values) if name.startswith("o_norm") else (0, value_heads)


def sliced_and_masked(dense: nn.Module, kept: dict[int, tuple]) -> tuple[dict, dict]:
    """The ragged model's tensors, and the dense model's with zeros for what is cut."""
    sliced: dict[str, Tensor] = {}
    masked: dict[str, Tensor] = {}
    for name, tensor in dense.state_dict().items():
        parts = name.split(".")
        sliced[name], masked[name] = tensor, tensor.clone()
        if ".attn." in name and int(parts[2]) in kept:
            dim, positions = rows(".".join(parts[4:]), *kept[int(parts[2])])
            sliced[name] = tensor.index_select(dim, torch.tensor(positions))
            if parts[4] == "o_norm":
                # The mean of squares is that over the dense model's channels.
                sliced[name] = sliced[name] * (tensor.shape[0] / len(positions)) ** 0.5
            if parts[4][:2] in ("q_", "k_", "v_", "g_") or parts[4] == "o_proj":
                mask = torch.zeros(tensor.shape[dim]).index_fill_(0, torch.tensor(positions), 1)
                masked[name] = tensor * (mask[:, None] if dim == 0 else mask).view(
                    [-1 if i == dim else 1 for i in range(tensor.ndim)]
                )
    return sliced, masked


def pair(name: str, keys_alone: bool = False) -> tuple[nn.Module, nn.Module]:
    """A ragged model and the masked dense model that it must equal."""
    config = tiny_config(name)
    dense = build(config)
    ragged_config, kept = cut(config, keys_alone)
    sliced, masked = sliced_and_masked(dense, kept)
    ragged = build(ragged_config)
    ragged.load_state_dict(sliced)
    dense.load_state_dict(masked)
    return ragged, dense


@torch.no_grad()
def logits(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return model(*args, **kwargs).logits


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference in units of the largest entry."""
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_equal_widths_are_the_stock_model_bit_for_bit(name: str) -> None:
    dense = build(tiny_config(name))
    ragged = build(slim_config(tiny_config(name), {}))
    ragged.load_state_dict(dense.state_dict())
    mask = torch.ones(2, 100, dtype=torch.int64)
    mask[0, :30] = 0
    for length in LENGTHS:
        ids = tokens(2, length)
        assert torch.equal(logits(ragged, ids), logits(dense, ids))
    ids = tokens(2, 100)
    for options in ({"attention_mask": mask}, {"use_cache": True}):
        assert torch.equal(logits(ragged, ids, **options), logits(dense, ids, **options))


@pytest.mark.parametrize("name", NAMES)
def test_a_ragged_model_is_the_masked_dense_one(name: str) -> None:
    """With gradients: those of the embedding, which all layers pass on."""
    ragged, dense = pair(name)
    assert len({key for layer in ragged.config.layer_widths().values() for key in layer.keys}) == 3
    for length in LENGTHS:
        ids = tokens(2, length)
        assert difference(logits(ragged, ids), logits(dense, ids)) < 2e-5
    gradients = []
    for model in (ragged, dense):
        model.train()(ids, labels=ids).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert difference(gradients[0], gradients[1]) < 2e-4


def test_a_ragged_model_is_the_stock_one_with_zeros_up_to_the_largest_width() -> None:
    config = tiny_config("gated_deltanet")
    widths = [[5, 16], [16, 9], [9, 9]]
    ragged, stock = build(slim_config(config, {"key": widths}, undo_gain=True)), build(config)
    padded = stock.state_dict()
    for name, tensor in ragged.state_dict().items():
        padded[name] = tensor
        if any(f".attn.{part}" in name for part in ("q_", "k_")):
            heads = tensor.split(widths[int(name.split(".")[2])])
            padded[name] = torch.cat(
                [torch.cat([h, h.new_zeros(16 - len(h), *h.shape[1:])]) for h in heads]
            )
    stock.load_state_dict(padded)
    for length in LENGTHS:
        ids = tokens(2, length)
        assert difference(logits(ragged, ids), logits(stock, ids)) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_token_by_token_and_packed_are_parallel(name: str) -> None:
    ragged = build(cut(tiny_config(name))[0])
    ids = tokens(2, 70)
    whole, cache, found = logits(ragged, ids), None, []
    with torch.no_grad():
        for part in ids.split([60, 5, 1, 1, 1, 1, 1], 1):
            out = ragged(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    assert difference(torch.cat(found, 1), whole) < 2e-5
    packed = logits(ragged, ids[:1], cu_seqlens=torch.tensor([0, 33, 70]))
    alone = torch.cat([logits(ragged, ids[:1, :33]), logits(ragged, ids[:1, 33:])], 1)
    assert difference(packed, alone) < 1e-5
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[0, :9] = 0
    padded = logits(ragged, ids, attention_mask=mask)
    assert difference(padded[:1, 9:], logits(ragged, ids[:1, 9:])) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_cached_state_is_as_large_as_the_widths_say(name: str) -> None:
    config = cut(tiny_config(name))[0]
    ragged = build(config)
    with torch.no_grad():
        cache = ragged(tokens(1, 9), use_cache=True).past_key_values
    states = [(layer.state or {}).get("recurrent_state") for layer in cache.layers]
    flat = [t for state in states for t in (state if isinstance(state, tuple) else (state,))]
    found = sum(state.numel() for state in flat if state is not None)
    assert 4 * found == ADAPTERS[config["model_type"]].state_bytes(config)
    assert any(isinstance(state, tuple) and len(state) == 2 for state in states)


def test_generation_and_beams_follow_the_cache() -> None:
    """A beam search reorders the cache; its best sequence scores as a plain forward pass says."""
    ragged = build(cut(tiny_config("gated_deltanet grouped values, hybrid"))[0])
    prompt = tokens(2, 8)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(prompt)
    greedy = ragged.generate(prompt, **options)
    for end in range(8, 14):
        assert torch.equal(greedy[:, end], logits(ragged, greedy[:, :end])[:, -1].argmax(-1))
    found = ragged.generate(
        prompt, num_beams=3, return_dict_in_generate=True, output_scores=True, **options
    )
    scores = logits(ragged, found.sequences).log_softmax(-1)[:, 7:-1]
    chosen = scores.gather(-1, found.sequences[:, 8:, None]).sum((1, 2)) / 6
    torch.testing.assert_close(found.sequences_scores, chosen, atol=1e-4, rtol=1e-4)


def test_heads_are_gathered_and_put_back_in_order() -> None:
    keys, group = (3, 2, 3, 1), 2
    groups = head_groups(keys)
    assert groups == [(3,), (1,), (0, 2)]
    x = torch.arange(9.0)[None, None]
    assert [part.flatten().tolist() for part in gather_keys(x, keys, groups)] == [
        [8], [3, 4], [0, 1, 2, 5, 6, 7],
    ]  # fmt: skip
    values = torch.randn(2, 5, group * len(keys), 4)
    parts = gather_heads(values, -2, len(keys), groups)
    assert torch.equal(parts[2], values[:, :, [0, 1, 4, 5]])
    assert torch.equal(merge_heads(parts, groups), values)
    decay = torch.randn(group * len(keys))
    assert torch.equal(gather_heads(decay, -1, len(keys), groups)[2], decay[[0, 1, 4, 5]])


def test_widths_of_a_config() -> None:
    config = tiny_config("gated_deltanet grouped values, hybrid")
    lists = {"key": [[4], None, [6, 7]], "heads": [1, None, 2]}
    found = layer_widths(slim_config(config, lists))
    assert found == {0: LayerWidths((4,), 36, 2), 2: LayerWidths((6, 7), 36, 2)}
    assert (found[2].scale, found[2].norm_eps_factor) == (None, 1.0)
    undone = layer_widths(slim_config(config, lists | {"value": [24, None, 9]}, undo_gain=True))
    assert [(w.scale, w.norm_eps_factor) for w in undone.values()] == [
        (18**-0.5, 1.5),
        (18**-0.5, 4.0),
    ]
    with pytest.raises(ValueError, match="undo_gain is 'yes': it must be true or false"):
        layer_widths(slim_config(config, lists) | {"undo_gain": "yes"})
    assert (found[2].key_rows, found[2].value_rows, found[2].state_floats) == (13, 144, 13 * 72)


@pytest.mark.parametrize(
    ("widths", "says"),
    [
        ({"keys": []}, "it must map some of key, value, heads to lists"),
        ([1], "it must map"),
        ({"key": [[4, 4]]}, "widths.key is .* it must be a list of 3 layers"),
        ({"key": [[4, 4], None, [4]]}, r"widths.key\[2\] is \[4\]: it must be a list of 2 widths"),
        ({"key": [[4, 4], None, 4]}, r"widths.key\[2\] is 4: it must be a list of 2 widths"),
        ({"key": [[4, 4], [4, 4], [4, 4]]}, r"widths.key\[1\] .* must be null, since layer 1"),
        ({"key": [[4, 0], None, [4, 4]]}, r"widths.key\[0\]\[1\] is 0: .* from 1 to 18"),
        ({"key": [[4, 19], None, [4, 4]]}, r"widths.key\[0\]\[1\] is 19: .* from 1 to 18"),
        ({"value": [37, None, 3]}, r"widths.value\[0\] is 37: .* from 1 to 36"),
        ({"value": [True, None, 3]}, r"widths.value\[0\] is True"),
        ({"heads": [2, None, 3]}, r"widths.heads\[2\] is 3: .* from 1 to 2"),
        ({"heads": [1, None, 2], "key": [[4, 4], None, [4, 4]]}, r"must be a list of 1 widths"),
    ],
)
def test_wrong_widths_are_refused_in_one_line(widths: Any, says: str) -> None:
    config = slim_config(tiny_config("gated_deltanet grouped values, hybrid"), {})
    with pytest.raises(UserError, match=says) as caught:
        stock_config({**config, "widths": widths})
    assert "\n" not in str(caught.value)


def test_narrow_heads_are_refused_on_cuda_by_name() -> None:
    model = build(slim_config(tiny_config("delta_net"), {"key": [[16, 16], [9, 16], [16, 16]]}))
    mixers = [layer.attn for layer in model.model.layers]
    mixers[0]._check_device(SimpleNamespace(is_cuda=True))
    with pytest.raises(ValueError, match="layer 1 has a head of 9 key channels.*take 16 to 256"):
        mixers[1]._check_device(SimpleNamespace(is_cuda=True))


@pytest.mark.parametrize("name", ["delta_net", "gated_deltanet"])
def test_built_on_meta_and_initialised(name: str) -> None:
    config = cut(tiny_config(name))[0]
    model = meta_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    initialise(model, config, seed=3)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    if name == "gated_deltanet":
        assert model.no_weight_decay_names == {
            n for n in model.state_dict() if n[-2:] in ("og", "as")
        }
        for layer in model.model.layers:
            assert 0 < layer.attn.A_log.exp().min() and layer.attn.A_log.exp().max() < 16
            dt = nn.functional.softplus(layer.attn.dt_bias)
            assert 9e-4 < dt.min() and dt.max() < 0.11


def test_a_saved_model_says_how_to_load_it_and_stock_classes_refuse_it(tmp_path: Path) -> None:
    from fla.models import DeltaNetForCausalLM
    from transformers import AutoModelForCausalLM

    ragged = build(cut(tiny_config("delta_net"))[0])
    ragged.save_pretrained(tmp_path)
    assert "import flame.register" in (tmp_path / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert all(map(torch.equal, loaded.state_dict().values(), ragged.state_dict().values()))
    assert difference(logits(loaded, tokens(1, 9)), logits(ragged, tokens(1, 9))) < 1e-5
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        DeltaNetForCausalLM.from_pretrained(tmp_path)


@pytest.mark.slow
def test_transformers_alone_refuses_a_ragged_model(tmp_path: Path) -> None:
    build(cut(tiny_config("delta_net"))[0]).save_pretrained(tmp_path)
    code = f"from transformers import AutoModel as A; A.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode != 0 and "slim_delta_net" in done.stderr
