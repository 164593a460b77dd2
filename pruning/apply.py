"""Stage `apply`: apply a plan to a checkpoint. Rank 0 does the work."""

import logging
from dataclasses import dataclass
from pathlib import Path

from flame.checkpoint.foreign import GIVEN, GivenFiles
from flame.checkpoint.reference import Form, ModelReference, check_destination
from flame.errors import UserError
from flame.hugging_face.put_back import check_around
from flame.models.widths import kernel_warning
from flame.options import argument, group, option
from flame.process.atomic_output import replacing_folder
from flame.process.distributed import RANK_ZERO_WORKS, process_group
from flame.process.peers import on_first
from flame.stage import Stage
from pruning.adapters import adapter_for
from pruning.options import MODEL_HELP, OVERWRITE_HELP
from pruning.plan import say_notes, summary
from pruning.planning.budgets import PAD_HELP
from pruning.planning.padding import padded
from pruning.planning.plan import Plan, check_plan, planned_spaces, with_padding
from pruning.planning.plan_file import read_plan
from pruning.spaces import widths_of
from pruning.transform.write import check_model, write_pruned

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    model: str = argument("MODEL", MODEL_HELP)
    plan: Path = argument("PLAN", "file that slimstate plan wrote")
    out: Path = argument("OUT", "folder to write")
    to: Form | None = option(None, "format to write (default: the model's)")
    pad: bool = option(False, PAD_HELP)
    overwrite: bool = option(False, OVERWRITE_HELP)
    given: GivenFiles = group(GivenFiles, GIVEN)


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if the plan does not fit the model, or the output must not be written."""
    reference = options.given.resolve(options.model)
    check_destination(reference, options.out, options.overwrite)
    check_around(reference, form_of(options.to, reference))
    adapter_for(reference.config)
    plan = read_plan(options.plan)
    check_plan(plan, reference.config, f"plan {options.plan}")
    _asked(plan, options)


def run(options: Options) -> None:
    """Write the pruned model. Collective; rank 0 works and the others wait."""
    with process_group(RANK_ZERO_WORKS):
        reference = options.given.resolve(options.model)
        on_first(lambda: _apply(options, reference))


def _apply(options: Options, reference: ModelReference) -> None:
    plan, form = _asked(read_plan(options.plan), options), form_of(options.to, reference)
    check_model(plan, reference, f"plan {options.plan}")
    out = options.out.absolute()
    with replacing_folder(out, options.overwrite) as folder:
        write_pruned(plan, reference, folder, form, out, options.plan.absolute().parent)
    print(f"{options.out}: {summary(plan)}", flush=True)
    say_what_to_know(plan, reference, form)


def _asked(plan: Plan, options: Options) -> Plan:
    """Return the plan, padded if the options ask for it; raise UserError if it cannot be."""
    if not options.pad or plan.pad:
        return plan
    if plan.tensors_file is not None:
        raise UserError(
            f"plan {options.plan} has tensors of its own, which --pad cannot fill up with zeros: "
            "leave it out, or plan with --pad"
        )
    found = with_padding(plan)
    if found.config_after == plan.config_after and "allocate" not in plan.budget:
        raise UserError(
            f"plan {options.plan} keeps as many channels in all heads, so --pad has nothing to "
            "fill up: leave it out"
        )
    return found


def form_of(asked: Form | None, reference: ModelReference) -> Form:
    """Return the format to write: the one asked for or, for None, the model's own."""
    return reference.kind if asked is None else asked


def say_what_to_know(plan: Plan, reference: ModelReference, form: Form) -> None:
    """Warn of an output without optimizer state or fla kernels, and print the plan's notes."""
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
    say_notes(plan, reference.outer if form == "hf" else None)


def _key_widths(plan: Plan) -> set[int]:
    """Return the widths that pruned spaces of key channels have in the output."""
    spaces = planned_spaces(plan, plan.config_before)
    kept = padded(spaces, plan.kept) if plan.pad else plan.kept
    widths = widths_of(spaces, kept)
    return {w for space in spaces if space.kind == "key" for w in widths[space.name]}


STAGE = Stage("apply", "Apply a plan to a checkpoint.", Options, run, check)

if __name__ == "__main__":
    STAGE.main()
