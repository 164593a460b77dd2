"""The options of a sweep, and the parts of them that `prune`, `calibrate` and `train` get."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from flame.errors import UserError
from flame.options import REQUIRED, argument, group, option, overrides, words
from flame.options.shared import DTYPE_HELP, DType
from flame.recipe import option_name
from launch.evaluation.heldout_text import HeldoutOptions
from launch.sweeping.folder import SweepFolder
from launch.sweeping.models import Model
from launch.sweeping.points import SYNTAX, Point, points
from launch.sweeping.work import CONTINUED, DENSE, Recovery
from pruning.options import MODEL_HELP, DataOptions
from pruning.planning.budgets import Budget
from pruning.repair.repaired import REPAIR_HELP, Repair

SET_BY_SWEEP = ("job.config_file", "job.dump_folder", "model.init", "model.config")


@dataclass(frozen=True)
class Options:
    """The command line of `slimstate sweep`."""

    model: str = argument("MODEL", MODEL_HELP)
    out: Path = argument("OUT", "folder to write; resumed if begun")
    methods: tuple[str, ...] = option(REQUIRED, f"{SYNTAX} each", metavar="A,B")
    config: Path | None = option(
        None, "models, OUT and options from this file, instead", metavar="SWEEP.toml"
    )
    ratios: tuple[str, ...] = option((), "parts to remove, such as 0.25,0.5,0.75", metavar="R,R")
    stats: Path | None = option(None, "use the statistics of slimstate calibrate")
    seeds: tuple[int, ...] = option((0,), "seeds of methods that draw", least=0, metavar="N,N")
    recover: Path | None = option(
        None, "train pruned models on by this recipe; measure again", metavar="RECIPE"
    )
    recover_ratios: tuple[str, ...] = option(
        (), "ratios at which models are recovered (default: all)", metavar="R,R"
    )
    overrides: tuple[str, ...] = overrides("override a key of the recipe of --recover")
    dense_continued: bool = option(False, "train the dense model on too, as control")
    reference: tuple[str, ...] = option(
        (), "methods that the others are compared with: the first that a point has", metavar="A,B"
    )
    heldout: str = option("", "text to measure on (default: the recipe's)", metavar="DATA")
    heldout_split: str = option("", "split of it", metavar="SPLIT")
    max_sequences: int | None = option(
        None, "rows of it, spread evenly over all of it (default: all)", least=1, metavar="N"
    )
    dtype: DType = option("auto", DTYPE_HELP)
    keep: bool = option(False, "keep all pruned and recovered models")
    json: Path | None = option(None, "write the results here too", metavar="FILE")
    title: str = option("", "title of the page")
    overwrite: bool = option(False, "start afresh: remove an earlier sweep in OUT")
    budget: Budget = group(
        Budget, "budget of all points", without=("ratio", "width", "state_bytes", "for_")
    )
    repair: Repair = option("none", f"of points that have no :repair= of their own; {REPAIR_HELP}")
    data: DataOptions = group(DataOptions, "calibration")
    models: tuple[Model, ...] = ()
    """The models of `config`."""

    given: tuple[str, ...] = ()
    """The words of the command line."""

    def check(self) -> None:
        """Raise UserError for options that need others or name what the sweep does not have."""
        if self.recover is None and (self.overrides or self.dense_continued or self.recover_ratios):
            named = "--dense-continued" if self.dense_continued else "--recover-ratios"
            given = self.overrides[0] if self.overrides else named
            raise UserError(f"{given} is for a recovery: give --recover RECIPE.toml")
        if self.budget.allocate == "auto":
            raise UserError(
                "--allocate auto measures each point on more text than a sweep's statistics are "
                "of: sweep uniform, layer and model, or use slimstate prune"
            )
        _known("--reference", self.reference, dict.fromkeys(p.method for p in self.points))
        _known("--recover-ratios", self.recover_ratios, dict.fromkeys(p.ratio for p in self.points))
        for name in map(option_name, self.overrides):
            if name in SET_BY_SWEEP:
                raise UserError(f"--{name} is the sweep's to set for each point: leave it out")

    @property
    def members(self) -> tuple["Options", ...]:
        """The sweep of each model; of a sweep without `config` it is the sweep itself."""
        if not self.models:
            return (self,)
        return tuple(
            replace(
                self,
                model=each.model,
                out=self.out / each.name,
                title=f"{self.title}: {each.name}" if self.title else "",
                models=(),
            )
            for each in self.models
        )

    @property
    def folder(self) -> SweepFolder:
        return SweepFolder(self.out)

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """The models to make, for each method, ratio and seed; raises UserError for a bad word."""
        space = "key" if self.budget.space is None else self.budget.space
        return points(self.methods, self.ratios, space, self.seeds)

    @property
    def wanted(self) -> dict[str, tuple[str, ...]]:
        """The stages that each point is measured in, by its name in file names; controls first."""
        found: dict[str, tuple[str, ...]] = {DENSE: ("before",)}
        found |= {CONTINUED: ("recovered",)} if self.dense_continued else {}
        for point in self.points:
            recovers = self.recover is not None and (
                not self.recover_ratios or point.ratio in self.recover_ratios
            )
            found[point.file_name] = ("before", "recovered") if recovers else ("before",)
        return found

    @property
    def repairs(self) -> bool:
        """Whether a point is repaired, which reads data."""
        of_points = (dict(zip(p.words, p.words[1:], strict=False)) for p in self.points)
        return any(words.get("--repair", self.repair) != "none" for words in of_points)

    @property
    def statistics(self) -> Path:
        """The folder of the statistics that methods choose by."""
        return self.stats or self.folder.statistics

    @property
    def budget_words(self) -> tuple[str, ...]:
        """The options of `slimstate prune` that hold for all points."""
        repair = () if self.repair == "none" else ("--repair", self.repair)
        return (*words(replace(self.budget, space=Budget.space)), *repair)

    @property
    def text(self) -> HeldoutOptions:
        """The held-out text to measure on."""
        return HeldoutOptions(
            data=self.heldout,
            split=self.heldout_split,
            text_key=self.data.text_key,
            tokenizer=self.data.tokenizer,
            max_sequences=self.max_sequences,
            spread=True,
        )

    @property
    def recovery(self) -> Recovery | None:
        """How pruned models are trained on; None if they are not."""
        return None if self.recover is None else Recovery(self.recover, self.overrides)


def _known(flag: str, words: Sequence[str], known: Iterable[str]) -> None:
    """Raise UserError for a word that is not among the known ones."""
    for word in words:
        if word not in known:
            raise UserError(f"{flag}: {word} is not in the sweep: choose from {', '.join(known)}")
