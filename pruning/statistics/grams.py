"""Gram matrices of queries and keys: what factorisations of the activations are made from."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Float64, Int64
from torch import Tensor

from pruning.op_call import OpCall
from pruning.statistics.interface import Source, Statistic
from pruning.statistics.products import SumOfProducts


@dataclass
class QueryKeyGram(SumOfProducts, Statistic):
    """Per key head, the Gram matrix of queries stacked on keys: the sum of q qᵀ + k kᵀ.

    It is MᵀM of the paper's M = [Q; K] (arXiv 2602.04852), whatever the number of its rows, in
    d² numbers a head.
    """

    source: ClassVar[Source] = Source.OP

    gram: Float64[Tensor, "H d d"]
    """Sum of outer products of queries and of keys, after conv and activation, before L2 norm."""
    tokens: Int64[Tensor, ""]
    """Number of tokens summed."""

    def update(self, seen: OpCall) -> None:
        """Add the tokens of one delta-rule call; cost 4 tokens d² per head."""
        self.add_products_(self.gram, seen.q, seen.k)
        self.tokens += seen.tokens


@dataclass
class QueryKeySample(SumOfProducts, Statistic):
    """`QueryKeyGram` of a random subset of the rows of [Q; K], as the paper takes it.

    Which rows is fixed before the first token (`pruning.statistics.row_sample`), by the seed of the
    calibration: the same for every head and at every number of processes.
    """

    source: ClassVar[Source] = Source.OP

    gram: Float64[Tensor, "H d d"]
    """Sum of outer products of the sampled queries and keys."""
    rows: Int64[Tensor, ""]
    """Number of rows summed."""

    def update(self, seen: OpCall) -> None:
        """Add the sampled rows of one call; all of them if the call names none.

        Of a token with several keys all of them are taken.
        """
        for x, tokens in zip((seen.q, seen.k), seen.sampled or (None, None), strict=True):
            of_tokens = x.flatten(0, 1).unflatten(0, (seen.tokens, -1))
            chosen = of_tokens if tokens is None else of_tokens[tokens.to(x.device)]
            self.add_products_(self.gram, chosen)
            self.rows += chosen.shape[0] * chosen.shape[1]


@dataclass
class NormalisedGrams(SumOfProducts, Statistic):
    """Per key head, sums and Gram matrices of the L2-normalised queries and of the keys."""

    source: ClassVar[Source] = Source.OP

    key_gram: Float64[Tensor, "H d d"]
    query_gram: Float64[Tensor, "H d d"]
    key_sum: Float64[Tensor, "H d"]
    query_sum: Float64[Tensor, "H d"]
    keys: Int64[Tensor, ""]
    """Number of keys summed."""
    queries: Int64[Tensor, ""]
    """Number of queries summed."""

    def update(self, seen: OpCall) -> None:
        """Add the tokens of one delta-rule call; cost as `QueryKeyGram`'s."""
        keys, queries = _normalised(seen.k), _normalised(seen.q)
        self.add_products_(self.key_gram, keys)
        self.add_products_(self.query_gram, queries)
        self.key_sum += keys.sum((0, 1))
        self.query_sum += queries.sum((0, 1))
        self.keys += seen.k.shape[0] * seen.k.shape[1]
        self.queries += seen.tokens


def _normalised(x: Float[Tensor, "B T H d"]) -> Float64[Tensor, "B T H d"]:
    # With fla's eps inside the root: a row of zeros stays one.
    x = x.detach().double()
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
