"""The loss in chunks against the plain one, computed from full logits by autograd."""

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flame.errors import UserError
from flame.recipe.sections import Distill
from flame.training.losses.chunk_rows import chunk_rows
from flame.training.losses.chunked import Projection, chunked_losses
from flame.training.losses.hidden_distance import hidden_distance
from flame.training.losses.scaling import scaled
from flame.training.losses.tokens import Mix, token_losses
from flame.training.objective import Objective, next_token_loss
from tests.flame.tiny import GATED_DELTANET, LLAMA, build

TOKENS, WIDTH, VOCABULARY = 23, 8, 41


def random_states(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, output weight and bias, all of them leaves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    hidden, weight, bias = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    return hidden, weight, bias


def random_labels() -> Tensor:
    labels = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(9))
    labels[0, 3:6] = -100
    return labels


def plain_loss(
    hidden: Tensor, projection: Projection, labels: Tensor, told: Tensor | None, mix: Mix
) -> tuple[Tensor, Tensor]:
    """Cross entropy and T² · KL from full logits `[…, V]`."""
    logits = projection(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    entropy = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    if told is None:
        return entropy, torch.zeros(())
    valid, heat = labels != -100, mix.temperature
    divergence = nn.functional.kl_div(
        (logits / heat).log_softmax(-1),
        (told / heat).log_softmax(-1),
        reduction="none",
        log_target=True,
    )
    return entropy, divergence.sum(-1)[valid].sum() * heat**2


@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 1000])
@pytest.mark.parametrize("mix", [Mix(), Mix(0.3, 1.7, 2.0), Mix(0.0, 1.0, 0.5)])
def test_chunks_equal_the_plain_loss_and_its_gradients(chunk: int, mix: Mix) -> None:
    labels = random_labels()
    other, other_weight, other_bias = (part.detach() for part in random_states(1))
    teacher = (other, Projection(other_weight, other_bias)) if mix.kl else None
    told = teacher[1](teacher[0]) if teacher else None
    expected, actual = random_states(0), random_states(0)
    entropy, kl = plain_loss(expected[0], Projection(*expected[1:]), labels, told, mix)
    (3 * (mix.cross_entropy * entropy + mix.kl * kl)).backward()
    total, *parts = chunked_losses(
        actual[0], Projection(*actual[1:]), labels, teacher=teacher, mix=mix, chunk_tokens=chunk
    )
    (3 * total).backward()
    torch.testing.assert_close(parts, [entropy.detach(), kl.detach().double()])
    torch.testing.assert_close(total, mix.cross_entropy * entropy + mix.kl * kl)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_bf16_states_lose_no_more_than_the_plain_loss_does() -> None:
    labels = random_labels()
    exact = random_states(0)
    entropy, _ = plain_loss(exact[0], Projection(*exact[1:]), labels, None, Mix())
    entropy.backward()
    errors = []
    for chunked in (True, False):
        states = random_states(0, torch.bfloat16)
        project = Projection(*states[1:])
        loss = (
            chunked_losses(states[0], project, labels, chunk_tokens=4)[0]
            if chunked
            else plain_loss(states[0], project, labels, None, Mix())[0]
        )
        loss.backward()
        errors.append(
            [float((a.grad - b.grad).abs().max()) for a, b in zip(states, exact, strict=True)]
        )
    for own, plain in zip(*errors, strict=True):
        assert own <= 2 * plain


def test_a_scale_is_not_rounded_to_the_gradients_dtype() -> None:
    torch.manual_seed(0)
    values, third = torch.rand(4096).to(torch.bfloat16), torch.tensor(1 / 3)
    assert scaled(values, third).dtype == torch.bfloat16
    ratio = scaled(values, third).double().sum() / values.double().sum()
    assert abs(3 * ratio - 1) < 2e-4
    assert abs(3 * float(third.to(torch.bfloat16)) - 1) > 1e-3


class _Largest(TorchDispatchMode):
    """Notes the most elements that any tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_full_logits_never_exist() -> None:
    """Forward and backward: no tensor is larger than a chunk's logits or the output weight."""
    tokens, vocabulary, chunk = 512, 96, 16
    hidden = torch.randn(1, tokens, 4, requires_grad=True)
    projection = Projection(torch.randn(vocabulary, 4, requires_grad=True))
    labels = torch.randint(vocabulary, (1, tokens))
    teacher = (torch.randn(1, tokens, 4), Projection(torch.randn(vocabulary, 4)))
    with _Largest() as seen:
        total, _, _ = chunked_losses(
            hidden, projection, labels, teacher=teacher, mix=Mix(1, 1, 2), chunk_tokens=chunk
        )
        total.backward()
    assert seen.elements <= max(chunk * vocabulary, tokens * 4)


