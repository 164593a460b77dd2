"""Stage `serve-check`: say which engines serve a model, from its config.json or a plan alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.errors import UserError
from flame.options import argument, option
from flame.process.output_checks import check_file_output
from flame.stage import Stage
from launch.reporting.envelope import command_line, enveloped, write_result
from launch.serving.configs import served_configs
from launch.serving.tables import kernels_table
from pruning.adapters.interface import Config
from pruning.serving.contract import ENGINES
from pruning.serving.verdict import (
    Verdict,
    check_parallel,
    check_served,
    serving_lines,
    verdicts,
)


@dataclass(frozen=True)
class Options:
    model: str = argument("MODEL", "config.json, plan, folder that holds one, run, or hub name")
    for_: tuple[str, ...] = option(
        (),
        f"fail unless these engines serve it: {', '.join(ENGINES)}",
        metavar="NAME,NAME",
        choices=tuple(ENGINES),
    )
    tensor_parallel: int = option(
        1, "fail unless so many processes can share it", least=1, metavar="N"
    )
    json: Path | None = option(None, "write the verdicts to FILE", metavar="FILE")
    overwrite: bool = option(False, "replace a file that exists")


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if an engine of `--for` refuses the model, or the processes do not divide."""
    if world_size != 1:
        raise UserError(f"--nproc {world_size}: serve-check only looks, run it on 1 process")
    config = served_configs(options.model)[0]
    check_served(config, options.for_)
    if options.tensor_parallel > 1:
        check_parallel(config, options.tensor_parallel)
    if options.json is not None:
        check_file_output(options.json, options.overwrite)


def run(options: Options) -> None:
    """Print a row for each kernel that takes the model, and a line for each engine."""
    config, dense = served_configs(options.model)
    found = verdicts(config, options.for_ or ENGINES, dense)
    rows = [row for verdict in found for row in _rows(verdict)]
    if rows:
        print(f"{kernels_table(rows).text()}\n")
    says = _lines(config, found)
    print("\n".join(says))
    if options.json is not None:
        engines = [_record(verdict) for verdict in found]
        content = {"model": options.model, "engines": engines, "says": says}
        result = enveloped("serve-check", command_line("serve-check", options), content)
        write_result(options.json, result, options.overwrite)


def _rows(verdict: Verdict) -> Iterator[dict[str, Any]]:
    for kernel in verdict.kernels:
        yield {
            "engine": f"{verdict.engine.program} {verdict.engine.release}",
            "class": verdict.model_class,
            "kernel": kernel.name,
            "for": kernel.does,
            "where": kernel.where,
            "flag": kernel.flag if kernel.chosen is None else None,
            "evidence": kernel.evidence,
            "source": kernel.source,
        }


def _lines(config: Config, found: list[Verdict]) -> list[str]:
    if all(not verdict.kernels for verdict in found) and len(serving_lines(config)) == 1:
        return serving_lines(config)
    return [f"{verdict.who}: {verdict.what}" for verdict in found]


def _record(verdict: Verdict) -> dict[str, Any]:
    return {
        "name": verdict.name,
        "release": verdict.engine.release,
        "refusal": verdict.refusal,
        "class": verdict.model_class or None,
        "kernels": list(_rows(verdict)),
        "flags": list(verdict.flags),
        "tensor_parallel": list(verdict.parallel),
    }


STAGE = Stage(
    "serve-check",
    "Say which engines serve a model, on which kernels, with which flags.",
    Options,
    run,
    check,
)

if __name__ == "__main__":
    STAGE.main()
