"""Statistics on disk: a folder with the sums and with a record of what was summed.

`statistics.safetensors` holds the sums, `meta.json` the model's fingerprint, the data with a cursor
into it, and the number of tokens. A folder whose calibration was cut short says so, and the cursor
lets it go on, at another world size too. Where the calibration needs gradients, such a folder also
has a file for each tensor with the gradient so far; a complete one has only the sums made of them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flame.errors import UserError, first_line
from flame.process.atomic_output import replacing_folder
from flame.storage.checksums import hash_file
from flame.storage.json_file import read_object
from flame.storage.safetensors_file import SafetensorsFile, save_tensors
from flame.storage.shape import check_shape
from pruning.calibration.saved_statistics import SavedStatistics
from pruning.spaces import Space
from pruning.statistics import Statistic

FORMAT = 2
SUMS_FILE = "statistics.safetensors"
META_FILE = "meta.json"

AddGradient = Callable[[str, Tensor], None]

Collected = dict[str, dict[type[Statistic], Statistic]]
"""Statistics by the space's name and their type."""


@dataclass(frozen=True)
class Meta:
    """The record of a statistics folder: model, data, and how far the calibration got."""

    fingerprint: str
    """Of the model."""
    data: dict[str, Any]
    """The data's configuration, without its seed."""
    seq_len: int
    seed: int
    """Of the order of the documents."""
    wanted: int
    """Sequences asked for."""
    sequences: int
    """Sequences seen; fewer than wanted if the calibration was cut short."""
    tokens: int
    """Tokens seen."""
    hidden_size: int
    """Numbers of a token that enter a mixer."""
    statistics: list[str]
    """Names of the statistics, sorted."""
    cursor: dict[str, Any]
    """State of the data loader after the sequences seen."""
    plan: str = ""
    """What tells apart the plan whose pruned layers were run; empty for the model alone."""

    @property
    def is_complete(self) -> bool:
        return self.sequences == self.wanted

    def for_plan(self) -> dict[str, Any]:
        """What a plan records of the calibration."""
        return {
            "data": self.data,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "sequences": self.sequences,
            "tokens": self.tokens,
        }


def zeros(
    spaces: Iterable[Space],
    kinds: Iterable[type[Statistic]],
    hidden_size: int,
    device: torch.device | str = "cpu",
) -> Collected:
    """Statistics of these kinds for each space that they are summed for, before any token."""
    kinds = list(kinds)
    return {
        space.name: {
            kind: kind.zeros(space, hidden_size, device)
            for kind in kinds
            if space.kind in kind.kinds
        }
        for space in spaces
    }


def save_statistics(
    path: Path, collected: Collected, meta: Meta, overwrite: bool = False, locked: bool = False
) -> None:
    """Write a statistics folder, whole or not at all. One process does it alone.

    Args:
        locked: this process holds the folder's `writer_lock`.
    """
    with writing_statistics(path, collected, meta, overwrite, locked):
        pass


@contextmanager
def writing_statistics(
    path: Path, collected: Collected, meta: Meta, overwrite: bool = False, locked: bool = False
) -> Iterator[AddGradient]:
    """Write a statistics folder to which the body of the context adds gradients one by one."""
    with replacing_folder(path, overwrite, locked) as folder:
        files: dict[str, list[str]] = {}

        def add(name: str, gradient: Tensor) -> None:
            file = f"gradient-{len(files):05d}.safetensors"
            save_tensors({name: gradient}, folder / file)
            files[name] = [file, hash_file(folder / file)]

        yield add
        save_tensors(_tensors(collected), folder / SUMS_FILE)
        content = {"format": FORMAT, "hash": hash_file(folder / SUMS_FILE), **asdict(meta)}
        text = json.dumps({**content, "gradients": files}, indent=1, sort_keys=True)
        (folder / META_FILE).write_text(text + "\n")


