"""Result files beside runs: evaluations, recall, benchmarks, analyses, and whose they are.

A file is known by what is in it, not by its name; what belongs to none of the runs is passed over.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.errors import UserError, first_line
from launch.ranks.analysis_files import TABLE_FILE, read_table
from launch.ranks.rank_plots import Plot, Series, plots
from launch.ranks.spectra import Spectrum, spectra_of
from launch.reporting.data import RankAnalysis, Recall
from launch.reporting.envelope import read_result
from launch.reporting.run_folders import RunFolder

if TYPE_CHECKING:
    from pruning.states.analysis import Analysis

LARGEST = 16 * 2**20
"""Bytes above which a JSON file is not looked into."""

SCORES = ("perplexity", "bits_per_byte", "parameters", "state_bytes")
METRIC_NAMES = {"kl": "KL, nats a token", "agreement": "same first token"}


@dataclass
class Results:
    """What the files hold, by the names of the runs."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    fidelity: dict[str, dict[str, Any]] = field(default_factory=dict)
    recall: list[Recall] = field(default_factory=list)
    query_noise: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    ranks: list[RankAnalysis] = field(default_factory=list)
    spectra: dict[str, list[Spectrum]] = field(default_factory=dict)
    bench: list[dict[str, Any]] = field(default_factory=list)
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    world_size: int | None = None
    seed: int | None = None
    files: list[Path] = field(default_factory=list)
    """Files that something was taken from."""


