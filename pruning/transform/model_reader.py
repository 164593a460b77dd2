"""A model as the transform reads it: its tensors, and what else a training step holds."""

from pathlib import Path
from typing import Any

from torch import Tensor

from flame.checkpoint.convert import Read
from flame.checkpoint.dcp_source import DcpSource
from flame.checkpoint.reference import ModelReference
from flame.checkpoint.source import TensorSource
from flame.errors import UserError
from flame.storage.checksums import METADATA, check_file, read_checksums


class ModelReader:
    """The tensors of a model reference and, of a run that trains the model itself, its state.

    Files of a step are hashed while they are read; `finish` compares the hashes.

    Args:
        reference: the model.
        training_state: whether to read the optimizer's tensors and the other entries too.
        sampled: whether only a few rows of each tensor will be read: nothing is hashed then until
            `finish`.
    """

    def __init__(
        self, reference: ModelReference, training_state: bool, sampled: bool = False
    ) -> None:
        hashed = not (reference.is_lora or reference.unverified)
        step = reference.step_folder if hashed else None
        self.state: DcpSource | None = None
        """The step with its training state; None where there is none, or it was not asked for."""
        self._step: DcpSource | None = None
        if step is not None:
            self._step = DcpSource(step, training_state, "never" if sampled else "along")
            self.state = self._step if training_state else None
        self.source: TensorSource = self._step or reference.source()

    def finish(self) -> None:
        """Raise UserError if a file of the step is damaged; other forms have no recorded hashes."""
        if self._step is not None:
            self._step.finish()

    def values(self) -> dict[str, Any]:
        """The entries of the step that are no tensors: step, schedules, counters."""
        assert self.state is not None
        try:
            return self.state.values()
        except UserError:
            self.finish()
            raise

    def explained(self, read: Read) -> Read:
        """`read`, but that a damaged file is named first where a tensor is refused."""

        def explained(name: str) -> Tensor:
            try:
                return read(name)
            except UserError:
                self.finish()
                raise

        return explained


def small_files(step: Path) -> dict[str, bytes]:
    """The files of a step that are not DCP's, checked: the loader's state."""
    hashes = read_checksums(step)
    names = [name for name in hashes if name != METADATA and not name.endswith(".distcp")]
    for name in names:
        check_file(step, name, hashes)
    return {name: (step / name).read_bytes() for name in names}
