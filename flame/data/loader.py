"""Batches of packed documents in an order that does not depend on the number of processes.

Sequence n of the run comes from virtual shard n mod V; rank r of W takes the sequences n with
n mod W = r, so W divides V and a rank owns whole shards. Step s holds the sequences from s·G to
(s + 1)·G − 1, whatever W and the accumulation count are. Of several sources n also says which one
the sequence comes from (`flame.data.mixing`). A rank's state is a cursor per shard and source; the
states of all ranks together resume at any W that divides V.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

from flame.data.config import DataConfig
from flame.data.loader_checks import check_order, check_shards
from flame.data.mixing import part_of, parts_of
from flame.data.mqar import answers_of
from flame.data.packing import Batch, Cursor, Packer, Row, plain_batch, shard_packer, varlen_batch
from flame.data.sources import Documents
from flame.data.tokenizer import Encoder
from flame.errors import UserError

FORMAT = 1
MIXTURE = {"sources", "weights"}
"""Keys of a state of several sources."""
PREFETCH = 4
"""Batches made ahead of the consumer."""

State = dict[str, Any]
Cursors = tuple[Cursor, ...]
Packers = list[Packer]
"""Of one virtual shard, one for each source."""


def alone(ready: bool) -> bool:
    """The agreement of a single process."""
    return ready


class PackedLoader:
    """Iterates over the batches of one rank.

    With `config.varlen` a batch is `({"input": [1, B·T], "cu_seqlens": [n + 1]}, labels [1, B·T])`,
    otherwise `({"input": [B, T]}, labels [B, T])`; all int64. A thread tokenises ahead; what goes
    wrong there is raised here. Going over a loader again goes on where it stands.

    Args:
        documents: from `build_documents`.
        tokenizer: from `load_tokenizer`.
        config: the recipe's `[data]`.
        seq_len: T.
        local_batch_size: B, sequences a batch.
        rank: this process among the `world_size` that share the data.
        world_size: processes that share the data.
        agree: for data that end (`repeat` off) in several processes: called at every batch with
            whether this rank has one; returns whether all have, so that they end together.
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
        agree: Callable[[bool], bool] = alone,
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
        self._agree = agree
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
        if not self._agree(result is not None):
            raise StopIteration
        self._pending.popleft()
        self._pending.append(self._submit())
        batch, self._sequence, self._cursors = result
        return batch

    def state_dict(self) -> State:
        """This rank's position after the last batch taken: JSON-able, a few numbers a shard."""
        shards = {str(shard): _written(cursors) for shard, cursors in self._cursors.items()}
        position = {"next_sequence": self._sequence, "shards": shards}
        return {"format": FORMAT, **self._identity(), **position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the merged states of all ranks, of any world size."""
        _check_state(state, self._identity())
        self.close()
        first = state["next_sequence"]
        self._sequence = first + (self.rank - first) % self.world_size
        self._cursors = {shard: _read(state["shards"][str(shard)]) for shard in self._cursors}

    @staticmethod
    def merge_states(states: Sequence[State]) -> State:
        """See `merge_states` of this module."""
        return merge_states(states)

    def close(self) -> None:
        """Stop the thread; the loader can be used again and goes on after the last batch taken."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None
        self._pending.clear()

    def _identity(self) -> State:
        """What fixes the order of the data: a state resumes only where all of it is the same."""
        return {
            "virtual_shards": self.config.virtual_shards,
            "shuffle": self.config.shuffle,
            "seed": self.config.seed,
            "documents": self.documents.size,
            **self._mixture(),
        }

    def _mixture(self) -> State:
        """What fixes the order of several sources beside what fixes that of one."""
        parts = parts_of(self.documents)
        if len(parts) == 1:
            return {}
        return {
            "sources": [[part.name, part.size] for part in parts],
            "weights": list(self.documents.weights),  # type: ignore[attr-defined]
        }

    def _start(self) -> None:
        packers = {shard: self._packers(shard, here) for shard, here in self._cursors.items()}
        collate = varlen_batch if self.config.varlen else plain_batch
        part = partial(part_of, self.documents)
        rows = _rows(packers, part, self._sequence, self.world_size, self.seq_len)
        whole = partial(collate, predicted=self._predicted)
        self._batches = _batches(rows, packers, self.local_batch_size, whole)
        self._pool = ThreadPoolExecutor(1, "data")
        self._pending.extend(self._submit() for _ in range(PREFETCH))

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


def _written(cursors: Cursors) -> list[Any]:
    """A shard's cursors as JSON; of a single source the numbers alone."""
    numbers = [[cursor.epoch, cursor.document, cursor.token] for cursor in cursors]
    return numbers if len(numbers) > 1 else numbers[0]


def _read(numbers: list[Any]) -> Cursors:
    several = isinstance(numbers[0], list)
    return tuple(Cursor(*own) for own in (numbers if several else [numbers]))


def _rows(
    packers: dict[int, Packers], part: Callable[[int], int], first: int, stride: int, seq_len: int
) -> Iterator[tuple[Row, int]]:
    """Each next row of this rank with the number of the sequence after it; ends with a shard."""
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
    """Batches of `size` rows, each with the sequence and the cursors that follow it."""
    while len(group := list(islice(rows, size))) == size:
        cursors = {shard: tuple(packer.cursor for packer in own) for shard, own in packers.items()}
        yield collate([row for row, _ in group]), group[-1][1], cursors


def merge_states(states: Sequence[State]) -> State:
    """The states of all ranks, taken at the same step, as one that any world size resumes from."""
    merged = dict(states[0])
    merged["next_sequence"] = min(state["next_sequence"] for state in states)
    merged["shards"] = {}
    for state in states:
        merged["shards"].update(state["shards"])
    return merged


def _check_state(state: Mapping[str, Any], expected: State) -> None:
    if state.get("format") != FORMAT:
        raise UserError(
            f"the data position has format {state.get('format')!r}, this version reads {FORMAT}: "
            "resume with the version that saved it"
        )
    for key in [*expected, *sorted(MIXTURE & state.keys() - expected.keys())]:
        value = expected.get(key)
        if state.get(key) != value:
            name = "the number of documents" if key == "documents" else f"data.{key}"
            raise UserError(
                f"cannot resume: {name} is {value}, and was {state.get(key)} when the run was saved"
            )
    missing = [s for s in range(expected["virtual_shards"]) if str(s) not in state["shards"]]
    if missing:
        raise UserError(f"the data position lacks virtual shard {missing[0]}: merge all ranks'")
