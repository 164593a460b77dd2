"""A report's data, put together from run folders and the result files beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flame.errors import UserError
from launch.reporting.data import KeptChannels, ReportData
from launch.reporting.lineage import Lineage, colours, lineages
from launch.reporting.run_folders import RunFolder, commands, find_runs, places_beside
from launch.reporting.run_results import Collector, Results


def collect(paths: Sequence[Path], title: str = "", named: Sequence[Path] = ()) -> ReportData:
    """Return everything that the runs and the files beside them say.

    Args:
        paths: run folders, or folders of runs.
        title: title of the page; by default made from the names of the runs.
        named: result files, or folders of such, that lie elsewhere.

    Raises:
        UserError: a path holds no run, a file is damaged, or there is nothing to report.
    """
    runs = find_runs(paths)
    found = lineages(runs)
    collector = Collector(runs, named, colours(found, runs))
    results = collector.read(places_beside(paths, runs))
    plans = {name: run.folder / "plan.json" for name, run in runs.items() if run.plan is not None}
    curves = _loss_curves(runs)
    if not (plans or curves or results.files):
        raise UserError(
            f"nothing to report on {', '.join(map(str, paths))}: no plan, no losses and no "
            "results beside it; slimstate eval RUN --perplexity --json FILE makes some"
        )
    kept, method = _kept(plans, found)
    made = results.commands or list(commands(runs))
    return ReportData(
        title=title or f"slimstate report: {', '.join(r.folder.name for r in runs.values())}",
        rows=_rows(runs, results),
        lineages=found,
        states=_states(runs),
        texts=results.texts,
        speeds=list(results.speeds),
        plans={name: _plan_facts(runs[name].plan or {}) for name in plans},
        tasks=results.tasks,
        fidelity=results.fidelity,
        recall=results.recall,
        query_noise=[row for name in runs for row in results.query_noise.get(name, ())],
        ranks=results.ranks,
        spectra={name: results.spectra[name] for name in runs if name in results.spectra},
        bench=results.bench,
        sweeps=results.sweeps,
        serving=results.serving,
        loss_curves=curves,
        kept=kept,
        method=method,
        seconds=results.seconds,
        commands=made,
        versions=results.versions or _plan_versions(runs),
        facts={**_places(runs), **results.facts},
        world_size=results.world_size,
        seed=results.seed,
    )


def _rows(runs: Mapping[str, RunFolder], results: Results) -> dict[str, dict[str, Any]]:
    """The table of models: sizes as measured or as the folder has them, and decoding speeds."""
    from pruning.adapters import state_bytes

    rows = {}
    for name, run in runs.items():
        row = {"state_bytes": state_bytes(dict(run.config)), **results.rows.get(name, {})}
        row.setdefault("parameters", _parameters(run))
        for heading, speeds in results.speeds.items():
            row[heading] = speeds.get(name)
        rows[name] = row
    return rows


def _states(runs: Mapping[str, RunFolder]) -> dict[str, tuple[int, int]]:
    """Bytes of a sequence's state before and after pruning, by the run that has the plan."""
    from pruning.adapters import state_bytes

    found = {}
    for name, run in runs.items():
        configs = [(run.plan or {}).get(f"config_{when}") for when in ("before", "after")]
        sizes = [state_bytes(config) for config in configs if isinstance(config, dict)]
        if len(sizes) == 2 and sizes[0] and sizes[1]:
            found[name] = (sizes[0], sizes[1])
    return found


def _parameters(run: RunFolder) -> int | None:
    """Count parameters by the checkpoint's shapes, tied embeddings once; None if unreadable."""
    import math

    from flame.checkpoint.reference import resolve

    try:
        source = resolve(run.folder).source()
        shapes = {name: source.info(name).shape for name in source.names()}
    except UserError:
        return None
    if run.config.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    return sum(math.prod(shape) for shape in shapes.values())