class Collector:
    """Reads result files, oldest first, so that of two that say the same the newest holds."""

    def __init__(self, runs: Mapping[str, RunFolder]) -> None:
        self.runs = runs
        self.found = Results()
        self._perplexities: dict[tuple[str, Any], dict[str, dict[str, Any]]] = {}
        self._recalls: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}

    def read(self, places: Sequence[Path]) -> Results:
        """All that lies in `places` and is about the runs."""
        for path in _files(places):
            self._read_one(path)
        self._settle_perplexities()
        self._settle_recall()
        return self.found

    def _read_one(self, path: Path) -> None:
        result = read_result(path)
        if result is None:
            return
        before = self._size()
        read = {
            "eval": self._evaluations,
            "recall": self._evaluations,
            "bench": self._bench,
            "sweep": self._sweep,
            "demo": self._demo,
        }
        try:
            if result["kind"] == "analyze":
                self._analysis(result, path.parent)
            else:
                read[result["kind"]](result)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} looks like a result, but {type(error).__name__} {first_line(error)}: "
                "move it away, or measure again"
            ) from error
        if self._size() != before:
            self.found.files.append(path)

    def _evaluations(self, result: dict[str, Any]) -> None:
        """Perplexities, scores and recall of models; one alone stands at the top of its file."""
        models = result.get("models", {result.get("model"): result})
        for record in models.values():
            name = self._name(record.get("weights")) or self._name(record["model"])
            if name is not None:
                self._evaluation(name, record)
                self._recall(name, record)
                self.found.versions |= result["versions"]

    def _bench(self, record: dict[str, Any]) -> None:
        """A benchmark with its models renamed as their runs are, if any of them is a run here."""
        names = {
            name: self._name(model.get("reference", name)) or name
            for name, model in record.get("models", {}).items()
        }
        if not any(name in self.runs for name in names.values()):
            return
        against = record.get("against")
        order = [*self.runs, *(name for name in names.values() if name not in self.runs)]
        by_row = sorted(names, key=lambda name: order.index(names[name]))
        renamed = {
            **record,
            "models": {names[name]: record["models"][name] for name in by_row},
            "against": names.get(against, against),
            "measures": [
                {**m, "values": {names[n]: m["values"][n] for n in by_row if n in m["values"]}}
                for m in record["measures"]
            ],
        }
        # An older file of the same models and device has been measured again.
        key = ("models", "device", "dtype")
        older = [r for r in self.found.bench if _same(r, renamed, key)]
        self.found.bench = [r for r in self.found.bench if r not in older] + [renamed]
        self.found.versions |= record["versions"]

    def _sweep(self, results: dict[str, Any]) -> None:
        """What `slimstate sweep` found, if it is about a run here."""
        if any(self._name(results[key]) is not None for key in ("weights", "model")):
            older = [r for r in self.found.sweeps if r["command"] == results["command"]]
            self.found.sweeps = [r for r in self.found.sweeps if r not in older] + [results]
            self.found.versions |= results["versions"]

    def _demo(self, summary: dict[str, Any]) -> None:
        """The summary of `slimstate demo`."""
        for name in self.runs:
            if isinstance(summary.get(name), dict):
                self.found.rows.setdefault(name, {}).update(summary[name])
        self.found.seconds |= summary["seconds"]
        self.found.versions |= summary["versions"]
        self.found.commands += summary.get("commands", [])
        self.found.world_size, self.found.seed = summary.get("world_size"), summary.get("seed")

    def _evaluation(self, name: str, record: dict[str, Any]) -> None:
        if _is_number(record.get("perplexity")):
            text = (str(record.get("data", "")), record.get("seq_len"))
            self._perplexities.setdefault(text, {})[name] = record
        tasks = record.get("tasks")
        tasks = tasks if isinstance(tasks, dict) else {}
        scores = {**(tasks.get("results") or {}), **(tasks.get("groups") or {})}
        for task, score in _task_scores(scores).items():
            self.found.tasks.setdefault(task, {})[name] = score
        fidelity = record.get("fidelity")
        if isinstance(fidelity, dict):
            for key, heading in METRIC_NAMES.items():
                if _is_number(fidelity.get(key)):
                    self.found.fidelity.setdefault(heading, {})[name] = fidelity[key]

    def _recall(self, name: str, record: dict[str, Any]) -> None:
        """Accuracies by number of pairs, and by the depth of a needle for each length."""
        task = str(record.get("task", ""))
        points = [(cell["pairs"], cell["accuracy"]) for cell in record.get("mqar") or ()]
        if points:
            self._recalls.setdefault(_recall_heading(task), {})[name] = sorted(points)
        by_length: dict[int, list[tuple[float, float]]] = {}
        for cell in record.get("needle") or ():
            by_length.setdefault(cell["length"], []).append((cell["depth"], cell["accuracy"]))
        if record.get("query_noise"):
            self.found.query_noise[name] = _by_layer(name, record["query_noise"])
        for length, points in by_length.items():
            heading = (f"Needle in a haystack of {length} words", "depth of the needle, %")
            self._recalls.setdefault(heading, {})[name] = sorted(points)

    def _analysis(self, summary: dict[str, Any], folder: Path) -> None:
        """What `slimstate analyze` wrote into `folder`."""
        names = [self._name(summary.get(f"{key}_reference")) for key in ("model", "against")]
        if names[0] is None and names[1] is None:
            return
        layers = [
            {"model": name or Path(str(summary[f"{key}_reference"])).name, **row}
            for key, name in zip(("model", "against"), names, strict=True)
            for row in summary.get(key, {}).get("layers", [])
        ]
        table = read_table(folder / TABLE_FILE)
        drawn = _plots(table, summary["metric"], [name or "other" for name in names])
        for name, analysis in zip(names, table.values(), strict=False):
            if name is not None:
                self.found.spectra[name] = spectra_of(analysis)
        texts = ", ".join(Path(str(text)).name for text in summary.get("data", []))
        note = (
            f"States after {summary.get('length')} tokens of {texts}, the mean over "
            f"{summary.get('sequences')} sequences; definitions are in pruning/state_rank.py."
        )
        heading = f"Rank of the states of {names[0] or names[1]}"
        others = [a for a in self.found.ranks if (a.heading, a.note) != (heading, note)]
        self.found.ranks = [*others, RankAnalysis(heading, note, layers, drawn)]

    def _settle_perplexities(self) -> None:
        """Rows compare models on one text: the one that most were measured on, and the newest."""
        if not self._perplexities:
            return
        texts = list(self._perplexities)
        chosen = max(texts, key=lambda text: (len(self._perplexities[text]), texts.index(text)))
        for name, record in self._perplexities.pop(chosen).items():
            known = {key: record[key] for key in SCORES if _is_number(record.get(key))}
            self.found.rows.setdefault(name, {}).update(known)
        self.found.facts |= {"held-out text": chosen[0], "sequence length": chosen[1]}
        for (data, length), records in self._perplexities.items():
            heading = f"perplexity of {Path(data).name}, rows of {length}"
            for name, record in records.items():
                self.found.tasks.setdefault(heading, {})[name] = record["perplexity"]

    def _settle_recall(self) -> None:
        for (heading, x_label), curves in self._recalls.items():
            ordered = {name: curves[name] for name in self.runs if name in curves}
            drawn = {n: ([x for x, _ in ps], [y for _, y in ps]) for n, ps in ordered.items()}
            self.found.recall.append(Recall(heading, x_label, drawn))

    def _name(self, reference: Any) -> str | None:
        """The run that a result is of: by its path, or where that is gone, by the folder's name."""
        if not isinstance(reference, str):
            return None
        path = Path(reference)
        for name, run in self.runs.items():
            if path.resolve().is_relative_to(run.folder):
                return name
        if path.exists():
            return None
        parts = [part for part in path.parts if part != "checkpoint" and part[:5] != "step-"]
        same = [name for name, run in self.runs.items() if parts and run.folder.name == parts[-1]]
        return same[0] if len(same) == 1 else None

    def _size(self) -> int:
        found = self.found
        scores = sum(map(len, [*found.tasks.values(), *found.fidelity.values()]))
        perplexities = sum(map(len, self._perplexities.values()))
        recalls = sum(map(len, self._recalls.values())) + len(found.query_noise)
        others = len(found.bench) + len(found.ranks) + len(found.seconds) + len(found.sweeps)
        return scores + perplexities + recalls + others


