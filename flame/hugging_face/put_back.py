"""Writing a text model as transformers does, or back into the model that it is part of."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.checkpoint.source import Read, TensorInfo
from flame.errors import UserError, some
from flame.hugging_face.model_folder import Recorded, check_ties, with_dtype, write_files, write_hf
from flame.hugging_face.outer_model import OuterModel
from flame.hugging_face.regrouped_source import (
    Group,
    HasTensors,
    PromisedTensors,
    RegroupedSource,
)
from flame.hugging_face.safetensors_source import SafetensorsSource, weights_name
from flame.hugging_face.stock_form import StockForm, complain, stock_form

if TYPE_CHECKING:
    from flame.checkpoint.reference import ModelReference


def outer_of(reference: "ModelReference") -> OuterModel | None:
    """Return what a model lies in that is written along with it: a vision tower, an MTP head."""
    if reference.outer is not None or reference.kind == "dcp" or reference.is_lora:
        return reference.outer
    stored = SafetensorsSource(reference.folder, weights_name(reference.config))
    around = OuterModel(reference.folder, reference.config)
    return around if around.has_mtp(stored.names()) else None


def check_around(reference: "ModelReference", form: str) -> None:
    """Raise UserError if what lies around a model lacks tensors that its config promises.

    Args:
        reference: the model.
        form: what is written of it; a run folder (`dcp`) takes the text model alone.
    """
    if form == "hf" and reference.outer is not None:
        _check_mtp(reference.outer)


def _check_mtp(outer: OuterModel) -> SafetensorsSource:
    stored = SafetensorsSource(outer.folder, weights_name(outer.config))
    outer.check_mtp(stored.names())
    return stored


def write_stock_folder(
    folder: Path,
    outer: OuterModel | None,
    config: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    read: Read,
) -> None:
    """Write a model as transformers saves it, or within `outer`, whose text model it becomes.

    Arguments and errors are those of `write_hf` and `write_around`.
    """
    if outer is None:
        write_hf(folder, config, infos, read)
    else:
        write_around(folder, outer, config, infos, read)


def write_around(
    folder: Path,
    outer: OuterModel,
    config: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    read: Read,
) -> None:
    """Write `outer` with another text model into an existing folder, under the names it has.

    Tensors that are no part of the text model come out as they are, bit for bit; what was written
    is read back and compared.

    Args:
        folder: the folder.
        outer: where the other tensors, and the names of all, come from.
        config: the text model's `config.json`.
        infos: shape and dtype of every tensor of the text model, under the stock class's names.
        read: returns one by its name.

    Raises:
        UserError: the tensors do not fit the config, are others than those of the text model in
            `outer`, that lacks an MTP head of its config, or the disk gives back something else
            than what was written.
    """
    form = stock_form(config)
    form.check(infos)
    check_ties(form, infos, read)
    stored = _check_mtp(outer)
    text = PromisedTensors(dict(infos), read)
    disk = _Places({name: (stored, name) for name in stored.names()})
    disk.places |= _text_places(form, stored, text)
    record = Recorded(disk.read)
    around = with_dtype(outer.config_around(config), [p.promise() for p in infos.values()])
    write_files(folder, around, disk, record)
    record.check(SafetensorsSource(folder), {})


class _Places:
    """Tensors that lie in several sources, by the name they get."""

    def __init__(self, places: dict[str, tuple[HasTensors, str]]) -> None:
        self.places = places

    def names(self) -> list[str]:
        return sorted(self.places)

    def info(self, name: str) -> TensorInfo:
        source, own = self.places[name]
        return source.info(own)

    def read(self, name: str) -> Any:
        source, own = self.places[name]
        return source.read(own)


def _text_places(
    form: StockForm, stored: SafetensorsSource, text: PromisedTensors
) -> dict[str, tuple[HasTensors, str]]:
    """Where the text model's tensors go among the stored names; each of them goes somewhere."""
    groups = [group for group in form.on_load(stored.names()) if group.name in form.shapes]
    renamed = [group for group in groups if group.convert is None]
    places: dict[str, tuple[HasTensors, str]] = {
        group.sources[0]: (text, _present(group.name, form, text)) for group in renamed
    }
    done = {name for _, name in places.values()}
    rest = sorted(text.infos.keys() - done - {t for t, o in form.ties.items() if o in done})
    apart = RegroupedSource(text, form.on_save(rest))
    prefixes = _prefixes(renamed)
    converted = {name for group in groups if group.convert for name in group.sources}
    for name in apart.names():
        place = next((p + name.removeprefix(q) for p, q in prefixes if name.startswith(q)), name)
        if place not in converted:
            complain([place], [])
        places[place] = (apart, name)
    lost = sorted(converted - places.keys())
    if lost:
        raise UserError(f"nothing takes the place of {some(lost, 3)} in the model around the text")
    return places


def _present(name: str, form: StockForm, text: PromisedTensors) -> str:
    """The name of a tensor, or of the one that it is tied to, whichever the text model gives."""
    twins = {**form.ties, **{own: twin for twin, own in form.ties.items()}}
    return name if name in text.infos else twins.get(name, name)


def _prefixes(renamed: list[Group]) -> list[tuple[str, str]]:
    """Beginnings of names on the disk, and those that the stock class has in their place."""
    found: dict[tuple[str, str], None] = {}
    for group in renamed:
        disk, stock = group.sources[0].split("."), group.name.split(".")
        while disk and stock and disk[-1] == stock[-1]:
            disk.pop(), stock.pop()
        found["".join(f"{part}." for part in disk), "".join(f"{part}." for part in stock)] = None
    return sorted(found, key=lambda pair: -len(pair[1]))
