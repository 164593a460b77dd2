"""Statistics on a disk, of which memory holds those of one space at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flame.storage.safetensors_file import SafetensorsFile
from pruning.statistics import Statistic


@dataclass(frozen=True)
class SavedStatistics(Mapping[str, dict[type[Statistic], Statistic]]):
    """The statistics of a folder: by space, those by their type, read when asked for."""

    file: SafetensorsFile
    promised: Mapping[str, Mapping[type[Statistic], Statistic]]
    """The same on the meta device."""

    def __getitem__(self, space: str) -> dict[type[Statistic], Statistic]:
        return {kind: self._read(f"{space}/{kind.__name__}", kind, promise)
                for kind, promise in self.promised[space].items()}  # fmt: skip

    def __iter__(self) -> Iterator[str]:
        return iter(self.promised)

    def __len__(self) -> int:
        return len(self.promised)

    def _read(self, key: str, kind: type[Statistic], promise: Statistic) -> Statistic:
        return kind(**{n: self.file.get_tensor(f"{key}/{n}") for n in promise.state_dict()})
