"""What the stock class of a model calls its tensors, and what transformers calls them on a disk.

transformers 5 stacks the experts of a mixture, joins convolutions and renames modules when it loads
a checkpoint, and undoes that when it saves one. Its own transformations are used here, a group of
tensors at a time; this is the only module that touches them.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

from torch import Tensor

from flame.checkpoint.source import TensorInfo
from flame.errors import UserError, some
from flame.hugging_face.regrouped_source import Group
from flame.model import meta_model


class StockForm:
    """The tensors of the stock class of a config, and how they lie in a Hugging Face folder."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Build the class on the meta device; raise `UserError` if the config is refused."""
        model: Any = meta_model(config)
        self._model = model
        state = model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        """Shapes by name, tied tensors under each of their names."""
        self.floating = {name for name, tensor in state.items() if tensor.is_floating_point()}
        """Names of the tensors that hold floating-point numbers."""
        self.ties: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
        """The name of a tied tensor, and that of the tensor that it repeats."""
        patterns = set(model._keys_to_ignore_on_load_unexpected or ())
        # Buffers that checkpoints of earlier versions hold (`_adjust_missing_and_unexpected_keys`).
        for buffer in ("rotary_emb.inv_freq", "position_ids"):
            if any(name.endswith(buffer) for name in model.initial_buffers):
                patterns.add(rf"(^|\.){re.escape(buffer)}$")
        self._unused = [re.compile(pattern) for pattern in patterns]

    def on_load(self, names: Iterable[str]) -> list[Group]:
        """Return what transformers makes of the tensors `names` of a folder when it loads them.

        Tensors that it would leave out with a warning come out under their own names.

        Raises:
            UserError: two tensors would become one.
        """
        from transformers.core_model_loading import dot_natural_key

        renamings, converters = _kinds(self._mapping(legacy=True))
        found: dict[str, list[tuple[str, Any, str]]] = {}
        for name in sorted(names, key=dot_natural_key):
            target, converter, pattern = _renamed(name, renamings, converters)
            target = self._with_prefix(target)
            if target not in self.shapes and self._with_prefix(name) in self.shapes:
                target, converter, pattern = self._with_prefix(name), None, name
            if target not in self.shapes:
                target, converter, pattern = name, None, name
            found.setdefault(target, []).append((name, converter, pattern))
        return [self._group(target, parts, ()) for target, parts in found.items()]

    def on_save(self, names: Iterable[str]) -> list[Group]:
        """Return how transformers saves the tensors `names` of the stock class."""
        from transformers.core_model_loading import PrefixChange, dot_natural_key

        # As for a model that was made from its config: no prefixes, no names of the past.
        mapping = [t for t in self._mapping(legacy=False) if not isinstance(t, PrefixChange)]
        renamings, converters = _kinds([t.reverse_transform() for t in reversed(mapping)])
        found: dict[str, list[tuple[str, Any, str]]] = {}
        for name in sorted(names, key=dot_natural_key):
            target, converter, pattern = _renamed(name, [], converters)
            if converter is None:
                target = _renamed(name, renamings, [])[0]
            found.setdefault(target, []).append((name, converter, pattern))
        return [self._group(target, parts, renamings) for target, parts in found.items()]

    def is_unused(self, name: str) -> bool:
        """Return whether transformers leaves a tensor of a folder out without a warning."""
        return any(pattern.search(name) for pattern in self._unused)

    def check(self, infos: Mapping[str, TensorInfo]) -> None:
        """Raise `UserError` unless `infos` are names and shapes of the stock class's tensors."""
        known = infos.keys() | {twin for twin, own in self.ties.items() if own in infos}
        known |= {own for twin, own in self.ties.items() if twin in infos}
        complain(self.shapes.keys() - known, infos.keys() - self.shapes.keys())
        for name, info in infos.items():
            if info.shape != self.shapes[name]:
                raise UserError(
                    f"the checkpoint's {name} has shape {info.shape}, config.json asks for "
                    f"{self.shapes[name]}"
                )

    def _mapping(self, legacy: bool) -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping

        return get_model_conversion_mapping(self._model, add_legacy=legacy) or []

    def _with_prefix(self, name: str) -> str:
        """Return `name` with the prefix of the decoder put before it or taken away, if that fits.

        A checkpoint of the decoder alone lacks the prefix that the causal model has.
        """
        prefix = f"{self._model.base_model_prefix}."
        short = name.removeprefix(prefix)
        if short != name and short in self.shapes:
            return short
        return prefix + name if prefix + name in self.shapes else name

    def _group(
        self, target: str, parts: Sequence[tuple[str, Any, str]], then: Sequence[Any]
    ) -> Group:
        sources = tuple(name for name, _, _ in parts)
        converter = parts[0][1]
        if converter is None:
            if len(sources) > 1:
                raise UserError(f"the checkpoint holds {some(sources, 3)}, which are all {target}")
            return Group(sources, target)
        patterns = [pattern for _, _, pattern in parts]

        def convert(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
            work = deepcopy(converter)
            # Of a stack, those of a few rows: then names and patterns are those of the first rows.
            for name, pattern, tensor in zip(sources, patterns, tensors, strict=False):
                work.add_tensor(target, name, pattern, tensor)
            made = work.convert(target, model=self._model, config=self._model.config)
            single = {n: t[0] if isinstance(t, list) else t for n, t in made.items()}
            return {_renamed(n, then, [])[0]: tensor for n, tensor in single.items()}

        return Group(sources, target, convert)


def stock_form(config: Mapping[str, Any]) -> StockForm:
    """Return the form of a `config.json`; the last few are kept."""
    return _stock_form(json.dumps(config, sort_keys=True))


def complain(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise `UserError` if a checkpoint lacks tensors of its model, or has others."""
    lacks, has = sorted(missing), sorted(unexpected)
    complaints = [f"lacks {some(lacks, 5)}"] if lacks else []
    complaints += [f"has {some(has, 5)}, which the model does not"] if has else []
    if complaints:
        raise UserError(f"the checkpoint {' and '.join(complaints)}: is config.json its own?")


@lru_cache(maxsize=4)
def _stock_form(config: str) -> StockForm:
    return StockForm(json.loads(config))


def _kinds(mapping: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the transformations that only rename, and those that compute."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    return renamings, [t for t in mapping if isinstance(t, WeightConverter)]


def _renamed(
    name: str, renamings: Sequence[Any], converters: Sequence[Any]
) -> tuple[str, Any, str]:
    """Return the new name, the converter that takes the tensor or None, and its pattern."""
    for renaming in renamings:
        name = renaming.rename_source_key(name)[0]
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return target, converter, pattern
    return name, None, name
