"""What has to be computed and moved, and how fast a machine does it."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flame.errors import UserError
from flame.process.distributed import compute_dtype, local_device

CHUNK = 64
"""Tokens of a chunk of the delta rule, by whose count its operations are given."""
RATES = "matrix products, float64 products, delta rule, bytes"


@dataclass(frozen=True)
class Work:
    """Amounts of four kinds, each with a rate of its own."""

    products: float = 0.0
    """Operations of matrix products in the dtype that the model computes in."""
    float64: float = 0.0
    """Operations of products in float64."""
    delta_rule: float = 0.0
    """Operations of the delta rule's chunked form."""
    moved: float = 0.0
    """Bytes that passes over tensors read and write."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * a for a in _values(self)))

    __rmul__ = __mul__

    def seconds(self, rates: "Work") -> float:
        """How long it takes at so much of each kind a second."""
        return sum(a / b for a, b in zip(_values(self), _values(rates), strict=True))


def rates_of(words: tuple[str, ...]) -> Work:
    """Rates from a command line.

    Raises:
        UserError: there are not four of them, or one is no positive number.
    """
    try:
        rates = Work(*map(float, words))
        valid = len(words) == 4 and all(0 < rate < float("inf") for rate in _values(rates))
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise UserError(
            f"--rates {','.join(words)}: four numbers a second are needed: {RATES}; for example "
            "400e12,50e12,50e12,2e12"
        )
    return rates


def measured_rates(
    operator: Callable[..., tuple[Tensor, Tensor | None]],
    key: int,
    value: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Work:
    """Rates of this machine, with the operator on heads of `key` × `value`; takes seconds."""
    device, dtype = local_device(), compute_dtype()
    left = torch.randn(1024, 1024, device=device, dtype=dtype)
    rows = torch.randn(key, 2**22 // key, device=device, dtype=torch.float64)
    tokens, heads = 512, 4
    q, k = torch.randn(2, 1, tokens, heads, key, device=device, dtype=dtype).unbind()
    v = torch.randn(1, tokens, heads, value, device=device, dtype=dtype)
    beta = torch.rand(1, tokens, heads, device=device, dtype=dtype)
    big = torch.randn(2**22, device=device)

    def delta_rule() -> None:
        operator(q=q, k=k, v=v, beta=beta, use_qk_l2norm_in_kernel=True)

    return Work(
        products=2 * 1024**3 / _best(lambda: left @ left, clock),
        float64=2 * key * rows.numel() / _best(lambda: rows @ rows.mT, clock),
        delta_rule=tokens * heads * delta_rule_operations(key, value) / _best(delta_rule, clock),
        moved=2 * big.nbytes / _best(lambda: big * 2, clock),
    )


def delta_rule_operations(key: int, value: int) -> float:
    """Of a token and a head: four products over a chunk's tokens, three with the state."""
    return 2 * (3 * CHUNK * key + 2 * CHUNK * value + 3 * key * value)


def _best(work: Callable[[], object], clock: Callable[[], float]) -> float:
    found = []
    with torch.no_grad():
        for _ in range(4):
            begin = clock()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found.append(clock() - begin)
    return min(found)


def _values(work: Work) -> tuple[float, ...]:
    return dataclasses.astuple(work)
