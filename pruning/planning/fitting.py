"""Fitting: a budget that asks for a square or names engines becomes widths of one model.

A square keeps as many key as value channels a head. Where engines are named, the widths are those
of a shape that all of them take: as much of the state as they allow, but no more than was asked
for. What comes out is a plain budget of widths, so the rest of planning knows nothing of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from flame.errors import UserError
from flame.hugging_face.outer_model import OuterModel
from pruning.adapters import adapter_for
from pruning.adapters.interface import Adapter, Config
from pruning.methods import Method
from pruning.planning.applicable import why_not
from pruning.planning.budgets import SQUARE, Budget, uniform_widths
from pruning.planning.plan import spaces_of_kinds
from pruning.planning.rounding import FAR
from pruning.planning.tied import check_tied
from pruning.serving.verdict import around, check_family, check_served, verdicts
from pruning.spaces import NOUNS, Kind, Space

FORMS: dict[str, tuple[Kind, ...]] = {
    "key": ("key",),
    SQUARE: ("key", "value"),
    "head": ("head",),
    "value-head": ("value-head",),
}
"""What is tried where the budget names no space; of two that keep as much the earlier one wins."""

Widths = Mapping[Kind, int]


@dataclass(frozen=True)
class _Model:
    adapter: Adapter
    config: Config
    spaces: tuple[Space, ...]
    outer: OuterModel | None

    @property
    def sizes(self) -> dict[Kind, int]:
        """Channels or heads of each kind before pruning."""
        return {space.kind: space.head_dim for space in self.spaces}

    def resized(self, widths: Widths) -> Config:
        """The config of the model with these widths."""
        rows = {s.name: (widths[s.kind],) * s.num_heads for s in self.spaces if s.kind in widths}
        return self.adapter.resize(self.config, rows)

    def served(self, widths: Widths) -> Config:
        """The config as an engine reads it."""
        return around(self.resized(widths), self.outer)

    def state_bytes(self, widths: Widths) -> int:
        return self.adapter.state_bytes(self.resized(widths))


def fitted(
    budget: Budget, config: Config, method: Method, outer: OuterModel | None = None
) -> Budget:
    """`budget` as widths of kinds of spaces; itself if it names no engine and asks for no square.

    Args:
        budget: what to remove.
        config: the model's.
        method: what will choose the channels; spaces that it does not choose in are not tried.
        outer: what the model is the text model of, if it is.

    Raises:
        UserError: no square or no width within the budget is one that all named engines take, or
            heads are to differ.
    """
    if budget.space != SQUARE and not budget.for_:
        return budget
    if budget.allocate != "uniform":
        what = "--for" if budget.for_ else "--space square"
        raise UserError(
            f"{what} needs one width for all heads, which --allocate {budget.allocate} does not "
            "give: use --allocate uniform"
        )
    adapter = adapter_for(config)
    check_tied(budget, adapter)
    check_family(around(config, outer), budget.for_)
    model = _Model(adapter, config, tuple(adapter.spaces(config)), outer)
    if budget.space is None:
        return _chosen(budget, model, method)
    if budget.space == SQUARE:
        return _widest(budget, model, SQUARE)
    kinds = budget.kinds
    if len(kinds) == 1 and budget.width is None:
        return _widest(budget, model, kinds[0])
    check_served(model.served(_uniform(budget, model)), budget.for_)
    return budget


def _chosen(budget: Budget, model: _Model, method: Method) -> Budget:
    """The form and widths that keep most of the state, of those that run and fit."""
    if budget.width is not None:
        raise UserError("--width with --for needs a --space, such as key, head or square")
    limit = _state_limit(budget, model)
    found: list[tuple[int, Budget]] = []
    reasons: list[str] = []
    for form, kinds in FORMS.items():
        if not set(kinds) <= model.sizes.keys():
            reasons.append(f"{form}: the model has none to prune")
            continue
        if model.adapter.tied_width and form == "key":
            reasons.append(f"key: {model.adapter.tied_width} is the value width too")
            continue
        reason = next(filter(None, (why_not(method, kind, model.spaces) for kind in kinds)), None)
        if reason is not None:
            reasons.append(f"{form}: {method.name} does not choose there")
            continue
        fitting = [w for w in _steps(budget, model, form) if model.state_bytes(w) <= limit]
        served = next((w for w in fitting if _is_served(budget, model, w)), None)
        if served is None:
            reasons.append(f"{form}: {_why_none(budget, model, fitting)}")
        else:
            found.append((model.state_bytes(served), _of_widths(budget, model, served)))
    if not found:
        raise UserError(f"--for {','.join(budget.for_)}: nothing to prune. {'. '.join(reasons)}")
    return max(found, key=lambda each: each[0])[1]


def _widest(budget: Budget, model: _Model, form: str) -> Budget:
    """The largest width of one form within the budget that all named engines take."""
    steps = list(_steps(budget, model, form))
    if isinstance(budget.width, Mapping):
        raise UserError("--space square takes one --width, for key and value channels")
    if budget.width is not None:
        fitting = [w for w in steps if set(w.values()) == {budget.width}]
        if not fitting:
            raise UserError(f"--width {budget.width}: {_squares(model)}")
    elif budget.state_bytes is not None:
        limit = _state_limit(budget, model)
        fitting = [w for w in steps if model.state_bytes(w) <= limit]
    else:
        most = _most(budget, model, form)
        fitting = [w for w in steps if max(w.values()) <= most]
    served = next((w for w in fitting if _is_served(budget, model, w)), None)
    if served is None:
        where = f" --for {','.join(budget.for_)}" if budget.for_ else ""
        raise UserError(f"--space {form}{where}: {_why_none(budget, model, fitting)}")
    return _of_widths(budget, model, served)


def _most(budget: Budget, model: _Model, form: str) -> int:
    """The width that the ratio leaves of the form, which is counted on the narrower side."""
    if form != SQUARE:
        return next(iter(_uniform(budget, model).values()))
    sizes = model.sizes
    side: Kind = "key" if sizes["key"] <= sizes["value"] else "value"
    narrow = replace(budget, space=side)
    return next(iter(_uniform(narrow, model).values()))


def _uniform(budget: Budget, model: _Model) -> dict[Kind, int]:
    spaces = spaces_of_kinds(model.adapter, model.config, budget.kinds)
    return uniform_widths(budget, model.adapter, model.config, spaces)


def _steps(budget: Budget, model: _Model, form: str) -> Iterator[Widths]:
    """Yield the widths that a form can have, from the widest, without kinds that stay as they are.

    Raises UserError if the family has no such spaces.
    """
    kinds = FORMS.get(form) or budget.kinds
    spaces_of_kinds(model.adapter, model.config, kinds)
    sizes = {kind: model.sizes[kind] for kind in kinds}
    least = min(sizes.values())
    step = max(budget.multiple(kind, size) for kind, size in sizes.items())
    for width in range(least // step * step, 0, -step):
        if changing := {kind: width for kind, size in sizes.items() if width < size}:
            yield changing


def _state_limit(budget: Budget, model: _Model) -> int:
    """Bytes that the state may take; a ratio without a space is a part of the state."""
    if budget.state_bytes is not None:
        return budget.state_bytes
    if not isinstance(budget.ratio, float):
        raise UserError("--for without --space takes one --ratio, or --state-bytes")
    return int(model.adapter.state_bytes(model.config) * (1 - budget.ratio))


def _is_served(budget: Budget, model: _Model, widths: Widths) -> bool:
    found = verdicts(model.served(widths), budget.for_)
    return all(verdict.refusal is None for verdict in found)


def _why_none(budget: Budget, model: _Model, fitting: list[Widths]) -> str:
    """Why no width does: none is small enough, or an engine takes none of them."""
    if not fitting:
        return "no width is small enough"
    found = verdicts(model.served(fitting[0]), budget.for_)
    refusing = next(verdict for verdict in found if verdict.refusal is not None)
    return f"{refusing.name} takes no width that is small enough: {refusing.refusal}"


def _squares(model: _Model) -> str:
    sizes = model.sizes
    return (
        f"d_k is {sizes['key']} and d_v {sizes['value']}, so a square has up to "
        f"{min(sizes['key'], sizes['value'])} channels, fewer than one of them has now"
    )


def _of_widths(budget: Budget, model: _Model, widths: Widths) -> Budget:
    kept = " and ".join(f"{w} of {model.sizes[kind]} {NOUNS[kind]}" for kind, w in widths.items())
    share = model.state_bytes(widths) / model.adapter.state_bytes(model.config)
    where = f"--for {','.join(budget.for_)}" if budget.for_ else "--space square"
    said = f"{where} keeps {kept}, {100 * share:.3g} % of the state"
    if budget.strict_ratio and isinstance(budget.ratio, float):
        asked = (1 - budget.ratio) ** len(budget.kinds)
        if abs(share - asked) > FAR * asked:
            raise UserError(f"--strict-ratio: {said}, and not {100 * asked:.3g} %")
    return replace(
        budget,
        ratio=None,
        state_bytes=None,
        width=dict(widths),
        space=",".join(widths),
        strict_ratio=False,
        fitted=said,
    )
