"""The options of `--repair layer`."""

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from flame.errors import UserError
from flame.options import option, words

GIB = 1 << 30


@dataclass(frozen=True)
class LayerOptions:
    """How each pruned layer is trained by itself to give the dense layer's output."""

    repair_steps: int = option(200, "optimizer steps on each layer", least=1, metavar="N")
    repair_lr: float = option(
        0.01,
        "largest change of a tensor in a step, as a part of its root mean square",
        above=0,
        most=1,
        metavar="LR",
    )
    repair_batch: int = option(
        1,
        "sequences in each step; those of a step are shared by the processes",
        least=1,
        metavar="N",
    )
    repair_heldout: float = option(
        0.125,
        "part of the sequences that is not trained on, and decides what is kept",
        above=0,
        below=1,
        metavar="F",
    )
    repair_memory: float = option(
        8.0, "GiB of hidden states that a process holds; more are on disk", least=0, metavar="GIB"
    )
    repair_folder: Path | None = option(
        None, "keep finished layers here, for a repair that is killed, and states that go to disk"
    )

    @property
    def bound(self) -> int:
        """Bytes of hidden states that a process holds in memory."""
        return int(self.repair_memory * GIB)

    def check(self, repair: str | None, sequences: int) -> None:
        """Raise UserError for options without `--repair layer`, or too few sequences for it."""
        if repair == "layer":
            self.trained_on(sequences)
            return
        for word in words(self):
            raise UserError(f"{word} is for --repair layer: give it, or leave it out")

    def trained_on(self, sequences: int) -> int:
        """How many of the sequences, the first ones, are trained on; the others are held out.

        Raises:
            UserError: none is left for one of the two.
        """
        held_out = ceil(sequences * self.repair_heldout)
        if not 0 < held_out < sequences:
            raise UserError(
                f"--repair layer trains on some sequences and holds others out: --repair-heldout "
                f"{self.repair_heldout} of --sequences {sequences} leaves none to train on"
            )
        return sequences - held_out

    def record(self) -> dict[str, Any]:
        """What a plan records: all that the result depends on."""
        return {
            "batch": self.repair_batch,
            "heldout": self.repair_heldout,
            "lr": self.repair_lr,
            "steps": self.repair_steps,
        }
