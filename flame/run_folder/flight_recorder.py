"""NCCL's flight recorder: the last collectives of each rank, written out when one times out."""

import os
from pathlib import Path
from typing import Any

SIZE = "TORCH_FR_BUFFER_SIZE"
FILES = "TORCH_FR_DUMP_TEMP_FILE"


def flight_recorder(job: Any) -> dict[str, str]:
    """Return the environment variables that make NCCL record as section `[comm]` of `job` says.

    They must be set when the process group starts. Variables that are set already win: none of
    theirs is returned. The files are named after the prefix and the rank.
    """
    comm = job.comm
    wanted = {SIZE: str(comm.trace_buf_size)}
    if comm.trace_buf_size > 0:
        folder = Path(job.job.dump_folder).absolute() / comm.save_traces_folder
        wanted |= {
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            # The recorder cannot write once the watchdog aborts collectives: 3 lets it finish.
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
            FILES: str(folder / comm.save_traces_file_prefix),
        }
    return {name: value for name, value in wanted.items() if name not in os.environ}
