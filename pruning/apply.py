"""Stage `apply`: apply a plan to a checkpoint.

`slimstate apply MODEL PLAN OUT [--to hf|dcp]`, or `python -m pruning.apply` with the same
arguments. One process does the work.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flame.errors import UserError, run_command

if TYPE_CHECKING:
    from flame.checkpoint.reference import ModelReference
    from pruning.planning.plan import Plan
    from pruning.transform.transform import Form

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    model: str
    plan: Path
    out: Path
    """The folder to write."""
    to: "Form | None" = None
    """Format to write; None for the model's."""
    pad: bool = False
    """Write a stock model, filled up with zeros where heads differ."""
    overwrite: bool = False


def parse(argv: list[str] | None = None) -> Options:
    """Options from a command line; UserError for what is none."""
    from pruning.options import MODEL_HELP, Parser, add_pad_option

    parser = Parser("apply", "Apply a plan to a checkpoint.")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("plan", metavar="PLAN", type=Path, help="file that slimstate plan wrote")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    add = parser.add_argument
    add("--to", choices=("hf", "dcp"), help="format to write (default: the model's)")
    add_pad_option(parser)
    add("--overwrite", action="store_true", help="replace an existing output")
    return Options(**vars(parser.parse_args(argv)))


def check(options: Options, world_size: int = 1) -> None:
    """Refuse what cannot work before anything starts."""
    from flame.checkpoint.reference import check_destination, resolve
    from pruning.adapters import adapter_for
    from pruning.planning.plan import check_plan
    from pruning.planning.plan_file import read_plan

    reference = resolve(options.model)
    check_destination(reference, options.out, options.overwrite)
    adapter_for(reference.config)
    plan = read_plan(options.plan)
    check_plan(plan, reference.config, f"plan {options.plan}")
    _asked(plan, options)


def run(options: Options) -> None:
    """Write the pruned model. Collective; rank 0 works and the others wait."""
    from flame.checkpoint.reference import resolve
    from flame.process.distributed import RANK_ZERO_WORKS, process_group
    from flame.process.peers import on_first

    with process_group(RANK_ZERO_WORKS):
        reference = resolve(options.model)
        on_first(lambda: _apply(options, reference))


def _apply(options: Options, reference: "ModelReference") -> None:
    from flame.process.atomic_output import replacing_folder
    from pruning.plan import summary
    from pruning.planning.plan_file import read_plan
    from pruning.transform.transform import check_model, write_pruned

    plan, form = _asked(read_plan(options.plan), options), form_of(options.to, reference)
    check_model(plan, reference, f"plan {options.plan}")
    out = options.out.absolute()
    with replacing_folder(out, options.overwrite) as folder:
        write_pruned(plan, reference, folder, form, out, options.plan.absolute().parent)
    print(f"{options.out}: {summary(plan)}", flush=True)
    say_what_to_know(plan, reference, form)


def _asked(plan: "Plan", options: Options) -> "Plan":
    """The plan, padded if that was asked for; UserError if it cannot be."""
    from pruning.planning.plan import with_padding

    if not options.pad or plan.pad:
        return plan
    if plan.replaced is not None:
        raise UserError(
            f"plan {options.plan} mixes channels, which --pad cannot fill up with zeros: leave it "
            "out"
        )
    found = with_padding(plan)
    if found.config_after == plan.config_after and "allocate" not in plan.budget:
        raise UserError(
            f"plan {options.plan} keeps as many channels in all heads, so --pad has nothing to "
            "fill up: leave it out"
        )
    return found


def form_of(asked: "Form | None", reference: "ModelReference") -> "Form":
    """The format to write: the one asked for, or the model's own."""
    return reference.kind if asked is None else asked


def say_what_to_know(plan: "Plan", reference: "ModelReference", form: "Form") -> None:
    """Warn of what a user may not expect of the output."""
    from pruning.plan import say_notes
    from pruning.planning.budgets import kernel_warning

    if reference.is_lora and form == "dcp":
        log.warning(
            "slimstate: note: %s holds adapters, so the output is the merged model at step 0, "
            "without optimizer state",
            reference.folder,
        )
    for width in sorted(_key_widths(plan)):
        warning = kernel_warning(width)
        if warning is not None:
            log.warning("slimstate: warning: %s", warning)
    say_notes(plan)


def _key_widths(plan: "Plan") -> set[int]:
    """The key widths of the output that the plan changes."""
    from pruning.planning.padding import padded
    from pruning.planning.plan import planned_spaces
    from pruning.spaces import widths_of

    spaces = planned_spaces(plan, plan.config_before)
    kept = padded(spaces, plan.kept) if plan.pad else plan.kept
    widths = widths_of(spaces, kept)
    return {w for space in spaces if space.kind == "key" for w in widths[space.name]}


def main(argv: list[str] | None = None) -> None:
    """Parse, check and run; a `UserError` ends in one line and exit status 1."""
    run_command(parse, check, run, argv)


if __name__ == "__main__":
    main()
