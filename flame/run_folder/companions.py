"""What a new run folder takes over from the model and the tokenizer that it starts from."""

from pathlib import Path
from typing import Any

from flame.checkpoint.reference import TOKENIZER_CONFIG
from flame.hugging_face.companions import copy_companions, copy_tokenizer
from flame.run_folder.origin import steps_done
from flame.run_folder.start_model import start_model


def copy_run_companions(job: Any, into: Path) -> None:
    """Copy tokenizer files as they are, and what else belongs to `model.init`, into `into`.

    The tokenizer is the run's own, that of `data.tokenizer` or that of `model.init`, in this order.
    A run that goes on has the other files already.

    Args:
        job: the job; its run folder may not be there yet.
        into: a folder in which the tokenizer was saved.
    """
    run, given = Path(job.job.dump_folder), Path(job.data.tokenizer).expanduser()
    goes_on = steps_done(job) is not None and (run / TOKENIZER_CONFIG).is_file()
    start = start_model(job) if job.model.init and not goes_on else None
    if goes_on:
        copy_tokenizer(run, into)
    elif job.data.tokenizer and given.exists():
        copy_tokenizer(given if given.is_dir() else given.parent, into)
    elif not job.data.tokenizer and start is not None and start.tokenizer is not None:
        copy_tokenizer(start.tokenizer, into)
    if start is not None and not start.unverified:
        copy_companions(start.folder, into, with_tokenizer=False)
