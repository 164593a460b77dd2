"""How much of the noise in a query reaches a layer's output, against the rank of its state.

arXiv 2602.04852 says that a state of low effective rank amplifies query noise. With a state S of
singular values s_i, d channels of keys, a query q and Gaussian noise e of E|e|^2 = x^2 |q|^2, the
output S q is off by S e, and since E|S e|^2 = x^2 |q|^2 |S|_F^2 / d,

    E|S e|^2 / |S q|^2 = x^2 a(q),    a(q) = (|S|_F^2 / d) / (|S q|^2 / |q|^2).

The error grows in proportion to x, and a, the amplification, says how fast. Where all s_i are equal
a is 1 for every q: the state turns, and shrinks, a query and its noise alike. Otherwise the noise
has the mean gain of all directions and the query the gain of its own. A query along s_1 gains:
a = er / d with the stable rank er = |S|_F^2 / s_1^2. One that lies elsewhere loses, without bound:
over directions the mean of a is at least 1 (Jensen), and infinite at rank 1 and 2. So this module
takes the geometric mean, which for random queries and r equal singular values is, psi the digamma,

    (r / d) exp(psi(d / 2) - psi(r / 2)):    1 at r = d, and 3.6 at rank 1 for large d,

because |S q|^2 / (s^2 |q|^2) is then Beta(r / 2, (d - r) / 2) distributed. A trained model's
queries are not random: below this figure they point where its states are strong.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from launch.drawing.table import Column, Table
from pruning.adapters import ADAPTERS
from pruning.op_call import OpCall
from pruning.state_rank import measure, singular_values
from pruning.states.rollout import Operator, states_after
from pruning.taps import operator_for, tap_ops

COLUMNS = (
    Column("layer", "layer", "d"),
    Column("head", "head", "d"),
    Column("stable_rank", "stable rank", ".2f"),
    Column("utilisation", "utilisation", ".3f"),
    Column("amplification", "amplification", ".3f"),
    Column("random_queries", "of random queries", ".3f"),
    Column("error_at_10_percent", "error at 10 % noise", ".3f"),
)


@dataclass(frozen=True)
class QueryNoise:
    """One head's states, and what they do to the noise of its queries; means over documents."""

    layer: int
    head: int
    stable_rank: float
    utilisation: float
    amplification: float
    """Squared relative error of the output over that of the query; geometric mean over queries."""

    random_queries: float
    """The same for random queries and a state of `stable_rank` equal singular values."""

    error_at_10_percent: float
    """Relative error of the output where the query's is 0.1."""


def amplification(
    states: Float[Tensor, "... K V"], queries: Float[Tensor, "... n K"]
) -> Float[Tensor, "..."]:
    """Geometric mean over n queries of a(q) of the module's text, float64; queries not zero."""
    states, queries = states.double(), queries.double()
    gains = (queries @ states).square().sum(-1) / queries.square().sum(-1)
    mean_gain = states.square().sum((-2, -1)) / states.shape[-2]
    return (mean_gain[..., None] / gains).log().mean(-1).exp()


def random_query_amplification(rank: Float[Tensor, "..."], key_dim: int) -> Float[Tensor, "..."]:
    """Amplification for random queries of a state whose `rank` singular values are equal."""
    rank = torch.as_tensor(rank, dtype=torch.float64)
    whole = torch.full_like(rank, key_dim / 2).digamma()
    return rank / key_dim * (whole - (rank / 2).digamma()).exp()


@torch.no_grad()
def query_noise(
    model: nn.Module,
    config: dict[str, Any],
    tokens: Int[Tensor, "B T"],
    asked: Int[Tensor, "B n"],
    length: int,
) -> list[QueryNoise]:
    """A record for each layer and head of `model` on B documents. Collective where it is sharded.

    Args:
        asked: positions of the tokens whose queries are measured: those that recall something.
        length: tokens of each document after which its state is taken.

    Raises:
        KeyError: the family of `config` has no adapter.
    """
    records: list[QueryNoise] = []
    adapter = ADAPTERS[config["model_type"]]
    # Looked up before a tap takes its place, or the rollout's own calls would be tapped.
    operator = operator_for(adapter)

    def on_call(call: OpCall) -> None:
        records.extend(call_noise(call, operator, asked, length))

    with tap_ops(model, adapter, on_call):
        model(input_ids=tokens, use_cache=False)
    return sorted(records, key=lambda record: (record.layer, record.head))


def call_noise(
    call: OpCall, operator: Operator, asked: Int[Tensor, "B n"], length: int
) -> list[QueryNoise]:
    """The heads of one call of the delta rule, whose rows are documents."""
    (states,) = states_after(call, operator, [length])
    ranks = measure(singular_values(states))
    rows = torch.arange(len(asked), device=asked.device)[:, None]
    queries = call.q[rows, asked].repeat_interleave(states.shape[1] // call.q.shape[2], dim=2)
    amplified = amplification(states, queries.transpose(1, 2)).log().mean(0).exp()
    stable, used = ranks.stable_rank.mean(0), ranks.utilisation.mean(0)
    expected = random_query_amplification(stable, states.shape[-2])
    return [
        QueryNoise(
            layer=call.layer,
            head=head if call.heads is None else call.heads[head],
            stable_rank=float(stable[head]),
            utilisation=float(used[head]),
            amplification=float(amplified[head]),
            random_queries=float(expected[head]),
            error_at_10_percent=0.1 * float(amplified[head]) ** 0.5,
        )
        for head in range(states.shape[1])
    ]


def table(records: list[QueryNoise]) -> Table:
    """A row for each layer and head."""
    return Table(COLUMNS, [vars(record) for record in records])
