"""Speed of cached generation, token by token, as a user of the stock model would run it."""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from flame.errors import UserError
from launch.speed.timing import take_turns


def decode_seconds(
    models: Mapping[str, nn.Module],
    batch_size: int = 8,
    length: int = 64,
    prompt_length: int = 32,
    seed: int = 0,
    repeats: int = 5,
) -> dict[str, list[float]]:
    """Seconds of `repeats` greedy decodings for each model.

    The models take turns, so that what else the machine does falls on all of them. The prompt is
    read before the clock starts, and a first round is not counted: it meets cold caches and
    compiles kernels.

    Args:
        models: causal language models of transformers or fla, each on one device.
        batch_size: sequences decoded together.
        length: tokens generated for each sequence.
        prompt_length: random tokens that each sequence starts with.

    Raises:
        UserError: a count is below 1.
    """
    counts = {"batch_size": batch_size, "length": length, "prompt_length": prompt_length}
    for name, count in {**counts, "repeats": repeats}.items():
        if count < 1:
            raise UserError(f"decoding: {name} is {count}, it must be at least 1")

    def decoding(model: nn.Module) -> Callable[[], float]:
        prompt = random_prompt(model, batch_size, prompt_length, seed)
        return lambda: timed_decoding(model, prompt, length)[1]

    return take_turns({name: decoding(model) for name, model in models.items()}, repeats)


def random_prompt(model: nn.Module, batch_size: int, length: int, seed: int) -> Tensor:
    """Token ids, int64 [batch_size, length] on the model's device, that `seed` determines."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(model.config.vocab_size, (batch_size, length), generator=generator)
    return prompt.to(next(model.parameters()).device)


@torch.no_grad()
def timed_decoding(model: nn.Module, prompt: Tensor, length: int) -> tuple[Tensor, float]:
    """Greedy continuation of `prompt`, int64 [B, length], and the seconds of its decoding.

    The first token comes with the prompt; so that `length` steps are timed, one more token than is
    returned is computed.
    """
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    tokens = []
    _wait(prompt.device)
    start = time.perf_counter()
    for _ in range(length):
        tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
        output = model(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True)
    _wait(prompt.device)
    return torch.cat(tokens, 1), time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """CUDA runs behind the program: wait until it has caught up."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
