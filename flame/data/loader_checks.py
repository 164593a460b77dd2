"""Checks before work starts: can the data be dealt out to the processes, and is it enough."""

from typing import Any

from flame.data.config import DataConfig
from flame.data.documents import Documents
from flame.data.mixing import part_of, parts_of
from flame.data.packing import shard_packer
from flame.data.tokenizer import Encoder
from flame.errors import UserError


def check_order(
    virtual_shards: int,
    world_size: int,
    global_batch_size: int | None = None,
    local_batch_size: int = 1,
) -> None:
    """Raise `UserError` if virtual shards or batches cannot be dealt out evenly to processes."""
    if virtual_shards < 1:
        raise UserError(f"data.virtual_shards is {virtual_shards}: it must be above 0")
    if world_size > virtual_shards:
        raise UserError(
            f"more processes than virtual shards: {world_size} processes share "
            f"{virtual_shards} shards; start fewer, or set data.virtual_shards before training"
        )
    if virtual_shards % world_size:
        raise UserError(
            f"{world_size} processes do not divide {virtual_shards} virtual shards: "
            "start a divisor of it, or set data.virtual_shards before training"
        )
    if global_batch_size is not None and global_batch_size % (world_size * local_batch_size):
        raise UserError(
            f"a global batch of {global_batch_size} is no multiple of {local_batch_size} sequences "
            f"on {world_size} processes: change global_batch_size or local_batch_size"
        )


def check_enough(
    documents: Documents, tokenizer: Any, config: DataConfig, seq_len: int, global_batch_size: int
) -> None:
    """Raise `UserError` if one epoch is shorter than one global batch.

    Each set of a mix must have the rows that it gives to the batch, and as many documents as there
    are virtual shards (`check_shards`). Documents are tokenised until there are enough. Virtual
    shards are counted one by one only if the data does not repeat and is no stream, which would
    have to be opened once for each; otherwise the tokens of all shards are counted together.

    Args:
        seq_len: input tokens of a row.
        global_batch_size: rows that all processes take in one step.
    """
    encoder = Encoder(tokenizer, config.add_eos)
    check_shards(documents, config.virtual_shards)
    for number, part in enumerate(parts_of(documents)):
        wanted = [n for n in range(global_batch_size) if part_of(documents, n) == number]
        if config.repeat or part.size is None:
            _check_tokens(part, encoder, seq_len, len(wanted))
        else:
            _check_rows(part, encoder, config.virtual_shards, seq_len, wanted)


def _check_tokens(documents: Documents, encoder: Encoder, seq_len: int, batch: int) -> None:
    found, needed = 0, batch * seq_len + 1
    for tokens in encoder.stream(documents.shard(0, 1, 0, 0)):
        found += tokens.size
        if found >= needed:
            return
    if found == 0:
        raise UserError(f"{documents.name} has no text: all its documents are empty")
    raise _too_short(documents, f"{found} tokens, and one takes {needed}", batch, seq_len)


def _check_rows(
    documents: Documents, encoder: Encoder, num_shards: int, seq_len: int, sequences: list[int]
) -> None:
    for shard in sorted({sequence % num_shards for sequence in sequences}):
        packer = shard_packer(documents, encoder, shard, num_shards, epochs=1)
        needed = sum(sequence % num_shards == shard for sequence in sequences)
        found = sum(packer.row(seq_len) is not None for _ in range(needed))
        if found < needed:
            text = f"virtual shard {shard} of {num_shards} has {found} sequences, not {needed}"
            raise _too_short(documents, text, len(sequences), seq_len)


class TooShortError(UserError):
    """The data has fewer sequences than a step needs; `found` says how many, in words."""

    def __init__(self, message: str, found: str) -> None:
        super().__init__(message)
        self.found = found


def _too_short(documents: Documents, found: str, batch: int, seq_len: int) -> TooShortError:
    return TooShortError(
        f"{documents.name} is shorter than one global batch of {batch} sequences of {seq_len} "
        f"tokens: {found}; give more text, or a smaller batch or seq_len",
        f"in {documents.name}, {found}",
    )


def check_shards(documents: Documents, virtual_shards: int) -> None:
    """Raise `UserError` if there are fewer documents than virtual shards."""
    for part in parts_of(documents):
        if part.size is not None and part.size < virtual_shards:
            raise UserError(
                f"{part.name} has {part.size} documents, fewer than {virtual_shards} virtual "
                "shards: give more, or a smaller data.virtual_shards"
            )
