"""Result files beside runs: evaluations, recall, benchmarks, analyses, and whose they are.

A file is known by its envelope, not by its name. Results of other models are ignored.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flame.errors import UserError, first_line
from launch.evaluation.intervals import read_losses
from launch.evaluation.stored_states import STORED_STATES
from launch.ranks.analysis_files import TABLE_FILE, read_table
from launch.ranks.spectra import spectra_of
from launch.reporting.data import Measured, RankAnalysis, Recall, Results
from launch.reporting.envelope import read_result
from launch.reporting.lineage import run_of, run_of_record
from launch.reporting.readings import (
    analysis_plots,
    capacities,
    decoding_speeds,
    engines,
    is_number,
    noise_by_layer,
    recall_curves,
    task_scores,
)
from launch.reporting.run_folders import RunFolder, result_files

SIZES = ("parameters", "state_bytes")


class Collector:
    """Reads result files, oldest first, so that a newer value replaces an older one."""

    def __init__(
        self, runs: Mapping[str, RunFolder], named: Sequence[Path], colours: Mapping[str, str]
    ) -> None:
        """Results of `runs`; those of `named` files and folders are read wherever they lie.

        `colours` has the role of each run's colour.
        """
        self.runs, self.named, self.colours = runs, named, colours
        self.found = Results()
        self._perplexities: dict[tuple[str, Any, Any], dict[str, dict[str, Any]]] = {}
        self._recalls: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}

    def read(self, places: Sequence[Path]) -> Results:
        """Return what the results in `places` say about the runs. Call it once."""
        for path in result_files(places, self.named):
            self._read_one(path)
        self._settle_perplexities()
        self._settle_recall()
        self.found.speeds = decoding_speeds(self.found.bench)
        return self.found

    def _read_one(self, path: Path) -> None:
        result = read_result(path)
        if result is None:
            if path in [named.resolve() for named in self.named]:
                raise UserError(f"--results {path} holds no result of a slimstate command")
            return
        before = self._size()
        read = {
            "eval": self._evaluations,
            "recall": self._evaluations,
            "bench": self._bench,
            "sweep": self._sweep,
            "demo": self._demo,
            "capacity": self._capacity,
            "serve-check": self._serve_check,
            # Of a sweep over several models, whose own sweeps lie in folders below it.
            "comparison": lambda result: None,
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
            name = run_of_record(self.runs, record)
            # States in fewer bits are a property of an engine, not of the run: no table has both.
            if name is not None and not record.get(STORED_STATES):
                self._evaluation(name, record)
                self._recall(name, record)
                self.found.versions |= result["versions"]

    def _bench(self, record: dict[str, Any]) -> None:
        """Take a benchmark if a model of it is a run here; rename its models as the runs are."""
        names = {
            name: run_of(self.runs, model.get("reference", name)) or self._foreign(name)
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
        if any(run_of(self.runs, results[key]) is not None for key in ("weights", "model")):
            older = [r for r in self.found.sweeps if r["command"] == results["command"]]
            self.found.sweeps = [r for r in self.found.sweeps if r not in older] + [results]
            self.found.versions |= results["versions"]

    def _capacity(self, record: dict[str, Any]) -> None:
        """Take the requests that a GPU holds, if a model of them is a run here."""
        found = [run_of(self.runs, reference) for reference in record["models"]]
        if not any(name in self.runs for name in found):
            return
        pairs = zip(found, record["models"], strict=True)
        names = [name or self._foreign(Path(reference).name) for name, reference in pairs]
        heading = f"Requests on one GPU: {' and '.join(names)}"
        self.found.serving[heading] = (record["notes"], capacities(record, names))

    def _serve_check(self, record: dict[str, Any]) -> None:
        """Take which engines serve a run here."""
        name = run_of(self.runs, record["model"])
        if name is not None:
            self.found.serving[f"Engines that serve {name}"] = engines(record)

    def _demo(self, summary: dict[str, Any]) -> None:
        """Take the summary of `slimstate demo`."""
        self.found.seconds |= summary["seconds"]
        self.found.versions |= summary["versions"]
        self.found.commands += summary.get("commands", [])
        self.found.world_size, self.found.seed = summary.get("world_size"), summary.get("seed")

    def _evaluation(self, name: str, record: dict[str, Any]) -> None:
        if is_number(record.get("perplexity")):
            read_losses(record)
            text = (str(record.get("data", "")), record.get("seq_len"), record.get("tokens"))
            self._perplexities.setdefault(text, {})[name] = record
            sizes = {key: record[key] for key in SIZES if is_number(record.get(key))}
            self.found.rows.setdefault(name, {}).update(sizes)
        tasks = record.get("tasks")
        tasks = tasks if isinstance(tasks, dict) else {}
        scores = {**(tasks.get("results") or {}), **(tasks.get("groups") or {})}
        for task, score in task_scores(scores).items():
            self.found.tasks.setdefault(task, {})[name] = score
        fidelity = record.get("fidelity")
        if isinstance(fidelity, dict) and is_number(fidelity.get("kl")):
            read_losses(fidelity)
            self.found.fidelity[name] = fidelity

    def _recall(self, name: str, record: dict[str, Any]) -> None:
        """Take accuracies by number of pairs, by depth of a needle for each length, and noise."""
        for heading, points in recall_curves(record).items():
            self._recalls.setdefault(heading, {})[name] = points
        if record.get("query_noise"):
            self.found.query_noise[name] = noise_by_layer(name, record["query_noise"])

    def _analysis(self, summary: dict[str, Any], folder: Path) -> None:
        """Take what `slimstate analyze` wrote into `folder`, if it is about a run here."""
        names = [run_of(self.runs, summary.get(f"{key}_reference")) for key in ("model", "against")]
        if names[0] is None and names[1] is None:
            return
        layers = [
            {"model": name or Path(str(summary[f"{key}_reference"])).name, **row}
            for key, name in zip(("model", "against"), names, strict=True)
            for row in summary.get(key, {}).get("layers", [])
        ]
        table = read_table(folder / TABLE_FILE)
        drawn = analysis_plots(
            table, summary["metric"], [self.colours.get(n or "", "other") for n in names]
        )
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
        """List the texts, the one that most models were measured on first; if several, the newest.

        The order of models is that of the runs.
        """
        texts = list(self._perplexities)
        order = [*self.runs, *(n for text in texts for n in self._perplexities[text])]
        # A stable sort: among texts with as many models the newest stays last.
        for text in reversed(sorted(texts, key=lambda text: len(self._perplexities[text]))):
            found = self._perplexities[text]
            ordered = {name: found[name] for name in sorted(found, key=order.index)}
            data, length, tokens = text
            self.found.texts.append(Measured(data, length, tokens, ordered))

    def _settle_recall(self) -> None:
        for (heading, x_label), curves in self._recalls.items():
            ordered = {name: curves[name] for name in self.runs if name in curves}
            drawn = {n: ([x for x, _ in ps], [y for _, y in ps]) for n, ps in ordered.items()}
            self.found.recall.append(Recall(heading, x_label, drawn))

    def _foreign(self, name: str) -> str:
        """A name for a model that is no run here, though it may be called like one."""
        return f"{name} (elsewhere)" if name in self.runs else name

    def _size(self) -> int:
        found = self.found
        scores = sum(map(len, found.tasks.values())) + len(found.fidelity)
        perplexities = sum(map(len, self._perplexities.values()))
        recalls = sum(map(len, self._recalls.values())) + len(found.query_noise)
        others = (
            len(found.serving)
            + len(found.bench)
            + len(found.ranks)
            + len(found.seconds)
            + len(found.sweeps)
        )
        return scores + perplexities + recalls + others


def _same(one: Mapping[str, Any], other: Mapping[str, Any], keys: Sequence[str]) -> bool:
    """Return whether two records agree in `keys`; only the names of models are compared."""
    return all(
        list(one[key]) == list(other[key]) if key == "models" else one[key] == other[key]
        for key in keys
    )
