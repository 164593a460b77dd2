"""What `slimstate eval` measures on each of its models: perplexity, fidelity and tasks."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from flame.checkpoint.foreign import GIVEN, GivenFiles
from flame.checkpoint.reference import ModelReference, resolve
from flame.errors import UserError
from flame.options import group, option
from flame.options.shared import DTYPE_HELP, DType
from flame.versions import versions
from launch.evaluation.heldout_text import HeldoutOptions, tokenizer_name
from launch.evaluation.results_file import IDENTITY, SETTINGS, Record, ResultsFile, identity
from launch.evaluation.same_text import same_text
from launch.evaluation.stored_states import STORED_STATES, StateOptions
from launch.lm.tasks import TaskOptions, evaluate_tasks, load_tasks

if TYPE_CHECKING:
    import torch

    from launch.lm.network import Network


@dataclass(frozen=True)
class Measures:
    """What is measured, and how the models are run."""

    perplexity: str | None = option(
        None,
        "held-out perplexity on DATA: hub name, file or folder (default: the recipe's)",
        metavar="DATA",
        bare="",
    )
    tasks: TaskOptions = group(TaskOptions)
    against: str = option("", "KL and top-1 agreement with MODEL", metavar="MODEL")
    rows: HeldoutOptions = group(HeldoutOptions, without=("data",))
    """How the text of `perplexity` and `against` is read."""
    dtype: DType = option("auto", DTYPE_HELP)
    states: StateOptions = group(StateOptions)
    batch: int = option(32, "sequences of tasks a pass, at most", least=1, metavar="N")
    max_length: int | None = option(
        None, "tokens that tasks show the model at once", least=1, metavar="N"
    )
    placement: Literal["auto", "whole", "sharded"] = option(
        "auto", "the model on each process whole, or sharded over all; auto is whole where it fits"
    )
    given: GivenFiles = group(GivenFiles, GIVEN)

    @property
    def text(self) -> HeldoutOptions:
        """The held-out text of `perplexity` and `against`."""
        return dataclasses.replace(self.rows, data=self.perplexity or "")

    @property
    def reads_text(self) -> bool:
        """Whether held-out text is read."""
        return self.perplexity is not None or bool(self.against)

    def settings(self, references: Mapping[str, ModelReference]) -> dict[str, Any]:
        """What results depend on besides the model: two calls that agree in it can be joined.

        Args:
            references: the models by name; UserError if they would not read the same text.
        """
        return {
            "perplexity": self.perplexity is not None,
            "against": identity(resolve(self.against, given=self.given)) if self.against else None,
            "text": same_text(references, self.text).facts() if self.reads_text else None,
            "tokenizer": self.text.tokenizer,
            "tasks": self.tasks.record() if self.tasks.tasks else None,
            "dtype": self.dtype,
            STORED_STATES: self.states.record(),
            "max_length": self.max_length,
        }


def evaluate_models(
    models: Sequence[str], measures: Measures, results: ResultsFile
) -> dict[str, Record]:
    """The records of `models`; those that `results` holds are not measured again. Collective.

    Rank 0 keeps each model's record in `results` as soon as it is there.
    """
    from flame.process.distributed import from_rank_zero, rank

    references = {name: resolve(name, given=measures.given) for name in models}
    bench = _Bench(measures, references)
    records: dict[str, Record] = {}
    for name, reference in references.items():
        done = from_rank_zero(results.done(name, reference) if rank() == 0 else None)
        records[name] = done or bench.record(name, reference)
        _check_as_many_tokens(records)
        if rank() == 0 and not done:
            results.add(name, records[name])
    return records


def _check_as_many_tokens(records: Mapping[str, Record]) -> None:
    """Raise UserError if the last of `records` was measured on other tokens than the first."""
    counts = {name: (r["tokens"], r["bytes"]) for name, r in records.items() if "tokens" in r}
    if len(set(counts.values())) > 1:
        (first, one), *_, (last, other) = counts.items()
        raise UserError(
            f"{first} predicted {one[0]:,} tokens of {one[1]:,} bytes and {last} {other[0]:,} of "
            f"{other[1]:,}: their tokenizers differ, so evaluate them apart"
        )


class _Bench:
    """What all models share: text, tasks with their data, and the model to compare with."""

    def __init__(self, measures: Measures, references: Mapping[str, ModelReference]) -> None:
        from flame.process.distributed import compute_dtype

        self.measures = measures
        self.settings = measures.settings(references)
        self.text = same_text(references, measures.text) if measures.reads_text else None
        self.dtype = compute_dtype(measures.dtype)
        self._tasks: dict[str, Any] | None = None
        self._against: tuple[ModelReference, Network] | None = None

    def record(self, name: str, reference: ModelReference) -> Record:
        """Everything that is asked for of one model. Collective."""
        network = self._network(reference)
        with self.measures.states.applied(network.model, reference):
            record = {
                "model": name,
                **self._perplexity(name, reference, network),
                **self._fidelity(name, reference, network),
                **self._scores(reference, network),
            }
        return {
            **record,
            **_description(reference, network, self.measures.states),
            SETTINGS: self.settings,
            IDENTITY: identity(reference),
        }

    def _network(self, reference: ModelReference) -> "Network":
        from launch.lm.network import load_network

        return load_network(reference, self.dtype, self.measures.placement)

    def _perplexity(self, name: str, reference: ModelReference, network: "Network") -> Record:
        if self.measures.perplexity is None or self.text is None:
            return {}
        from launch.evaluation.perplexity import measure_perplexity

        text, apart = self.text.by_model[name], self.text.apart
        return measure_perplexity(network.model, reference, text, self.dtype, name, apart).record()

    def _fidelity(self, name: str, reference: ModelReference, network: "Network") -> Record:
        if not self.measures.against or self.text is None:
            return {}
        from launch.evaluation.fidelity import measure_fidelity

        if self._against is None:
            dense = resolve(self.measures.against, given=self.measures.given)
            self._against = dense, self._network(dense)
        dense, theirs = self._against
        text = self.text.by_model[name]
        found = measure_fidelity(
            network.model, theirs.model, reference, dense, text, _name(self.dtype)
        )
        return {"fidelity": found.record()}

    def _scores(self, reference: ModelReference, network: "Network") -> Record:
        options = self.measures.tasks
        if not options.tasks:
            return {}
        from flame.checkpoint.fingerprint import check_finite
        from flame.data.tokenizer import load_tokenizer
        from launch.lm.finite import NotFiniteError
        from launch.lm.model import SlimstateLM

        tokenizer = load_tokenizer(tokenizer_name(reference, self.measures.text.tokenizer))
        lm = SlimstateLM(network, tokenizer, self.measures.max_length, self.measures.batch)
        try:
            return {"tasks": evaluate_tasks(lm, self._loaded(options), options.limit)}
        except NotFiniteError as error:
            check_finite(reference.source())
            raise UserError(f"{reference.weights}: {error}") from error

    def _loaded(self, options: TaskOptions) -> dict[str, Any]:
        """The tasks, read once; rank 0 is first, so that data is fetched and cached once."""
        from flame.process.distributed import barrier, rank

        if self._tasks is None:
            if rank() == 0:
                self._tasks = loaded_tasks(options)
            barrier()
            self._tasks = self._tasks or loaded_tasks(options)
        return self._tasks


@cache
def loaded_tasks(options: TaskOptions) -> dict[str, Any]:
    """`load_tasks`, once a process: checking loads them too, to refuse data that is missing."""
    return load_tasks(options)


def _description(reference: ModelReference, network: "Network", states: StateOptions) -> Record:
    from flame.checkpoint.fingerprint import fingerprint
    from flame.model import count_parameters
    from flame.process.distributed import world_size
    from flame.process.peers import on_first
    from pruning.adapters import state_bytes

    return {
        "weights": str(reference.weights),
        # Tells whose these figures are where the folder was moved.
        "fingerprint": on_first(lambda: fingerprint(reference.config, reference.source())),
        "parameters": count_parameters(network.model.parameters()),
        "state_bytes": state_bytes(reference.config, states.storage),
        STORED_STATES: states.record(),
        "dtype": _name(network.dtype),
        "sharded": network.sharded,
        "world_size": world_size(),
        "versions": versions(),
    }


def _name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")
