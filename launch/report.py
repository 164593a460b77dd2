"""Stage `report`: write one page about runs, from their folders and the result files beside them.

The page is HTML that refers to nothing outside itself, or Markdown where the name ends in `.md`.
Nothing is measured here: files of `slimstate eval`, `recall`, `analyze`, `bench` and `sweep` are
read beside the runs, and wherever `--results` names them.
"""

from dataclasses import dataclass
from pathlib import Path

from flame.errors import UserError
from flame.options import argument, option
from flame.process.atomic_output import replacing_file
from flame.process.output_checks import check_file_output
from flame.stage import Stage
from launch.reporting.collect import collect
from launch.reporting.data import ReportData
from launch.reporting.run_folders import check_results, find_runs

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Options:
    runs: tuple[Path, ...] = argument("RUN", "run folder, or a folder of runs")
    out: Path | None = option(None, f"HTML, or .md (default: RUN/{REPORT_FILE})", metavar="FILE")
    results: tuple[Path, ...] = option(
        (), "result files, or folders of them, that do not lie beside the runs", metavar="A,B"
    )
    latex: bool = option(False, "print the tables as booktabs")
    markdown: bool = option(False, "print the report as Markdown")
    title: str = option("", "title of the page (default: from the names of the runs)")
    overwrite: bool = option(False, "replace FILE if it exists")

    @property
    def file(self) -> Path | None:
        """The file to write; None if the report is printed instead."""
        if self.out is None and not (self.latex or self.markdown):
            return self.runs[0] / REPORT_FILE
        return self.out


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError for folders without a run, an unfit output, or several processes."""
    if world_size != 1:
        raise UserError(f"--nproc {world_size}: report only reads files, run it on 1 process")
    find_runs(options.runs)
    check_results(options.results)
    if options.file is not None:
        if options.file.suffix not in (".html", ".htm", ".md"):
            raise UserError(f"--out {options.file}: the name must end in .html or .md")
        check_file_output(options.file, options.overwrite)


def run(options: Options) -> None:
    """Write the page, and print what the options ask for."""
    from launch.reporting.page import page
    from launch.reporting.tables import latex_tables

    data = collect(options.runs, options.title, options.results)
    if options.latex:
        print("\n\n".join(latex_tables(data)))
    if options.markdown:
        print(markdown(data), end="")
    if options.file is None:
        return
    text = markdown(data) if options.file.suffix == ".md" else page(data)
    with replacing_file(options.file, options.overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{options.file} has {', '.join(_contents(data))}", flush=True)


def markdown(data: ReportData) -> str:
    """Return the report without its drawings, as Markdown."""
    from launch.reporting.claims import details, verdict
    from launch.reporting.tables import markdown_tables

    said = "\n".join(f"- {sentence}" for sentence in details(data))
    parts = [f"# {data.title}", verdict(data), said, *markdown_tables(data)]
    if data.commands:
        listed = "\n".join(data.commands)
        parts.append(f"## How it was made\n\n```sh\n{listed}\n```")
    facts = {**data.facts, **data.versions}
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def _contents(data: ReportData) -> list[str]:
    counted = (
        ("model", "models", data.rows),
        ("plan", "plans", data.plans),
        ("score of tasks", "scores of tasks", data.tasks),
        ("recall curve", "recall curves", data.recall),
        ("rank analysis", "rank analyses", data.ranks),
        ("benchmark", "benchmarks", data.bench),
        ("sweep", "sweeps", data.sweeps),
        ("table of serving", "tables of serving", data.serving),
        ("loss curve", "loss curves", data.loss_curves),
    )
    return [f"{len(have)} {one if len(have) == 1 else many}" for one, many, have in counted if have]


STAGE = Stage(
    "report",
    "Write one page about runs and the results beside them.",
    Options,
    run,
    check,
)

if __name__ == "__main__":
    STAGE.main()
