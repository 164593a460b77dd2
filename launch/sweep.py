"""Stage `sweep`: prune a model by every method at every ratio, and measure all.

All processes calibrate together, once. Then each process takes one point at a time from a list. A
second call measures only what is missing.
"""

import os
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.process.atomic_output import writer_lock
from flame.process.distributed import from_rank_zero, process_group
from flame.process.peers import on_first
from flame.stage import Stage
from launch.evaluation.heldout_text import HeldoutText, heldout_text
from launch.reporting.envelope import command_line, enveloped
from launch.sweeping.checks import calibration, check, settings
from launch.sweeping.options import Options
from launch.sweeping.page import PAGE_FILE, write_files
from launch.sweeping.progress import telling
from launch.sweeping.tables import collect_rows, sweep_of, without_documents
from launch.sweeping.work import CONTINUED, DENSE, Work, alone, in_memory
from pruning import calibrate
from pruning.calibrate import kinds_of
from pruning.calibration.stats_file import META_FILE, read_meta

POLL_SECONDS = 0.2


def run(options: Options) -> None:
    """Measure all points and write the results. Collective for the calibration only.

    Raises:
        UserError: calibration failed, or points did (on rank 0, after the others are written).
    """
    import flame.register  # noqa: F401

    first, reference = int(os.environ.get("RANK", "0")) == 0, resolve(options.model)
    with writer_lock(options.out) if first else nullcontext():
        with process_group():
            on_first(lambda: options.folder.begin(settings(options, reference), options.overwrite))
            try:
                _calibrate(options)
            except UserError:
                on_first(options.folder.withdraw)
                raise
        text = heldout_text(reference, options.text)
        work = Work(
            folder=options.folder,
            model=options.model,
            text=in_memory(text),
            dtype=options.dtype,
            statistics=options.statistics,
            recovery=options.recovery,
            budget_words=options.budget_words,
            data=options.data,
            keep=options.keep,
        )
        announcer = _Announcer(options) if first else None
        with telling(options.folder, options.names) if first else nullcontext():
            with alone():
                _measure(options, work, announcer)
            if announcer is not None:
                announcer.wait()
        if first:
            _write(options, text)


def _calibrate(options: Options) -> None:
    """Write or complete the statistics that the sweep needs and does not have yet. Collective."""
    # Only rank 0 looks: if a few ranks raised, the others would hang in the broadcast.
    how = from_rank_zero(on_first(lambda: _how_to_calibrate(options)))
    if how is not None:
        calibrate.run(replace(calibration(options), **how))


def _how_to_calibrate(options: Options) -> dict[str, bool] | None:
    """Return the options to calibrate with in this folder; None if nothing is left to do."""
    if not options.needing or options.stats is not None:
        return None
    statistics = options.folder.statistics
    if not (statistics / META_FILE).is_file():
        return {}
    meta = read_meta(statistics)
    wanted = {kind.__name__ for kind in kinds_of(options.needing)}
    if meta.is_complete:
        return None if wanted <= set(meta.statistics) else {"overwrite": True}
    return {"resume": True} if wanted == set(meta.statistics) else {"overwrite": True}


def _measure(options: Options, work: Work, announcer: "_Announcer | None") -> None:
    points = {point.file_name: point for point in options.points}
    for name in options.folder.open_points(options.names):
        work.measure(name, points)
        if announcer is not None:
            announcer.news()


class _Announcer:
    """Prints a line for each point of a sweep once any process has measured it or failed.

    At the start, one line says how many points were measured before.
    """

    def __init__(self, options: Options) -> None:
        self.folder, self.names = options.folder, options.names
        self.said = {name for name in self.names if self.folder.record(name) is not None}
        if self.said:
            print(f"{len(self.said)} of {len(self.names)} points are measured", flush=True)

    def news(self) -> None:
        """Print a line for each point that was measured or has failed since the last call."""
        for name in self.names:
            if name not in self.said and self.folder.is_settled(name):
                self.said.add(name)
                print(f"[{len(self.said)}/{len(self.names)}] {self._line(name)}", flush=True)

    def wait(self) -> None:
        """Wait until all points are measured or have failed, and print their lines."""
        self.news()
        while len(self.said) < len(self.names):
            time.sleep(POLL_SECONDS)
            self.news()

    def _line(self, name: str) -> str:
        record = self.folder.record(name)
        if record is None:
            return f"{name} failed: {self.folder.failure(name)}"
        stages = [key for key in ("before", "recovered") if key in record]
        figures = " -> ".join(f"{record[stage]['perplexity']:,.2f}" for stage in stages)
        return f"{name}: perplexity {figures} ({sum(record['seconds'].values()):.0f} s)"


def _write(options: Options, text: HeldoutText) -> None:
    """Write and print the results; raise UserError if points failed."""
    results = enveloped("sweep", command_line("sweep", options), _results(options, text))
    write_files(options.out, results, options.json)
    for table in sweep_of(results).tables():
        print(f"\n{table.text()}")
    for note in dict.fromkeys(note for row in results["rows"] for note in row["notes"]):
        print(f"note: {note}")
    print(f"\n{options.out / PAGE_FILE} shows it; results.* beside it have it", flush=True)
    failed = [name for name in options.names if options.folder.failure(name) is not None]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(options.names)} points failed ({', '.join(failed)}): what "
            f"they said is in {options.out / 'logs'}; run again to repeat them"
        )


def _results(options: Options, text: HeldoutText) -> dict[str, Any]:
    """Return the results as `launch.sweeping.page` writes and reads them."""
    found = {name: options.folder.record(name) for name in options.names}
    records = {name: record for name, record in found.items() if record is not None}
    dense = records.get(DENSE, {}).get("before", {})
    continued = records.get(CONTINUED, {}).get("recovered", {})
    controls = {"before": dense, "recovered": continued}
    recovery = options.recovery
    return {
        "title": options.title or f"slimstate sweep: {options.model}",
        "model": options.model,
        "weights": str(resolve(options.model).weights),
        "ratios": list(options.ratios),
        "controls": {stage: control.get("perplexity") for stage, control in controls.items()},
        "rows": collect_rows(options.points, records, controls),
        "points": {name: without_documents(record) for name, record in records.items()},
        "facts": {
            "held-out text": text.name,
            "tokens predicted": dense.get("tokens"),
            "tokens a row": text.seq_len,
            **({"recovery": recovery.recipe.name} if recovery else {}),
            "seconds of all points": round(
                sum(sum(record["seconds"].values()) for record in records.values())
            ),
        },
    }


STAGE = Stage(
    "sweep",
    "Prune a model by many methods and ratios, and measure all.",
    Options,
    run,
    check,
)

if __name__ == "__main__":
    STAGE.main()
