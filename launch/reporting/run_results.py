"""Result files beside runs: evaluations, recall, benchmarks, analyses, and whose they are.

A file is known by its envelope, not by its name. Results of other models are ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flame.errors import UserError, first_line
from launch.ranks.analysis_files import TABLE_FILE, read_table
from launch.ranks.spectra import Spectrum, spectra_of
from launch.reporting.data import RankAnalysis, Recall
from launch.reporting.envelope import read_result
from launch.reporting.readings import (
    analysis_plots,
    is_number,
    noise_by_layer,
    recall_heading,
    task_scores,
)
from launch.reporting.run_folders import RunFolder, result_files

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
    """Files that added something; one that only replaced older values may be missing."""


class Collector:
    """Reads result files, oldest first, so that a newer value replaces an older one."""

    def __init__(self, runs: Mapping[str, RunFolder]) -> None:
        self.runs = runs
        self.found = Results()
        self._perplexities: dict[tuple[str, Any], dict[str, dict[str, Any]]] = {}
        self._recalls: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}

    def read(self, places: Sequence[Path]) -> Results:
        """Return what the results in `places` say about the runs. Call it once."""
        for path in result_files(places):
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
        """Take perplexities, scores and recall; a single model's record may be the whole file."""
        models = result.get("models", {result.get("model"): result})
        for record in models.values():
            name = self._name(record.get("weights")) or self._name(record["model"])
            if name is not None:
                self._evaluation(name, record)
                self._recall(name, record)
                self.found.versions |= result["versions"]

    def _bench(self, record: dict[str, Any]) -> None:
        """Take a benchmark if a model of it is a run here; rename its models as the runs are."""
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
        """Take what `slimstate sweep` found, if it is about a run here."""
        if any(self._name(results[key]) is not None for key in ("weights", "model")):
            older = [r for r in self.found.sweeps if r["command"] == results["command"]]
            self.found.sweeps = [r for r in self.found.sweeps if r not in older] + [results]
            self.found.versions |= results["versions"]

    def _demo(self, summary: dict[str, Any]) -> None:
        """Take the summary of `slimstate demo`."""
        for name in self.runs:
            if isinstance(summary.get(name), dict):
                self.found.rows.setdefault(name, {}).update(summary[name])
        self.found.seconds |= summary["seconds"]
        self.found.versions |= summary["versions"]
        self.found.commands += summary.get("commands", [])
        self.found.world_size, self.found.seed = summary.get("world_size"), summary.get("seed")

    def _evaluation(self, name: str, record: dict[str, Any]) -> None:
        if is_number(record.get("perplexity")):
            text = (str(record.get("data", "")), record.get("seq_len"))
            self._perplexities.setdefault(text, {})[name] = record
        tasks = record.get("tasks")
        tasks = tasks if isinstance(tasks, dict) else {}
        scores = {**(tasks.get("results") or {}), **(tasks.get("groups") or {})}
        for task, score in task_scores(scores).items():
            self.found.tasks.setdefault(task, {})[name] = score
        fidelity = record.get("fidelity")
        if isinstance(fidelity, dict):
            for key, heading in METRIC_NAMES.items():
                if is_number(fidelity.get(key)):
                    self.found.fidelity.setdefault(heading, {})[name] = fidelity[key]

    def _recall(self, name: str, record: dict[str, Any]) -> None:
        """Take accuracies by number of pairs, by depth of a needle for each length, and noise."""
        task = str(record.get("task", ""))
        points = [(cell["pairs"], cell["accuracy"]) for cell in record.get("mqar") or ()]
        if points:
            self._recalls.setdefault(recall_heading(task), {})[name] = sorted(points)
        by_length: dict[int, list[tuple[float, float]]] = {}
        for cell in record.get("needle") or ():
            by_length.setdefault(cell["length"], []).append((cell["depth"], cell["accuracy"]))
        if record.get("query_noise"):
            self.found.query_noise[name] = noise_by_layer(name, record["query_noise"])
        for length, points in by_length.items():
            heading = (f"Needle in a haystack of {length} words", "depth of the needle, %")
            self._recalls.setdefault(heading, {})[name] = sorted(points)

    def _analysis(self, summary: dict[str, Any], folder: Path) -> None:
        """Take what `slimstate analyze` wrote into `folder`, if it is about a run here."""
        names = [self._name(summary.get(f"{key}_reference")) for key in ("model", "against")]
        if names[0] is None and names[1] is None:
            return
        layers = [
            {"model": name or Path(str(summary[f"{key}_reference"])).name, **row}
            for key, name in zip(("model", "against"), names, strict=True)
            for row in summary.get(key, {}).get("layers", [])
        ]
        table = read_table(folder / TABLE_FILE)
        drawn = analysis_plots(table, summary["metric"], [name or "other" for name in names])
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
        """Fill the rows from the text that most models were measured on; if several, the newest."""
        if not self._perplexities:
            return
        texts = list(self._perplexities)
        chosen = max(texts, key=lambda text: (len(self._perplexities[text]), texts.index(text)))
        for name, record in self._perplexities.pop(chosen).items():
            known = {key: record[key] for key in SCORES if is_number(record.get(key))}
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
        """Return the run of a result, by its path or, if that is gone, by the folder's name."""
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


def _same(one: Mapping[str, Any], other: Mapping[str, Any], keys: Sequence[str]) -> bool:
    """Return whether two records agree in `keys`; only the names of models are compared."""
    return all(
        list(one[key]) == list(other[key]) if key == "models" else one[key] == other[key]
        for key in keys
    )