def places_beside(paths: Sequence[Path], runs: Mapping[str, RunFolder]) -> list[Path]:
    """Folders in which results of the runs are looked for: the runs, what was given, and beside."""
    folders = [run.folder for run in runs.values()]
    beside = [folder.parent for folder in folders]
    return list(dict.fromkeys([*beside, *(path.resolve() for path in paths), *folders]))


def _files(places: Sequence[Path]) -> list[Path]:
    """JSON files that may be results: in the places and in folders there; oldest first."""
    patterns = ("*.json", "*/summary.json", "*/results.json")
    found = {path for place in places for pattern in patterns for path in _found(place, pattern)}
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, str(path)))


def _found(place: Path, pattern: str) -> list[Path]:
    """Files of a folder; none where it is not for us to see."""
    try:
        return [p for p in place.glob(pattern) if p.is_file() and p.stat().st_size <= LARGEST]
    except OSError:
        return []


def _plots(
    found: "Mapping[tuple[str, str], Analysis]", metric: str, roles: Sequence[str]
) -> list[Plot]:
    """The plots of an analysis, drawn anew with the colours of these rows."""
    (model, text), *others = found
    against = second = None
    for name, data in others:
        analysis = found[name, data]
        if name == model:
            second = (text, Series(data, analysis))
        else:
            against = Series(name, analysis, roles[1])
    drawn = plots(Series(model, found[model, text], roles[0]), metric, against, second)
    return [drawn[name] for name in sorted(drawn)]


def _by_layer(name: str, heads: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Query noise by layer: the mean of the stable ranks, geometric means of the rest."""
    from statistics import fmean, geometric_mean

    layers: dict[int, list[Mapping[str, Any]]] = {}
    for head in heads:
        layers.setdefault(head["layer"], []).append(head)
    return [
        {
            "model": name,
            "layer": layer,
            "stable_rank": fmean(head["stable_rank"] for head in found),
            **{
                key: geometric_mean(head[key] for head in found)
                for key in ("amplification", "random_queries", "error_at_10_percent")
            },
        }
        for layer, found in sorted(layers.items())
    ]


def _recall_heading(task: str) -> tuple[str, str]:
    length = re.search(r"\blength=(\d+)", task)
    size = f" in {length[1]} words" if length else ""
    return f"Associative recall (MQAR){size}", "pairs of key and value"


def _task_scores(results: Any) -> dict[str, str]:
    """Scores of lm-eval's `results` with standard errors, by task and metric."""
    found: dict[str, str] = {}
    if not isinstance(results, dict):
        return found
    for task, scores in results.items():
        for key, value in scores.items() if isinstance(scores, dict) else ():
            metric, _, kind = key.partition(",")
            if not _is_number(value) or not kind or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            spread = f" ± {_score(error, value)}" if _is_number(error) and error > 0 else ""
            named = metric if kind == "none" else f"{metric} ({kind})"
            found[f"{task}, {named}"] = _score(value) + spread
    return found


def _same(one: Mapping[str, Any], other: Mapping[str, Any], keys: Sequence[str]) -> bool:
    """Whether two records agree in `keys`; of models only the names count."""
    return all(
        list(one[key]) == list(other[key]) if key == "models" else one[key] == other[key]
        for key in keys
    )


def _score(value: float, beside: float = 0.0) -> str:
    """Four digits behind the point, or two for what is large or stands beside it."""
    return f"{value:.4f}" if max(abs(value), abs(beside)) < 10 else f"{value:,.2f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