def test_a_chunk_has_as_many_tokens_as_its_device_and_head_ask_for() -> None:
    vocabulary, tokens = 2**20, 300
    rows = chunk_rows(vocabulary, trained=True, device_type="cpu")
    assert rows < tokens
    weight = torch.zeros(vocabulary, 1, requires_grad=True)
    with _Largest() as seen, torch.no_grad():
        labels = torch.zeros(1, tokens, dtype=torch.long)
        chunked_losses(torch.zeros(1, tokens, 1), Projection(weight), labels)
    assert seen.elements == rows * vocabulary
    assert chunk_rows(152_000, trained=True, device_type="cuda") == 4096
    assert chunk_rows(152_000, trained=False, device_type="cuda") == 1024
    assert chunk_rows(2_000, trained=False, device_type="cuda") > 4096


@pytest.mark.parametrize("mix", [Mix(), Mix(0.3, 1.7, 2.0)])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_losses_of_a_chunk_compile_to_one_graph_for_any_number_of_tokens(
    mix: Mix, backend: str
) -> None:
    """As on CUDA; inductor writes C++ here and Triton there."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(token_losses, backend=counter, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for tokens in (9, 7, 5, 12):
        logits, told = torch.randn((2, tokens, 41), generator=generator)
        labels = torch.randint(41, (tokens,), generator=generator)
        labels[2] = -100
        teacher = told.clone() if mix.kl else None
        actual = compiled(logits, labels, teacher, mix, True)
        expected = token_losses(logits, labels, told if mix.kl else None, mix, True)
        torch.testing.assert_close(tuple(actual), tuple(expected))
    assert counter.frame_count <= 2


def test_neither_a_sure_token_nor_an_unlikely_one_is_lost_to_rounding() -> None:
    """In bf16 the sure one's `p` is 1; in fp32 the unlikely one's is 0."""
    logits = torch.tensor([[9.0, 0.0], [200.0, 0.0]], dtype=torch.bfloat16)
    _, _, gradient = token_losses(logits[:1], torch.tensor([0]), None, Mix(), True)
    assert gradient is not None and gradient.dtype == torch.bfloat16
    exact = -1 / (1 + math.exp(9))
    torch.testing.assert_close(float(gradient[0, 0]), exact, rtol=2**-8, atol=0)
    assert float(token_losses(logits[1:], torch.tensor([1]), None, Mix(), True)[0]) == 200.0


DELTA_NET = {
    "model_type": "delta_net",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "hidden_ratio": 2,
    "vocab_size": 67,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    "config", [GATED_DELTANET, DELTA_NET, LLAMA], ids=lambda c: c["model_type"]
)
def test_models_have_the_plain_loss_and_gradients(config: dict[str, Any]) -> None:
    """Tied and untied embeddings; labels of −100."""
    tokens = torch.randint(31, (2, 33), generator=torch.Generator().manual_seed(0))
    inputs, labels = {"input": tokens[:, :-1]}, tokens[:, 1:].clone()
    labels[1, 10:] = -100
    plain, chunked = build(config), build(config)
    for model in (plain, chunked):
        for parameter in model.parameters():
            parameter.data *= 0.3
    logits = plain(input_ids=inputs["input"], use_cache=False).logits
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    expected.backward()
    loss = next_token_loss(chunked, inputs, labels)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in chunked.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(chunked.get_output_embeddings())


def test_compiled_and_recomputed_layers_have_the_same_gradients() -> None:
    from flame.model import layers

    tokens = torch.arange(33)[None]
    gradients = []
    for compiled in (False, True):
        model = build(GATED_DELTANET).train()
        if compiled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in layers(model):
                layer.compile(backend="eager")
        next_token_loss(model, {"input": tokens[:, :-1]}, tokens[:, 1:]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(gradients[0]) == len(gradients[1])
    for (_, plain), (_, other) in zip(*(g.items() for g in gradients), strict=True):
        torch.testing.assert_close(other, plain)


def test_logits_that_are_scaled_afterwards_are_refused() -> None:
    config = LLAMA | {"model_type": "granite", "logits_scaling": 8.0}
    with pytest.raises(UserError, match="GraniteForCausalLM changes its logits"):
        next_token_loss(
            build(config), {"input": torch.zeros(1, 4).long()}, torch.zeros(1, 4).long()
        )


def test_distance_of_hidden_states_is_relative_and_leaves_out_ignored_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 2, 5, 4)
    own = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    other = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[1, 2, -100, 3, 4], [-100, 1, 1, 1, 1]])
    relative = (own - other).square().sum(-1) / other.square().sum(-1)
    expected = relative[:, labels != -100].sum() / 3
    gradient = torch.autograd.grad(expected, own)[0]
    actual = hidden_distance(list(own), list(other), labels)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(2 * actual, own)[0], 2 * gradient)


def test_an_objective_without_a_teacher_is_the_cross_entropy() -> None:
    model, tokens = build(GATED_DELTANET), torch.arange(12)[None]
    losses = Objective(model, Distill())({"input": tokens}, tokens)
    torch.testing.assert_close(losses.total, next_token_loss(model, {"input": tokens}, tokens))
    assert float(losses.cross_entropy) == float(losses.total.detach())
    assert float(losses.kl) == float(losses.hidden) == 0.0
    assert not losses.cross_entropy.requires_grad
