"""Writing the files of a run folder that lie beside its checkpoints."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from flame.checkpoint.reference import CONFIG_FILE, RECIPE_FILE, TOKENIZER_CONFIG
from flame.data.sources import build_documents
from flame.process.atomic_output import made_folder, replacing_files
from flame.process.output_checks import is_marked_or_new, mark_as_made
from flame.recipe import recipe_text
from flame.recipe.paths import in_run_folder
from flame.recovery.adapter_scaling import used
from flame.recovery.recorded_models import record_base, record_teacher
from flame.run_folder.bound import RUN_FILE, write_record
from flame.run_folder.companions import copy_run_companions
from flame.run_folder.origin import model_config, tokenizer_of
from flame.storage.json_file import write_object

MERGED = "merged"
"""The folder in a LoRA run to which its model is written, merged."""


def prepare_run_folder(job: Any, documents: Any = None) -> None:
    """Write config, tokenizer, recipe and record of a run, and references to its base and teacher.

    Runs on rank 0; `documents` are its text, read anew if None. The base of a LoRA run and the
    teacher of a run that distils are recorded. All files are written before the first one is
    replaced, so an error while they are written leaves the folder as it was and removes a new one.
    They are then renamed one by one, the recipe first and the tokenizer's config last: a kill or
    error in between leaves new files beside old ones.
    """
    folder = Path(job.job.dump_folder)
    ours = is_marked_or_new(folder)
    config, tokenizer = model_config(job), tokenizer_of(job)
    # The recipe marks a folder as a run that may be gone on with; the other says that all is there.
    ends = {"first": RECIPE_FILE, "last": TOKENIZER_CONFIG}
    made = [job.checkpoint.folder, job.metrics.save_tb_folder, MERGED, job.comm.save_traces_folder]
    with made_folder(folder):
        if ours:
            mark_as_made(folder, made)
        if job.comm.trace_buf_size > 0:
            (folder / job.comm.save_traces_folder).mkdir(parents=True, exist_ok=True)
        with replacing_files(folder, **ends) as new:
            text = documents or build_documents(job.data, job.data.split)
            write_record(job, text, new / RUN_FILE)
            write_object(new / CONFIG_FILE, config, sort_keys=True)
            tokenizer.save_pretrained(new)
            copy_run_companions(job, new)
            (new / RECIPE_FILE).write_text(recipe_text(_lasting(job)))
            if job.lora.rank > 0:
                record_base(job, new, config)
            if job.distill.teacher:
                record_teacher(job.distill.teacher, folder, new)
            if ours:
                mark_as_made(folder, [*made, *os.listdir(new)])


def _lasting(job: Any) -> Any:
    """Return `job` as it will be gone on with.

    The step to go on from, which holds for one start, is left out; the adapters' scale is the one
    that is used, which may be that of `lora.init`, and paths are as a run folder names them.
    """
    checkpoint = replace(job.checkpoint, load_step=-1)
    lasting = replace(job, checkpoint=checkpoint, lora=used(job.lora))
    return in_run_folder(lasting, Path(job.job.dump_folder))
