"""Measuring a model as an engine runs it that keeps recurrent states in fewer bits.

`pruning.states.storing` says what is computed, `kernels.stored_states` how numbers are rounded.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flame.checkpoint.reference import ModelReference
from flame.errors import UserError
from flame.options import option
from flame.options.shared import StoredAs

if TYPE_CHECKING:
    from torch import nn

    from kernels.stored_states import StateStorage

SCALED = ("float8", "int8")
"""Dtypes that are stored with scales, and whose rounding error can be kept."""


STORED_STATES = "stored_states"
"""Where a model's record says how its states were stored; None or absent if they were not."""


@dataclass(frozen=True)
class StateOptions:
    """How recurrent states are stored between tokens."""

    state_dtype: StoredAs | None = option(
        None,
        "store recurrent states so after each token, as an engine that decodes; runs token by "
        "token (default: the operator's own states, never rounded)",
    )
    state_scales: Literal["row", "tile"] = option(
        "row",
        "float32 scales of float8 and int8 states: one a value channel (vLLM), or one for 32 of "
        "them (SGLang)",
    )
    error_feedback: Literal["int4", "float16"] | None = option(
        None,
        "keep the rounding error of float8 and int8 states for the next rounding, in this dtype "
        "(int4 where none is given)",
        bare="int4",
    )

    @property
    def storage(self) -> "StateStorage | None":
        """The format; None where states are not stored between tokens."""
        if self.state_dtype is None:
            return None
        from kernels.stored_states import StateStorage

        return StateStorage(self.state_dtype, self.state_scales, self.error_feedback)

    def check(self, references: Iterable[ModelReference]) -> None:
        """Raise UserError for options without sense, or a model whose states are not known."""
        if self.state_dtype not in SCALED:
            for flag, given in (
                ("--error-feedback", self.error_feedback is not None),
                ("--state-scales", self.state_scales != "row"),
            ):
                if given:
                    held = f"not {self.state_dtype}" if self.state_dtype else "give one"
                    raise UserError(f"{flag} is for --state-dtype {' or '.join(SCALED)}, {held}")
        for reference in references if self.state_dtype else ():
            from pruning.adapters import ADAPTERS

            if reference.config["model_type"] not in ADAPTERS:
                raise UserError(
                    f"{reference.folder} is of {reference.config['model_type']!r}: --state-dtype "
                    f"needs a family whose states are known, {', '.join(ADAPTERS)}"
                )

    def check_tasks(self, tasks: dict[str, Any]) -> None:
        """Raise UserError if a task generates text, which loses what error feedback keeps."""
        for name, task in tasks["tasks"].items() if self.error_feedback else ():
            if task.OUTPUT_TYPE == "generate_until":
                raise UserError(
                    f"task {name} generates text: --error-feedback is for tasks that score given "
                    "text, since a model's cache has no place for the kept errors"
                )

    def record(self) -> dict[str, Any] | None:
        """The format for JSON; None where states are not stored between tokens."""
        if self.state_dtype is None:
            return None
        return {
            "dtype": self.state_dtype,
            "scales": self.state_scales if self.state_dtype in SCALED else None,
            "error_feedback": self.error_feedback,
        }

    def text(self) -> str:
        """The format in words; empty where states are not stored between tokens."""
        return "" if self.state_dtype is None else storage_text(self.record() or {})

    @contextmanager
    def applied(self, model: "nn.Module", reference: ModelReference) -> Iterator[None]:
        """Let `model` of `reference` store its states so while the context is open."""
        storage = self.storage
        if storage is None:
            yield
            return
        from pruning.adapters import ADAPTERS
        from pruning.states.storing import storing_states

        with storing_states(model, ADAPTERS[reference.config["model_type"]], storage):
            yield


def storage_text(record: dict[str, Any]) -> str:
    """What `StateOptions.record` gave, in words: `int8, a scale a row, int4 error feedback`."""
    parts = [record["dtype"]]
    if record.get("scales"):
        parts.append(f"a scale a {record['scales']}")
    if record.get("error_feedback"):
        parts.append(f"{record['error_feedback']} error feedback")
    return ", ".join(parts)
