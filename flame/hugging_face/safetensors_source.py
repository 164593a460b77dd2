"""The tensors of a Hugging Face folder under their names on the disk, as a source."""

import logging
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from flame.checkpoint.source import TensorInfo, row_bounds
from flame.errors import UserError
from flame.storage.json_file import read_object
from flame.storage.safetensors_file import DTYPES, SafetensorsFile

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_FILE = "model.safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"

log = logging.getLogger(__name__)


class SafetensorsSource:
    """The tensors of a Hugging Face folder: those of the files that transformers would open.

    These are `model.safetensors` if it is there, even beside an index, and else all files that the
    index names. Every tensor in such a file counts, whether the index lists it or not; the last
    file, by name, wins.

    Args:
        folder: the folder.
        file: the name of a single file or of an index, such as `adapter_model.safetensors`.

    Raises:
        UserError: the folder has no safetensors, a file is damaged, or the index is wrong.
    """

    def __init__(self, folder: Path, file: str = SAFETENSORS_FILE) -> None:
        self._folder = Path(folder)
        paths, promised = _weight_files(self._folder, file)
        files = [SafetensorsFile(path) for path in paths]
        self._files = {name: file for file in files for name in file.entries}
        for name in sorted(promised.keys() - self._files.keys()):
            raise UserError(
                f"{self._folder / promised[name]} lacks {name}, which its index promises: copy the "
                "model again"
            )

    def names(self) -> list[str]:
        return sorted(self._files)

    def info(self, name: str) -> TensorInfo:
        file = self._file(name)
        entry = file.entries[name]
        if entry.code not in DTYPES:
            raise UserError(f"{name} in {file.path} is of dtype {entry.code}: not supported")
        return TensorInfo(entry.shape, DTYPES[entry.code])

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        start, stop = row_bounds(name, self.info(name), rows)
        return self._file(name).read(name, start, stop)

    def _file(self, name: str) -> SafetensorsFile:
        """Return the file that holds a tensor."""
        if name not in self._files:
            raise UserError(f"{self._folder} has no tensor {name}")
        return self._files[name]


def weights_name(config: Mapping[str, Any]) -> str:
    """Return the name of the file or index that a `config.json` asks for, or the usual one."""
    return str(config.get("transformers_weights") or SAFETENSORS_FILE)


def _weight_files(folder: Path, file: str) -> tuple[list[Path], dict[str, str]]:
    """Return the files to open, in order, and what an index promises: file names by tensor."""
    path = _inside(folder, file, "config.json")
    index = folder / SAFETENSORS_INDEX
    if file.endswith(_INDEX_SUFFIX):
        return _indexed_files(path)
    if path.is_file():
        if file == SAFETENSORS_FILE and index.is_file():
            log.warning("slimstate: note: %s is not read: %s comes first", index, path.name)
        return [path], {}
    if file == SAFETENSORS_FILE and index.is_file():
        return _indexed_files(index)
    if any(folder.glob("pytorch_model*.bin*")):
        raise UserError(
            f"{folder} holds weights as pickles (pytorch_model.bin), which can run code: "
            "save it as safetensors first"
        )
    others = sorted(other.name for other in folder.glob("*.safetensors*"))
    found = (
        f", only {', '.join(others[:3])}, which transformers does not look for" if others else ""
    )
    raise UserError(f"{folder} has no {file}{found}: it is not a whole Hugging Face model folder")


def _indexed_files(index: Path) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{index} is not a safetensors index: copy the model again")
    paths = [_inside(index.parent, file, index.name) for file in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{index} names {path.name}, which is missing: copy the model again")
    if not paths:
        raise UserError(f"{index} names no file: copy the model again")
    return paths, weight_map


def _inside(folder: Path, file: str, origin: str) -> Path:
    """Return the path of `file` in `folder`; raise `UserError` if its name leads elsewhere."""
    parts = PurePosixPath(file)
    leads_away = parts.is_absolute() or ".." in parts.parts
    if leads_away or not file.endswith((".safetensors", _INDEX_SUFFIX)):
        raise UserError(f"{origin} of {folder} names {file!r}, no safetensors file in this folder")
    return folder / parts
