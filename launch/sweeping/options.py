"""The options of a sweep, and the parts of them that `prune`, `calibrate` and `train` get."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from flame.errors import UserError
from flame.options import REQUIRED, argument, group, option, overrides, words
from flame.options.shared import DTYPE_HELP, DType
from flame.recipe import option_name
from launch.evaluation.heldout_text import HeldoutOptions
from launch.sweeping.folder import SweepFolder
from launch.sweeping.points import SYNTAX, Point, points
from launch.sweeping.work import CONTINUED, DENSE, Recovery
from pruning.methods import METHODS
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
    ratios: tuple[str, ...] = option((), "parts to remove, such as 0.25,0.5,0.75", metavar="R,R")
    stats: Path | None = option(None, "use the statistics of slimstate calibrate")
    seeds: tuple[int, ...] = option((0,), "seeds of methods that draw", least=0, metavar="N,N")
    recover: Path | None = option(
        None, "train pruned models on by this recipe; measure again", metavar="RECIPE"
    )
    overrides: tuple[str, ...] = overrides("override a key of the recipe of --recover")
    dense_continued: bool = option(False, "train the dense model on too, as control")
    heldout: str = option("", "text to measure on (default: the recipe's)", metavar="DATA")
    heldout_split: str = option("", "split of it", metavar="SPLIT")
    max_sequences: int | None = option(None, "rows of it (default: all)", least=1, metavar="N")
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

    def check(self) -> None:
        """Raise UserError for options of a recovery without one, or overrides it may not set."""
        if self.recover is None and (self.overrides or self.dense_continued):
            given = self.overrides[0] if self.overrides else "--dense-continued"
            raise UserError(f"{given} is for a recovery: give --recover RECIPE.toml")
        for name in map(option_name, self.overrides):
            if name in SET_BY_SWEEP:
                raise UserError(f"--{name} is the sweep's to set for each point: leave it out")

    @property
    def folder(self) -> SweepFolder:
        return SweepFolder(self.out)

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """The models to make, for each method, ratio and seed; raises UserError for a bad word."""
        space = "key" if self.budget.space is None else self.budget.space
        return points(self.methods, self.ratios, space, self.seeds)

    @property
    def names(self) -> list[str]:
        """The names of all that is measured, as in file names, controls first."""
        controls = [DENSE, CONTINUED] if self.dense_continued else [DENSE]
        return [*controls, *(point.file_name for point in self.points)]

    @property
    def needing(self) -> tuple[str, ...]:
        """The methods that need statistics, each once."""
        methods = dict.fromkeys(point.words[1] for point in self.points)
        return tuple(name for name in methods if METHODS[name].needs)

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
        )

    @property
    def recovery(self) -> Recovery | None:
        """How pruned models are trained on; None if they are not."""
        return None if self.recover is None else Recovery(self.recover, self.overrides)
