"""The model that a training job starts from."""

from pathlib import Path
from typing import Any

from flame.checkpoint.foreign import GivenFiles
from flame.checkpoint.reference import ModelReference, resolve


def start_model(job: Any) -> ModelReference:
    """Return `model.init`, found.

    For a DCP step of torchtitan or flame, `model.config` and `data.tokenizer` say what is missing
    beside it. Raises `UserError` as `resolve` does.
    """
    config, tokenizer = (
        Path(name).expanduser() if name else None for name in (job.model.config, job.data.tokenizer)
    )
    return resolve(job.model.init, given=GivenFiles(config, tokenizer))
