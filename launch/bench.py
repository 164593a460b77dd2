"""Stage `bench`: measure how large and how fast models are, beside another one.

It runs on one device: the GPU where there is one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.errors import UserError
from flame.options import argument, option
from flame.options.shared import DTYPE_HELP, DType
from flame.process.output_checks import check_file_output
from flame.stage import Stage
from launch.reporting.envelope import command_line, enveloped, measuring, write_result
from launch.speed.bench_table import bench_table, kernel_lines, ratio_of

if TYPE_CHECKING:
    import torch

    from launch.speed.workload import Measure, Models, Workload

PARTS = ("prefill", "decode", "mixer", "train")


@dataclass(frozen=True)
class Options:
    models: tuple[str, ...] = argument("MODEL", "run, step or Hugging Face folder, or hub name")
    against: str = option("", "the model to compare with", metavar="MODEL")
    json: Path | None = option(None, "write every run of every measure to FILE", metavar="FILE")
    measure: tuple[str, ...] = option(PARTS, "what to measure", choices=PARTS, metavar="A,B")
    lengths: tuple[int, ...] = option(
        (), "prompts to read (default: by device)", least=1, metavar="N,N"
    )
    batch_sizes: tuple[int, ...] = option(
        (), "of decoding (default: by device)", least=1, metavar="N,N"
    )
    decode_length: int | None = option(
        None, "tokens decoded for each sequence", least=1, metavar="N"
    )
    prompt_length: int | None = option(
        None, "tokens that decoding starts from", least=1, metavar="N"
    )
    train_batch: int | None = option(None, "sequences of a training step", least=1, metavar="N")
    train_length: int | None = option(None, "tokens of each of them", least=1, metavar="N")
    repeats: int = option(5, "times that each measure is taken", least=1, metavar="N")
    dtype: DType = option("auto", DTYPE_HELP)
    seed: int = option(0, "of the random tokens", least=0, metavar="N")
    overwrite: bool = option(False, "replace FILE if it exists")

    @property
    def references(self) -> tuple[str, ...]:
        """All models; the one to compare with is the last."""
        return (*self.models, *filter(None, [self.against]))


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if a model or the output cannot work, or for more than one process."""
    from flame.checkpoint.reference import resolve
    from flame.models.gpu_limits import check_backward, check_dtype

    if world_size != 1:
        raise UserError(f"--nproc {world_size}: bench measures one device, run it on 1 process")
    if not options.measure:
        raise UserError(f"--measure names nothing: choose from {', '.join(PARTS)}")
    for name in options.references:
        reference = resolve(name)
        folder = reference.folder
        check_dtype(reference.config, options.dtype)
        if "train" in options.measure:
            check_backward(reference.config)
        if options.json is not None:
            check_file_output(options.json, options.overwrite, inside=folder)


def run(options: Options) -> None:
    """Measure, print a table with a column for each model, and write JSON."""
    from flame.checkpoint.reference import resolve

    names = model_names(options.references)
    references = {name: resolve(reference) for name, reference in names.items()}
    against = list(names)[-1] if options.against else None
    with measuring(options.json, options.overwrite, alone=True):
        record = benchmark(references, against, options)
        print(
            bench_table(record).text(), "\n" + "\n".join(kernel_lines(record)), sep="\n", flush=True
        )
        if options.json is not None:
            result = enveloped("bench", command_line("bench", options), record)
            write_result(options.json, result, options.overwrite, locked=True)


def benchmark(
    references: Mapping[str, Any], against: str | None, options: Options
) -> dict[str, Any]:
    """Return all measures of the models, as the JSON file holds them.

    Args:
        references: `flame.checkpoint.reference.ModelReference` by the name in the table.
        against: the name of the model that ratios divide by; None for no ratios.
    """
    from flame.checkpoint.load import load_model
    from flame.process.distributed import compute_dtype, local_device
    from launch.speed.machine import machine

    dtype, device = compute_dtype(options.dtype), local_device()
    work = workload(options, device.type)

    def load(as_dtype: "torch.dtype") -> "Models":
        return {n: load_model(r, as_dtype, device) for n, r in references.items()}

    ran: dict[str, Any] = {}
    notes: list[str] = []
    measures = list(_measures(load, dtype, work, options.measure, ran, notes))
    return {
        "models": {n: _described(n, r, ran) for n, r in references.items()},
        "against": against,
        "measures": [_measured(measure, against) for measure in measures],
        "dtype": str(dtype).removeprefix("torch."),
        **machine(device),
        "repeats": work.repeats,
        "seed": work.seed,
        "notes": notes,
    }


def workload(options: Options, device_type: str) -> "Workload":
    """Return the sizes that the options give, and the device's usual ones for the rest."""
    from launch.speed.workload import ON_CPU, ON_CUDA

    sizes = "lengths batch_sizes decode_length prompt_length train_batch train_length".split()
    asked = {name: getattr(options, name) for name in sizes if getattr(options, name)}
    usual = ON_CUDA if device_type == "cuda" else ON_CPU
    return replace(usual, repeats=options.repeats, seed=options.seed, **asked)


def model_names(references: Sequence[str]) -> dict[str, str]:
    """Return the references by name: the shortest ends of their paths that differ."""
    paths = [Path(reference) for reference in references]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(paths):
            return dict(zip(names, references, strict=True))
    counts = [references[:place].count(name) for place, name in enumerate(references)]
    return {
        f"{name} (again{f' {count}' if count > 1 else ''})" if count else name: name
        for name, count in zip(references, counts, strict=True)
    }


def _measures(
    load: "Callable[[torch.dtype], Models]",
    dtype: "torch.dtype",
    work: "Workload",
    parts: tuple[str, ...],
    ran: dict[str, Any],
    notes: list[str],
) -> "Iterator[Measure]":
    """Yield the sizes of caches and the measures in `parts`.

    `ran` gets each model's kernels, `notes` a sentence for what could not be measured.
    """
    import torch

    from flame.process.progress import progress
    from launch.speed.caches import cache_sizes
    from launch.speed.inference import decode, kernels, prefill
    from launch.speed.mixer import mixer
    from launch.speed.training_step import training

    models = load(dtype)
    ran.update(kernels(models, work))
    yield from cache_sizes(models, work)
    chosen: dict[str, Callable[[Models, Workload], Iterator[Measure]]] = {
        "prefill": prefill,
        "decode": partial(decode, notes=notes),
        "mixer": mixer,
    }
    for name in progress([part for part in chosen if part in parts], "measure"):
        yield from chosen[name](models, work)
    if "train" in parts:
        trained = models if dtype == torch.float32 else load(torch.float32)
        del models
        yield from training(trained, work, dtype)


def _measured(measure: "Measure", against: str | None) -> dict[str, Any]:
    """Return a measure as the JSON file holds it, with its ratio to the model `against`."""
    values = {
        name: {
            "median": spread.median,
            "min": spread.least,
            "max": spread.most,
            "runs": list(spread.runs),
        }
        for name, spread in measure.values.items()
    }
    record = {
        "name": measure.name,
        "label": measure.label,
        "unit": measure.unit,
        "better": measure.better,
        **measure.sizes,
        "values": values,
    }
    return {**record, "ratio": ratio_of(record, against)}


def _described(name: str, reference: Any, ran: dict[str, Any]) -> dict[str, Any]:
    return {
        "reference": str(reference.weights),
        "model_type": reference.config["model_type"],
        "kernels": ran[name],
    }


STAGE = Stage(
    "bench",
    "Measure how large and how fast models are, beside another one.",
    Options,
    run,
    check,
)

if __name__ == "__main__":
    STAGE.main()
