"""DCP's planner of a load, with messages that a person can act on."""

from collections.abc import Collection
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from flame.errors import UserError, some


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's load planner, which says by name what the step lacks or has in another form.

    Args:
        optional: names of entries that keep their present value if the step lacks them.
    """

    def __init__(self, optional: Collection[str] = ()) -> None:
        super().__init__(allow_partial_load=bool(optional))
        self._optional = frozenset(optional)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        missing = sorted(set(self.state_dict) - set(saved) - self._optional)
        if missing:
            lacking = some(missing, 3)
            raise UserError(f"the checkpoint lacks {lacking}: it is of another model or run")
        for name in self.state_dict.keys() & saved.keys():
            _check_form(name, self.state_dict[name], saved[name])
        return super().create_local_plan()

    def load_value(self, read_item: ReadItem, value: Any) -> None:
        """Put an entry that is no tensor into the state dict."""
        name = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[name], value)


def _check_form(name: str, value: Any, saved: Any) -> None:
    """Raise `UserError` if an entry is to be loaded into a value of another form."""
    stored, wanted = (
        isinstance(one, kind)
        for one, kind in ((saved, TensorStorageMetadata), (value, torch.Tensor))
    )
    if stored != wanted:
        forms = {True: "a tensor", False: "another value"}
        raise UserError(
            f"the checkpoint's {name} is {forms[stored]}, this run expects {forms[wanted]}"
        )
    if not stored:
        return
    if value.shape != saved.size:
        shapes = f"has shape {tuple(saved.size)}, this run expects {tuple(value.shape)}"
        raise UserError(f"the checkpoint's {name} {shapes}: it is of another model")
    dtype = saved.properties.dtype
    if dtype.is_floating_point != value.dtype.is_floating_point:
        raise UserError(f"the checkpoint's {name} is of {dtype}, this run expects {value.dtype}")
