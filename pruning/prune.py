"""Stage `prune`: calibrate, plan and apply in one; the plan stays in the output.

`slimstate prune MODEL OUT --method drrqr --ratio 0.5 --space key [--to hf|dcp] [--nproc N]`, or
`torchrun … -m pruning.prune` with the same arguments. A method that needs no statistics reads no
data, and takes a model without a tokenizer.
"""

from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from flame.errors import UserError, run_command

if TYPE_CHECKING:
    from flame.checkpoint.reference import ModelReference
    from pruning.methods import Method
    from pruning.options import DataOptions
    from pruning.planning.choose import Budget
    from pruning.planning.plan import Plan
    from pruning.transform.transform import Form


@dataclass(frozen=True)
class Options:
    model: str
    out: Path
    """The folder to write."""
    method: "Method"
    budget: "Budget"
    data: "DataOptions"
    stats: Path | None = None
    """Saved statistics to use instead of calibrating."""
    to: "Form | None" = None
    """Format to write; None for the model's."""
    overwrite: bool = False


def parse(argv: list[str] | None = None) -> Options:
    """Options from a command line; UserError for what is none."""
    from pruning import options as shared

    parser = shared.Parser("prune", "Calibrate, plan and apply in one.")
    parser.add_argument("model", metavar="MODEL", help=shared.MODEL_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    add = parser.add_argument
    add("--to", choices=("hf", "dcp"), help="format to write (default: the model's)")
    add("--stats", type=Path, help="use the statistics of slimstate calibrate")
    add("--overwrite", action="store_true", help="replace an existing output")
    shared.add_method_options(parser)
    shared.add_budget_options(parser)
    shared.add_data_options(parser)
    shared.add_seed_option(parser)
    values = parser.parse_args(argv)
    return Options(
        model=values.model,
        out=values.out,
        method=shared.method(values),
        budget=shared.budget(values),
        data=shared.data_options(values),
        stats=values.stats,
        to=values.to,
        overwrite=values.overwrite,
    )


def check(options: Options, world_size: int = 1) -> None:
    """Refuse what cannot work before anything starts."""
    from flame.checkpoint.reference import check_destination, resolve, vocabulary_size
    from pruning.calibration.data import calibration_data, check_data
    from pruning.plan import check_stats
    from pruning.planning.choose import check_budget

    reference = resolve(options.model)
    check_destination(reference, options.out, options.overwrite)
    check_budget(options.budget, reference.config, options.method)
    if options.stats is not None or not options.method.needs:
        check_stats(options.stats, options.method)
    if options.stats is not None:
        _check_no_data(options)
    elif options.method.needs:
        data = calibration_data(reference, options.data)
        check_data(data, vocabulary_size(reference.config), world_size)


def _check_no_data(options: Options) -> None:
    """Refuse options about calibration data beside saved statistics, which have their own."""
    from pruning.options import DataOptions

    for field in fields(DataOptions):
        if field.name == "seed" or getattr(options.data, field.name) == field.default:
            continue
        raise UserError(
            f"--{field.name.replace('_', '-')} is for a calibration, which --stats "
            f"{options.stats} stands in for: leave one out"
        )


def run(options: Options) -> None:
    """Prune as the options say. Collective; inside a process group, or starting one."""
    from flame.checkpoint.reference import resolve
    from flame.process.atomic_output import replacing_folder
    from flame.process.distributed import RANK_ZERO_WORKS, process_group, rank
    from flame.process.peers import on_first
    from pruning.apply import form_of, say_what_to_know
    from pruning.plan import summary
    from pruning.transform.transform import write_pruned

    reference, out = resolve(options.model), options.out.absolute()
    form = form_of(options.to, reference)
    with process_group(RANK_ZERO_WORKS), ExitStack() as stack:
        output = replacing_folder(out, options.overwrite)
        folder = on_first(lambda: stack.enter_context(output))
        plan = make_plan(options, reference)
        on_first(lambda: write_pruned(plan, reference, folder, form, out))
        on_first(stack.close)
        if rank() == 0:
            print(f"{options.out}: {summary(plan)}", flush=True)
            say_what_to_know(plan, reference, form)


def make_plan(options: Options, reference: "ModelReference") -> "Plan":
    """The plan that the options ask for, on rank 0; calibrates if the method needs it. Collective.

    On other ranks the result has no meaning.
    """
    from flame.process.peers import on_first
    from pruning.calibrate import calibrate
    from pruning.calibration.data import calibration_data
    from pruning.plan import planned
    from pruning.planning.choose import choose

    method, budget = options.method, options.budget
    if options.stats is not None or not method.needs:
        return on_first(lambda: planned(reference, method, budget, options.stats))
    data = calibration_data(reference, options.data)
    collected, meta = calibrate(reference, method.needs, data)

    def chosen() -> "Plan":
        source = reference.source()
        return choose(reference.config, source, method, budget, collected, meta.for_plan())

    return on_first(chosen)


def main(argv: list[str] | None = None) -> None:
    """Parse, check and run; a `UserError` ends in one line and exit status 1."""
    run_command(parse, check, run, argv)


if __name__ == "__main__":
    main()
