"""Cached decoding of unmodified fla models runs our step, under Triton's interpreter here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fla.layers.gated_deltanet
import pytest
import torch
from torch import Tensor, nn

import flame.register  # noqa: F401
from flame.errors import UserError
from flame.model import stock_config
from kernels.decode_step import fla_layers
from tests.pruning.transform.test_masked_sliced import pruned

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "num_heads": 2}
GATED = {"model_type": "gated_deltanet", "head_dim": 16, "expand_v": 1.5}
MODELS: dict[str, dict[str, Any]] = {
    "gated": GATED,
    "gated, grouped, negative": {**GATED, "num_v_heads": 4, "allow_neg_eigval": True},
    "gated, no output gate": {**GATED, "use_gate": False, "conv_bias": True},
    "gated, sigmoid": {**GATED, "head_dim": 24, "expand_v": 1, "output_gate_activation": "sigmoid"},
    "delta": {"model_type": "delta_net", "allow_neg_eigval": True},
    "delta, gated, no beta": {
        "model_type": "delta_net", "use_gate": True, "use_beta": False, "expand_k": 0.5,
        "qk_activation": "identity",
    },
    "kda": {"model_type": "kda", "head_dim": 16, "expand_v": 1.5},
    "kda, grouped, bounded": {
        "model_type": "kda", "head_dim": 16, "num_v_heads": 4, "safe_gate": True,
        "lower_bound": -5.0, "allow_neg_eigval": True,
    },
}  # fmt: skip
NOT_OURS: dict[str, dict[str, Any]] = {
    "no convolution": {**GATED, "use_short_conv": False},
    "12 key channels": {**GATED, "head_dim": 12},
    "relu": {"model_type": "delta_net", "qk_activation": "relu"},
    "sum norm": {"model_type": "delta_net", "qk_norm": "sum"},
}
LENGTHS, NEW = (70, 3), 3
"""fla reads prompts of more than 64 tokens by its chunked operator, shorter ones token by token."""


def build(config: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    options = stock_config({**SHAPE, **config, "initializer_range": 0.3})
    return AutoModelForCausalLM.from_config(options, dtype=torch.float32).eval()


def generated(model: nn.Module) -> Tensor:
    """Greedy continuations of a left-padded batch."""
    generator = torch.Generator().manual_seed(1)
    width = max(LENGTHS)
    batch = torch.randint(1, 61, (len(LENGTHS), width), generator=generator)
    mask = (torch.arange(width) >= width - torch.tensor(LENGTHS)[:, None]).long()
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(batch * mask, attention_mask=mask, **options)[:, width:]


@contextmanager
def counted() -> Iterator[list[int]]:
    """The rows of each call of our step meanwhile."""
    calls: list[int] = []
    ours = fla_layers.decode_step

    def counting(step: Any) -> Tensor:
        calls.append(len(step.q))
        return ours(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fla_layers, "decode_step", counting)
        yield calls


def by_fla(run: Any) -> Any:
    """The same on fla's path: nothing of it is ours."""
    with pytest.MonkeyPatch.context() as patch, counted() as calls:
        patch.setenv("SLIMSTATE_KERNELS", "fla")
        found = run()
    assert calls == []
    return found


def check_generation(model: nn.Module) -> None:
    with counted() as calls:
        found = generated(model)
    # The first token comes with the prompt.
    assert calls == [len(LENGTHS)] * model.config.num_hidden_layers * (NEW - 1)
    assert torch.equal(found, by_fla(lambda: generated(model)))
    assert len(found.unique()) > 2


@pytest.mark.interpreter
@pytest.mark.parametrize("name", MODELS)
def test_generation_runs_our_step_and_writes_what_flas_path_writes(name: str):
    check_generation(build(MODELS[name]))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["gated", pytest.param("kda", marks=pytest.mark.slow)])
