"""The tensors of a Hugging Face folder, as a source."""

from pathlib import Path

from torch import Tensor

from flame.checkpoint.source import TensorInfo, row_bounds
from flame.errors import UserError
from flame.storage.json_file import read_object
from flame.storage.safetensors_file import DTYPES, SafetensorsFile, open_safetensors

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_FILE = "model.safetensors"


class SafetensorsSource:
    """The tensors of a Hugging Face folder: of `model.safetensors`, or of several with an index.

    Args:
        folder: the folder.
        file: the name of a single file, such as `adapter_model.safetensors`.

    Raises:
        UserError: the folder has no safetensors, or its index is wrong.
    """

    def __init__(self, folder: Path, file: str = SAFETENSORS_FILE) -> None:
        self._files = _weight_files(Path(folder), file)
        self._folder = Path(folder)
        self._open: dict[Path, SafetensorsFile] = {}

    def names(self) -> list[str]:
        return sorted(self._files)

    def info(self, name: str) -> TensorInfo:
        entry = self._file(name).entries[name]
        if entry.code not in DTYPES:
            raise UserError(
                f"{name} in {self._files[name]} is of dtype {entry.code}: not supported"
            )
        return TensorInfo(entry.shape, DTYPES[entry.code])

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        start, stop = row_bounds(name, self.info(name), rows)
        return self._file(name).read(name, start, stop)

    def _file(self, name: str) -> SafetensorsFile:
        """Return the file that holds a tensor, opened once."""
        if name not in self._files:
            raise UserError(f"{self._folder} has no tensor {name}")
        path = self._files[name]
        if path not in self._open:
            self._open[path] = SafetensorsFile(path)
        if name not in self._open[path].entries:
            raise UserError(f"{path} lacks {name}, which its index promises")
        return self._open[path]


def _weight_files(folder: Path, file: str) -> dict[str, Path]:
    """Return the file that holds each tensor, by the tensor's name."""
    index, single = folder / SAFETENSORS_INDEX, folder / file
    if index.is_file() and file == SAFETENSORS_FILE:
        return _indexed_files(index)
    if single.is_file():
        return dict.fromkeys(open_safetensors(single).keys(), single)
    if any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder} holds weights as pickles (pytorch_model.bin), which can run code: "
            "save it as safetensors first"
        )
    raise UserError(f"{folder} has no {file}: it is not a Hugging Face model folder")


def _indexed_files(index: Path) -> dict[str, Path]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{index} is not a safetensors index: copy the model again")
    files = {name: index.parent / Path(file).name for name, file in weight_map.items()}
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise UserError(f"{index} names {path.name}, which is missing: copy the model again")
    return files
