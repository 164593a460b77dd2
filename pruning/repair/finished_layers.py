"""Finished layers of a repair in a folder, so that a repair that is killed goes on from them."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from flame.errors import UserError
from flame.storage.checksums import hash_file
from flame.storage.json_file import read_object, write_object
from flame.storage.safetensors_file import DTYPES, SafetensorsFile, save_tensors
from pruning.planning.new_tensors import Later, NewTensors
from pruning.repair.local_steps import Outcome


@dataclass(frozen=True)
class FittedLayer:
    """A layer's new tensors, none if no step helped, and how it came to them."""

    outcome: Outcome
    tensors: NewTensors
    """By their names in the model; on the first process only."""


@dataclass(frozen=True)
class FinishedLayers:
    """A folder with a safetensors file and a record for each finished layer."""

    folder: Path
    mark: str
    """What tells this repair from others."""

    def save(self, layer: int, outcome: Outcome, tensors: dict[str, Tensor]) -> None:
        """Write a layer; it counts once its record is there, which comes last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(layer)
        save_tensors(tensors, file)
        content = {"hash": hash_file(file), "mark": self.mark, **asdict(outcome)}
        new = self._record(layer).with_suffix(".new")
        write_object(new, content)
        new.replace(self._record(layer))

    def load(self, layer: int) -> FittedLayer | None:
        """A finished layer, whose tensors are read when needed; None if it is not finished.

        Raises:
            UserError: it is another repair's, or damaged.
        """
        if not self._record(layer).is_file():
            return None
        content = read_object(self._record(layer))
        if content.get("mark") != self.mark:
            raise UserError(
                f"{self.folder} holds layers of a repair of another model, plan, data or options: "
                "name another --repair-folder, or remove it"
            )
        if hash_file(self._file(layer)) != content.get("hash"):
            raise UserError(f"{self._file(layer)} is damaged (its hash differs): remove it")
        file = SafetensorsFile(self._file(layer))
        tensors = {
            name: Later(entry.shape, DTYPES[entry.code], partial(file.get_tensor, name))
            for name, entry in file.entries.items()
        }
        return FittedLayer(Outcome(**{key: content[key] for key in _OUTCOME}), tensors)

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.safetensors"

    def _record(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.json"


_OUTCOME: dict[str, Any] = Outcome.__annotations__
