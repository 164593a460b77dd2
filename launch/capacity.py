"""Stage `capacity`: work out from config.json how many requests a GPU holds.

No weights are read: the model is built without memory, and its sizes are counted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.errors import UserError
from flame.options import argument, option
from flame.options.shared import StoredAs
from flame.process.atomic_output import replacing_file
from flame.process.output_checks import check_file_output
from flame.stage import Stage
from launch.reporting.envelope import command_line, enveloped, write_result
from launch.reporting.sentences import bytes_text
from launch.serving.capacity import BYTES, Capacity, Server, contexts
from launch.serving.tables import capacity_table

if TYPE_CHECKING:
    from launch.serving.footprint import Footprint

GIB = 2**30

PLOTTED = 131_072
"""Longest context of the plot, unless a longer one is asked for."""


@dataclass(frozen=True)
class Options:
    model: str = argument("MODEL", "config.json, folder that holds one, run, or hub name")
    against: str = option("", "the model to compare with", metavar="MODEL")
    gpu_memory: float = option(80.0, "memory of the GPU, in GiB", above=0.0, below=1e6, metavar="N")
    utilisation: float = option(
        0.9, "share of it for weights and caches", above=0.0, below=1.0, metavar="SHARE"
    )
    context: int = option(4096, "tokens of a request", least=1, metavar="N")
    slots: int = option(
        5, "recurrent states set aside for a request (SGLang's default is 5)", least=1, metavar="N"
    )
    weight_dtype: StoredAs = option("bfloat16", "how the engine keeps weights")
    state_dtype: StoredAs = option("float32", "how it keeps recurrent states")
    kv_dtype: StoredAs = option("bfloat16", "how it keeps keys and values of softmax layers")
    batch_sizes: tuple[int, ...] = option(
        (1, 8, 32, 128), "sequences that decode together", least=1, metavar="N,N"
    )
    plot: Path | None = option(None, "draw requests over context into FILE.svg", metavar="FILE")
    json: Path | None = option(None, "write the figures to FILE", metavar="FILE")
    overwrite: bool = option(False, "replace files that exist")

    @property
    def server(self) -> Server:
        """The server that the options describe."""
        memory = self.gpu_memory * GIB * self.utilisation
        return Server(memory, self.slots, self.weight_dtype, self.state_dtype, self.kv_dtype)

    @property
    def references(self) -> tuple[str, ...]:
        """The model and, if given, the one to compare with."""
        return (self.model, *filter(None, [self.against]))


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if a config is missing, an output is unfit, or for several processes."""
    from launch.serving.configs import config_of

    if world_size != 1:
        raise UserError(f"--nproc {world_size}: capacity only counts, run it on 1 process")
    if options.against and options.against == options.model:
        raise UserError(f"--against {options.against} is the model itself")
    for reference in options.references:
        config_of(reference)
    if options.plot is not None and options.plot.suffix != ".svg":
        raise UserError(f"--plot {options.plot}: the name must end in .svg")
    for output in filter(None, (options.plot, options.json)):
        check_file_output(output, options.overwrite)


def run(options: Options) -> None:
    """Print a table of the models' figures; write the plot and JSON that are asked for."""
    from launch.serving.configs import config_of
    from launch.serving.footprint import footprint

    models = {reference: footprint(config_of(reference)) for reference in options.references}
    found = {name: Capacity(model, options.server) for name, model in models.items()}
    rows = list(_rows(found, options))
    notes = list(_notes(models, options))
    print(capacity_table(rows, options.references).text())
    print("\n".join(["", *notes]))
    if options.plot is not None:
        with replacing_file(options.plot, options.overwrite) as temporary:
            temporary.write_text(_plot(found, options))
    if options.json is not None:
        content = {"models": list(models), "measures": rows, "notes": notes}
        result = enveloped("capacity", command_line("capacity", options), content)
        write_result(options.json, result, options.overwrite)


def _rows(found: Mapping[str, Capacity], options: Options) -> Iterator[dict[str, Any]]:
    """Yield a row for each figure: its name, label and unit, and the models' values by name."""
    context = options.context

    def row(name: str, label: str, unit: str, value: Any, **sizes: int) -> dict[str, Any]:
        values = {reference: value(each) for reference, each in found.items()}
        return {"name": name, "label": label, "unit": unit, **sizes, "values": values}

    tokens = f"{context:,} tokens"
    yield row("parameters", "parameters", "", lambda each: each.model.parameters)
    yield row("weight_bytes", "weights", "bytes", lambda each: each.weights)
    yield row("state_bytes", "recurrent states a sequence", "bytes", lambda each: each.state)
    yield row("conv_bytes", "convolution windows a sequence", "bytes", lambda each: each.conv)
    yield row("kv_bytes", "keys and values a token", "bytes", lambda each: each.kv(1))
    label = f"a request of {tokens}, {options.slots} states"
    yield row("request_bytes", label, "bytes", lambda each: each.request(context), context=context)
    label = f"requests of {tokens} on one GPU"
    yield row("requests", label, "", lambda each: each.requests(context), context=context)
    for size in options.batch_sizes:
        yield row(
            "traffic_bytes",
            f"moved for a decoded token, batch {size}",
            "bytes",
            lambda each, size=size: each.traffic(size, context),
            batch_size=size,
            context=context,
        )


def _notes(models: "Mapping[str, Footprint]", options: Options) -> Iterator[str]:
    yield (
        f"{options.gpu_memory:g} GiB, of which {options.utilisation:.0%} hold weights "
        f"({options.weight_dtype}), states ({options.state_dtype}), convolution windows (bfloat16) "
        f"and keys and values ({options.kv_dtype}). Activations and an engine's rounding to blocks "
        "are left out, as is a head for several tokens (MTP)."
    )
    for name, model in models.items():
        weights = model.parameters * BYTES[options.weight_dtype]
        if weights > options.server.memory:
            yield f"{name}: the weights alone ({bytes_text(weights)}) do not fit."
        if model.indexed:
            yield f"{name}: keys of its sparse attention's indexer are not counted."


def _plot(found: Mapping[str, Capacity], options: Options) -> str:
    from launch.drawing.figure import SERIES, svg_file
    from launch.drawing.lines import Line, line_chart

    title = f"Requests on {options.gpu_memory:g} GiB by context, {options.slots} states a request"
    lengths = contexts(max(PLOTTED, options.context))
    lines = []
    for role, (name, each) in zip(SERIES, found.items(), strict=False):
        points = [(length, each.requests(length)) for length in lengths]
        shown = [(length, count) for length, count in points if count > 0]
        lines.append(Line(role, Path(name).stem if name.endswith(".json") else Path(name).name,
                          [x for x, _ in shown], [y for _, y in shown]))  # fmt: skip
    drawing = line_chart(lines, "context, tokens", "requests", title, log_y=True, log_x=True)
    if not drawing:
        raise UserError("--plot: the weights leave no room for requests, so nothing can be drawn")
    return svg_file(drawing, title)


STAGE = Stage(
    "capacity",
    "Work out from config.json how many requests a GPU holds and what a decoded token moves.",
    Options,
    run,
    check,
)

if __name__ == "__main__":
    STAGE.main()