def test_a_pruned_model_runs_our_step_too(name: str, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    config = {**SHAPE, **MODELS[name], "initializer_range": 0.3}
    flags = ["--ratio", "0.5", "--multiple-of", "8", "--space", "key"]
    pruned(tmp_path, config, flags, dense=build(MODELS[name]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert model.model.layers[0].attn.head_k_dim == 8
    check_generation(model)


@pytest.mark.interpreter
def test_logits_and_cache_are_flas_to_rounding():
    model = build(MODELS["kda"])

    @torch.no_grad()
    def run() -> list[Tensor]:
        output, found = model(torch.arange(9).view(3, 3), use_cache=True), []
        for token in range(3):
            ids = torch.full((3, 1), token + 5)
            output = model(ids, past_key_values=output.past_key_values, use_cache=True)
            found.append(output.logits)
        cached = [output.past_key_values[layer] for layer in range(2)]
        assert output.past_key_values.get_seq_length() == 6
        return [*found, *(x for c in cached for x in (c["recurrent_state"], *c["conv_state"]))]

    for ours, theirs in zip(run(), by_fla(run), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", NOT_OURS)
def test_what_is_not_ours_goes_to_fla(name: str):
    with counted() as calls:
        found = generated(build(NOT_OURS[name]))
    assert calls == [] and found.shape == (len(LENGTHS), NEW)


@pytest.mark.interpreter
def test_training_gradients_and_a_watched_operator_go_to_fla():
    model = build(GATED)
    ids = torch.ones(1, 1, dtype=torch.int64)

    def step(**options: Any) -> None:
        cache = model(torch.arange(8).view(1, 8), use_cache=True).past_key_values
        model(ids, past_key_values=cache, **{"use_cache": True, **options})

    watched = fla.layers.gated_deltanet.fused_recurrent_gated_delta_rule
    with counted() as calls:
        step()
        with torch.no_grad():
            step(use_cache=False)
            with pytest.MonkeyPatch.context() as patch:
                name = "fused_recurrent_gated_delta_rule"
                patch.setattr(fla.layers.gated_deltanet, name, lambda **x: watched(**x))
                step()
        assert calls == []
        with torch.no_grad():
            step()
        assert calls == [1, 1]


@pytest.mark.interpreter
def test_a_masked_token_gives_nothing_and_changes_nothing():
    layer = build(GATED).model.layers[0].attn
    from fla.models.utils import Cache

    cache, x = Cache(), torch.randn(2, 5, 32)
    with torch.no_grad(), counted() as calls:
        layer(x[:, :4], past_key_values=cache, use_cache=True)
        before = [cache[0]["recurrent_state"].clone(), cache[0]["conv_state"][0].clone()]
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
        out = layer(x[:, 4:], attention_mask=mask, past_key_values=cache, use_cache=True)[0]
    assert calls == [2] and (out[1] == 0).all() and (out[0] != 0).all()
    for now, then in zip(
        (cache[0]["recurrent_state"], cache[0]["conv_state"][0]), before, strict=True
    ):
        assert torch.equal(now[1], then[1]) and not torch.equal(now[0], then[0])


@pytest.mark.interpreter
def test_the_tasks_of_lm_eval_decode_in_batches_by_our_step(tmp_path: Path):
    from flame.data.tokenizer import load_tokenizer, train_tokenizer
    from launch.lm.generation import generate
    from tests.launch.task_files import TEXTS

    train_tokenizer(TEXTS, 300, tmp_path)
    tokenizer, model = load_tokenizer(str(tmp_path)), build({**GATED, "vocab_size": 300})
    prompts = [tuple(tokenizer(text)["input_ids"][:20]) for text in TEXTS[:3]]

    def run() -> list[list[int]]:
        return generate(model, tokenizer, 0, prompts, 4, ["\n\n\n"], {})

    with counted() as calls:
        found = run()
    assert calls == [3] * len(calls) and len(calls) >= 2 and found == by_fla(run)


def test_without_the_interpreter_a_cpu_keeps_its_own_path():
    with counted() as calls:
        generated(build(GATED))
    assert calls == []


def test_unknown_kernels_are_refused_at_import(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLIMSTATE_KERNELS", "triton")
    with pytest.raises(UserError, match="SLIMSTATE_KERNELS=triton: known are slimstate, fla"):
        flame.register.register()
