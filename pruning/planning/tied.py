"""Families whose key and value channels have one width: what a budget may ask of them."""

from collections.abc import Mapping

from flame.errors import UserError
from pruning.adapters.interface import Adapter
from pruning.planning.budgets import Budget
from pruning.spaces import Kind

BOTH: set[Kind] = {"key", "value"}


def check_tied(budget: Budget, adapter: Adapter) -> None:
    """Raise UserError, with the way out, for one kind of channels or widths that differ."""
    if not adapter.tied_width or not BOTH & set(budget.kinds):
        return
    if budget.space is None and budget.for_:
        return
    if not set(budget.kinds) >= BOTH:
        raise UserError(
            f"{adapter.tied_width} of {adapter.model_type} is both its key and its value width: "
            "prune both to one width by --space square, or whole heads by --space head"
        )
    if budget.allocate != "uniform":
        raise UserError(
            f"--allocate {budget.allocate} makes widths that differ between heads, and the "
            f"low-rank gates of {adapter.model_type} have the one that all share: use --allocate "
            "uniform"
        )


def check_one_width(adapter: Adapter, widths: Mapping[Kind, int]) -> None:
    """Raise UserError unless key and value channels of a tied family go to one width."""
    if adapter.tied_width and BOTH <= widths.keys() and widths["key"] != widths["value"]:
        raise UserError(
            f"{widths['key']} key and {widths['value']} value channels: {adapter.tied_width} of "
            f"{adapter.model_type} is both, so give one number, or --space square"
        )
