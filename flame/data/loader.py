"""Batches of packed documents in an order that does not depend on the number of processes.

With V virtual shards, sequence n of the run comes from shard n mod V. Rank r of W takes the
sequences n with n mod W = r; W divides V, so a rank owns whole shards. With G sequences in a global
batch, step s holds the sequences from s·G to (s + 1)·G − 1, whatever W and the accumulation count
are. With several sources, n also says which of them the sequence comes from (`flame.data.mixing`).
A rank's state is a cursor per shard and source; merged, the states of all ranks resume at any W
that divides V.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

from flame.data.config import DataConfig
from flame.data.documents import Documents
from flame.data.files.dealt import DealtDocuments
from flame.data.loader_checks import check_order, check_shards
from flame.data.loader_state import (
    FORMAT,
    Cursors,
    State,
    check_state,
    read_cursors,
    written_cursors,
)
from flame.data.mixing import part_of, parts_of
from flame.data.mqar_tokens import answers_of
from flame.data.packing import Batch, Cursor, Packer, Row, plain_batch, shard_packer, varlen_batch
from flame.data.position import check_position
from flame.data.tokenizer import Encoder

PREFETCH = 4
"""Batches made ahead of the consumer, at least."""

Position = tuple[int, dict[int, Cursors]]
"""The next sequence of a rank, and where each of its virtual shards stands."""
Packers = list[Packer]
"""The packers of one virtual shard, one for each source."""


class PackedLoader:
    """Iterates over the batches of one rank; iterating again continues where it stands.

    With `config.varlen` a batch is `({"input": [1, B·T], "cu_seqlens": [n + 1]}, labels [1, B·T])`,
    otherwise `({"input": [B, T]}, labels [B, T])`; all are int64. A thread tokenises ahead, and its
    errors are raised by `next`.

    Args:
        documents: from `build_documents`.
        tokenizer: from `load_tokenizer`.
        config: the recipe's `[data]`.
        seq_len: T, tokens in a sequence.
        local_batch_size: B, sequences in a batch.
        rank: this process's number among the `world_size` that share the data.
        ahead: batches that the thread makes ahead of the consumer, at least `PREFETCH`.
        pin: whether batches lie in pinned memory, which a GPU copies from while the host goes on.

    Raises:
        UserError: the virtual shards cannot be dealt out evenly, or one has no document.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Any,
        config: DataConfig,
        seq_len: int,
        local_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        ahead: int = PREFETCH,
        pin: bool = False,
    ) -> None:
        check_order(config.virtual_shards, world_size)
        check_shards(documents, config.virtual_shards)
        self.documents = documents
        self.config = config
        self.seq_len = seq_len
        self.local_batch_size = local_batch_size
        self.rank = rank
        self.world_size = world_size
        self._encoder = Encoder(tokenizer, config.add_eos)
        self._predicted = answers_of(config.dataset, tokenizer)
        self._ahead = max(PREFETCH, ahead)
        self._pin = pin
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[Future] = deque()
        self._sequence = rank
        start = (Cursor(),) * len(parts_of(documents))
        self._cursors = {s: start for s in range(rank, config.virtual_shards, world_size)}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._pool is None:
            self._start()
        result = self._pending[0].result()
        if result is None:
            raise StopIteration
        self._pending.popleft()
        self._pending.append(self._submit())
        batch, self._sequence, self._cursors = result
        return batch

    def state_dict(self) -> State:
        """Return this rank's position after the last batch taken, as values that fit into JSON."""
        shards = {str(shard): written_cursors(cursors) for shard, cursors in self._cursors.items()}
        position = {"next_sequence": self._sequence, "shards": shards}
        return {"format": FORMAT, **self._identity(), **position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the merged states of all ranks, at any world size.

        Raises:
            UserError: the state is of other data, another order or another format.
        """
        check_state(state, self._identity())
        sizes = [part.size for part in parts_of(self.documents)]
        check_position(state, sizes, self.config.virtual_shards)
        self.close()
        first = state["next_sequence"]
        self._sequence = first + (self.rank - first) % self.world_size
        self._cursors = {
            shard: read_cursors(state["shards"][str(shard)]) for shard in self._cursors
        }

    @staticmethod
    def merge_states(states: Sequence[State]) -> State:
        """Merge the states of all ranks at one step into one that any world size resumes from."""
        shards = {shard: own for state in states for shard, own in state["shards"].items()}
        first = min(state["next_sequence"] for state in states)
        return {**states[0], "next_sequence": first, "shards": shards}

    @property
    def position(self) -> Position:
        """This rank's position after the last batch taken, to come back to with `rewind`."""
        return self._sequence, self._cursors

    def rewind(self, position: Position) -> None:
        """Continue from an earlier `position` of this loader."""
        self.close()
        self._sequence, self._cursors = position

    def close(self) -> None:
        """Stop the thread; the next use of the loader continues after the last batch taken."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None
        self._pending.clear()

    def _identity(self) -> State:
        """Return what fixes the order of the data; a state resumes only if all of it is equal."""
        identity: State = {
            "virtual_shards": self.config.virtual_shards,
            "shuffle": self.config.shuffle,
            "seed": self.config.seed,
            "documents": self.documents.size,
        }
        parts = parts_of(self.documents)
        layouts = [part.layout for part in parts if isinstance(part, DealtDocuments)]
        if layouts:
            identity["layout"] = layouts
        if len(parts) > 1:
            identity["sources"] = [[part.name, part.size] for part in parts]
            identity["weights"] = list(self.documents.weights)  # type: ignore[attr-defined]
        return identity

    def _start(self) -> None:
        packers = {shard: self._packers(shard, here) for shard, here in self._cursors.items()}
        collate = varlen_batch if self.config.varlen else plain_batch
        part = partial(part_of, self.documents)
        rows = _rows(packers, part, self._sequence, self.world_size, self.seq_len)
        # Not a closure over this loader, whom the thread would keep alive.
        whole: Callable[[list[Row]], Batch] = partial(collate, predicted=self._predicted)
        if self._pin:
            whole = partial(_pinned, whole)
        self._batches = _batches(rows, packers, self.local_batch_size, whole)
        self._pool = ThreadPoolExecutor(1, "data")
        self._pending.extend(self._submit() for _ in range(self._ahead))

    def _packers(self, shard: int, cursors: Cursors) -> Packers:
        epochs = None if self.config.repeat else 1
        num_shards = self.config.virtual_shards
        return [
            shard_packer(part, self._encoder, shard, num_shards, epochs=epochs, cursor=cursor)
            for part, cursor in zip(parts_of(self.documents), cursors, strict=True)
        ]

    def _submit(self) -> Future:
        assert self._pool is not None
        return self._pool.submit(next, self._batches, None)


def _rows(
    packers: dict[int, Packers], part: Callable[[int], int], first: int, stride: int, seq_len: int
) -> Iterator[tuple[Row, int]]:
    """Yield this rank's rows, each with the number of the next sequence, until a shard ends."""
    sequence, num_shards = first, stride * len(packers)
    while (row := packers[sequence % num_shards][part(sequence)].row(seq_len)) is not None:
        sequence += stride
        yield row, sequence


def _batches(
    rows: Iterator[tuple[Row, int]],
    packers: dict[int, Packers],
    size: int,
    collate: Callable[[list[Row]], Batch],
) -> Iterator[tuple[Batch, int, dict[int, Cursors]]]:
    """Yield batches of `size` rows, each with the next sequence's number and the next cursors."""
    while len(group := list(islice(rows, size))) == size:
        cursors = {shard: tuple(packer.cursor for packer in own) for shard, own in packers.items()}
        yield collate([row for row, _ in group]), group[-1][1], cursors


def _pinned(collate: Callable[[list[Row]], Batch], group: list[Row]) -> Batch:
    inputs, labels = collate(group)
    return {name: value.pin_memory() for name, value in inputs.items()}, labels.pin_memory()