def _loss_curves(runs: Mapping[str, RunFolder]) -> dict[str, tuple[list[int], list[float]]]:
    from launch.reporting.losses import loss_curve

    curves = {}
    for name, run in runs.items():
        if run.has_losses:
            try:
                curves[name] = loss_curve(run.folder)
            except UserError:
                continue
    return curves


def _kept(
    plans: Mapping[str, Path], found: Mapping[str, Lineage]
) -> tuple[list[KeptChannels], str]:
    """Return what the first plan that is not random, or else the first, kept; and its method."""
    from pruning.planning.plan import planned_spaces
    from pruning.planning.plan_file import read_plan

    if not plans:
        return [], ""
    chosen = next((name for name in plans if found[name].kind != "random"), next(iter(plans)))
    path = plans[chosen]
    plan = read_plan(path)
    try:
        spaces = {space.name: space for space in planned_spaces(plan, plan.config_before)}
    except ValueError as error:
        raise UserError(f"plan {path}: {error}") from error
    shown = [
        KeptChannels(space.layer, space.head_dim, _rows_of(plan.kept[name]), space.kind)
        for name, space in spaces.items()
    ]
    return sorted(shown, key=lambda layer: layer.layer), plan.method


def _rows_of(kept: Sequence[Any]) -> list[list[int]]:
    return [row.tolist() for row in kept]


def _plan_facts(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a plan for a reader: method, budget, widths, calibration."""
    method, budget = plan.get("method", {}), plan.get("budget", {})
    options = method.get("options") or {}
    calibration = plan.get("calibration") or {}
    data = calibration.get("data") or {}
    spaces = plan.get("spaces", {})
    facts = {
        "method": method.get("name"),
        "hyper-parameters": ", ".join(f"{k} {v}" for k, v in options.items() if v is not None),
        "removed, as asked": budget.get("ratio"),
        "width, as asked": budget.get("width"),
        "most bytes of state, as asked": budget.get("state_bytes"),
        "shared by scores": budget.get("allocate"),
        "kind of space": budget.get("space"),
        "width a multiple of": budget.get("multiple_of"),
        "spaces pruned": len(spaces) or None,
        "channels kept a head": _widths(spaces, "key"),
        "value channels kept": _widths(spaces, "value"),
        "heads kept a layer": _widths(spaces, "head"),
        "value heads kept a group": _widths(spaces, "value-head"),
        "notes": " ".join(plan.get("notes") or ()),
        "calibration data": data.get("dataset"),
        "calibration sequences": calibration.get("sequences"),
        "calibration tokens": calibration.get("tokens"),
        "fingerprint of the source": str(plan.get("fingerprint", ""))[:12],
        **_served(plan),
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _served(plan: Mapping[str, Any]) -> dict[str, str]:
    """Return which engines serve the result of a plan, and how; nothing if it is not readable."""
    from pruning.serving.shape import served_shape
    from pruning.serving.verdict import serving_lines, verdicts

    after, before = plan.get("config_after"), plan.get("config_before")
    if not isinstance(after, dict) or not isinstance(before, dict):
        return {}
    try:
        if served_shape(after) is None:
            return {"served by": " ".join(serving_lines(after))}
        return {f"served by {each.who}": each.what for each in verdicts(after, dense=before)}
    except UserError:
        return {}


def _widths(spaces: Mapping[str, Any], kind: str) -> str | None:
    """Return how many channels or heads the spaces of a kind keep, e.g. `12 to 16`."""
    of_kind = [rows for name, rows in spaces.items() if name.endswith(f".{kind}")]
    return _range([len(row) for rows in of_kind for row in rows])


def _range(widths: list[int]) -> str | None:
    if not widths:
        return None
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low} to {high}"


def _plan_versions(runs: Mapping[str, RunFolder]) -> dict[str, str]:
    found: dict[str, str] = {}
    for run in runs.values():
        found |= (run.plan or {}).get("versions", {})
    return found


def _places(runs: Mapping[str, RunFolder]) -> dict[str, str]:
    """Return the path of each run's folder."""
    return {f"folder, {name}": str(run.folder) for name, run in runs.items()}
