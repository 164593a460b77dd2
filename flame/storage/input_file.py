"""Reading files that somebody else made: regular files only, and no further than they go."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flame.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 8 << 20
"""Bytes that are read at a time."""

READ_AHEAD = 32 << 20
"""Bytes that the operating system may read ahead."""


@contextmanager
def opened(path: Path, missing: str = "") -> Iterator[int]:
    """Open a regular file for reading, and give its descriptor.

    Pipes and devices are refused without waiting for them.

    Args:
        path: the file; a link is followed.
        missing: the whole message for a file that does not exist.

    Raises:
        UserError: it is missing, unreadable or no regular file; an `OSError` of the block too.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"cannot read {path}: it is not a regular file")
            yield descriptor
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise UserError(missing or f"cannot read {path}: {error.strerror}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"cannot read {str(path)!r}: {error}") from error


def read_into(descriptor: int, path: Path, offset: int, target: "Tensor") -> memoryview:
    """Fill a contiguous CPU tensor with the bytes of a file from `offset` on.

    Afterwards the operating system is asked to read ahead, as what follows is likely to be next.

    Args:
        descriptor: file descriptor of the open file.
        path: the file's name, for messages.

    Returns:
        The bytes of the tensor.

    Raises:
        UserError: the file ends before the tensor does, or cannot be read.
    """
    import torch

    view = memoryview(target.detach().view(-1).view(torch.uint8).numpy())
    done = 0
    while done < len(view):
        try:
            size = os.preadv(descriptor, [view[done : done + BLOCK]], offset + done)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if size == 0:
            raise UserError(f"cannot read {path}: it ends too early; copy it again")
        done += size
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset + done, READ_AHEAD, os.POSIX_FADV_WILLNEED)
    return view