def gradient_reader(path: Path) -> Callable[[str, slice], Tensor]:
    """A function that reads rows of the gradients saved by an unfinished calibration.

    Raises:
        UserError: from the reader, if a file is damaged or missing.
    """
    files = _read_meta_file(path).get("gradients", {})

    def read(name: str, rows: slice) -> Tensor:
        if name not in files:
            raise UserError(f"{path} has no gradient of {name}: calibrate again")
        file, recorded = files[name]
        _check_hash(path / file, recorded)
        return SafetensorsFile(path / file).read(name, rows.start, rows.stop)

    return read


def read_meta(path: Path) -> Meta:
    """The record of the statistics folder `path`; UserError if it has none that can be read."""
    found = (content := _read_meta_file(path)).get("format")
    if type(found) is not int or found > FORMAT:
        raise UserError(
            f"{path} has statistics of format {found}, this slimstate reads up to {FORMAT}: "
            "calibrate again, or install a newer slimstate"
        )
    try:
        check_shape(content, Meta)
    except ValueError as error:
        raise UserError(f"{Path(path) / META_FILE}: {error}; calibrate again") from error
    return Meta(**{f.name: content[f.name] for f in fields(Meta) if f.name in content})


def load_statistics(
    path: Path,
    spaces: Iterable[Space],
    kinds: Iterable[type[Statistic]],
) -> SavedStatistics:
    """The statistics of these kinds that a folder holds for `spaces`, on the CPU.

    Raises:
        UserError: the folder is damaged, or lacks a statistic or a space.
    """
    path, kinds = Path(path), list(kinds)
    promised = zeros(spaces, kinds, read_meta(path).hidden_size, "meta")
    file = _open_sums(path)
    for key, statistic in _named(promised).items():
        if not {f"{key}/{field}" for field in statistic.state_dict()} <= file.entries.keys():
            raise UserError(f"{path} has no {key}: calibrate again for this model and method")
        try:
            own = {name: file.promise(f"{key}/{name}") for name in statistic.state_dict()}
            statistic.load_state_dict(own)
        except ValueError as error:
            raise UserError(f"{path}: {key}: {first_line(error)}") from error
    return SavedStatistics(file, promised)


def check_kinds(path: Path, meta: Meta, kinds: Iterable[type[Statistic]], method: str) -> None:
    """Raise UserError unless a statistics folder is complete and has what `method` needs."""
    if not meta.is_complete:
        raise UserError(
            f"{path} holds {meta.sequences} of {meta.wanted} sequences: finish it with "
            "slimstate calibrate … --resume"
        )
    lacking = sorted({kind.__name__ for kind in kinds} - set(meta.statistics))
    if lacking:
        has = ", ".join(meta.statistics)
        raise UserError(f"{method} needs {lacking[0]}, {path} has {has}: calibrate again")


def check_model(path: Path, meta: Meta, fingerprint: str) -> None:
    """Raise UserError unless the statistics are of the model of this fingerprint."""
    if meta.fingerprint != fingerprint:
        raise UserError(
            f"{path} has statistics of another model (fingerprint {meta.fingerprint[:12]}, this "
            f"model's is {fingerprint[:12]}): calibrate this one"
        )


def _named(collected: Mapping[str, Mapping[type[Statistic], Statistic]]) -> dict[str, Statistic]:
    return {
        f"{space}/{kind.__name__}": statistic
        for space, of_space in collected.items()
        for kind, statistic in of_space.items()
    }


def _tensors(collected: Collected) -> dict[str, Tensor]:
    return {
        f"{key}/{field}": total
        for key, statistic in _named(collected).items()
        for field, total in statistic.state_dict().items()
    }


def _open_sums(path: Path) -> SafetensorsFile:
    file = path / SUMS_FILE
    _check_hash(file, _read_meta_file(path).get("hash"))
    return SafetensorsFile(file)


def _check_hash(file: Path, recorded: object) -> None:
    try:
        found = hash_file(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error
    if found != recorded:
        raise UserError(f"{file} is damaged (its hash differs): calibrate again")


def _read_meta_file(folder: Path) -> dict[str, Any]:
    missing = f"no statistics at {folder}: make them with slimstate calibrate"
    return read_object(Path(folder) / META_FILE, missing)
