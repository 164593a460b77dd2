"""The parts of `benchmarks/gpu.sh`: commands, and their sizes on a GPU and in a rehearsal."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """One command line of Python, beginning with `-m`, or `slimstate` and its words."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    output: Path | None = None
    """What it makes that later commands need; it runs again where that is gone."""

    @property
    def line(self) -> str:
        """As a person types it, and as results know it."""
        first, *rest = self.arguments
        words = ["slimstate", *rest] if first == SLIMSTATE else ["python", "-m", first, *rest]
        return " ".join([*(f"{k}={v}" for k, v in self.environment.items()), shlex.join(words)])

    def words(self, python: str) -> list[str]:
        return [python, "-m", *self.arguments]

    def is_made(self) -> bool:
        return self.output is None or self.output.exists()


@dataclass(frozen=True)
class Part:
    name: str
    title: str
    commands: Sequence[Command]


SLIMSTATE = "launch.cli"
FLA = {"SLIMSTATE_KERNELS": "fla"}
RECIPES = "launch/recipes"


@dataclass(frozen=True)
class Sizes:
    """What differs between a GPU and a rehearsal: words of command lines."""

    tests: str
    widths: str
    decode_step: str
    recipes: tuple[str, ...]
    """Pretraining recipes in `launch/recipes`; the first one's model is pruned and recovered."""

    config: str
    """Of a second model, which keeps its starting weights: a GPU may refuse to train it."""

    vocabulary: int
    training: str
    steps: int
    """Of the model that is pruned and recovered."""

    loss: str
    calibration: str
    bench: str
    recovery: str


ON_GPU = Sizes(
    tests="tests",
    widths="",
    decode_step="--widths 64 96 128",
    recipes=("delta_net_340M", "gated_deltanet_340M"),
    config="gated_deltanet_340M.json",
    vocabulary=16000,
    training="",
    steps=30,
    loss="",
    calibration="--sequences 128 --seq-len 2048",
    bench="--batch-sizes 1,16,64,256",
    recovery="--steps 20 --batch 16",
)
REHEARSAL = Sizes(
    tests="tests/kernels/test_gpu.py",
    widths="--tokens 128 --heads 2 --d-v 16 --widths 16 32 --dense 32 --batches 1 2 --rounds 1",
    decode_step="--widths 24 --batches 2",
    recipes=("demo_pretrain",),
    config="demo_config.json",
    vocabulary=512,
    training="--steps 8 --tokens 128 --seq-len 64 --local-batch-size 2 --only base",
    steps=2,
    loss="--vocabulary 512 --tokens 64 --width 16 --repeats 1",
    calibration="--sequences 2 --seq-len 64",
    bench="--batch-sizes 1 --lengths 32 --decode-length 2 --prompt-length 4 --repeats 1",
    recovery="--steps 6 --batch 4 --seq-len 64",
)


def parts(work: Path, rehearse: bool) -> list[Part]:
    """Return all parts in order.

    Args:
        work: folder of the models that the parts make and use.
        rehearse: the same commands at sizes that a CPU does in seconds.
    """
    sizes = REHEARSAL if rehearse else ON_GPU
    return [
        Part("machine", "Machine and versions", [script("gpu.machine")]),
        Part("tests", "Tests marked gpu", [_tests(sizes)]),
        Part("operators", "Operators by width", _operators(sizes)),
        Part("training", "Training", _training(sizes)),
        Part("loss", "Loss in chunks, and other ways", [script("losses", sizes.loss)]),
        Part("pruning", "Calibrate, prune, bench dense and pruned", _pruning(sizes, work)),
        Part("recovery", "Recovery with a teacher, interrupted", _recovery(sizes, work)),
    ]


def _tests(sizes: Sizes) -> Command:
    return Command(
        ("pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *shlex.split(sizes.tests))
    )


def _operators(sizes: Sizes) -> list[Command]:
    widths = script("operator_widths", sizes.widths)
    step = script("decode_step", sizes.decode_step)
    return [widths, replace(widths, environment=FLA), script("prefill"), step]


def _training(sizes: Sizes) -> list[Command]:
    vocabulary = f"--vocabulary {sizes.vocabulary}"
    return [
        *(
            script("train_speed", f"--recipe {RECIPES}/{recipe}.toml {vocabulary} {sizes.training}")
            for recipe in sizes.recipes
        ),
        script("train_overhead", "--nproc 1 --steps 4 --rounds 2"),
    ]


def _pruning(sizes: Sizes, work: Path) -> list[Command]:
    """A model trained for some steps, and one with its starting weights, each beside its half."""
    tokenizer, trained, random = work / "tokenizer", work / "trained", work / "random"
    recipe = f"{RECIPES}/{sizes.recipes[0]}.toml"
    text = f"--data python-stdlib --tokenizer {tokenizer} {sizes.calibration}"
    commands = [
        slimstate(f"tokenizer {tokenizer} --size {sizes.vocabulary}", tokenizer),
        slimstate(
            f"train --config {recipe} --job.dump_folder {trained} --data.dataset python-stdlib"
            f" --data.no-streaming --data.tokenizer {tokenizer} --training.steps {sizes.steps}"
            f" --training.global_batch_size 32",
            trained,
        ),
        script("gpu.random_model", f"{RECIPES}/{sizes.config} {random}", random),
    ]
    for dense, methods, measures in (
        (trained, "drrqr,taylor", "prefill,decode,mixer,train"),
        (random, "drrqr", "prefill,decode"),
    ):
        pruned, stats = half(dense), dense.with_name(f"{dense.name}-statistics")
        commands += [
            slimstate(f"calibrate {dense} {stats} --methods {methods} {text}", stats),
            slimstate(f"prune {dense} {pruned} --method drrqr --ratio 0.5 --stats {stats}", pruned),
            slimstate(f"bench {pruned} --against {dense} --measure {measures} {sizes.bench}"),
        ]
    return commands


def _recovery(sizes: Sizes, work: Path) -> list[Command]:
    dense = work / "trained"
    return [script("interrupted_recovery", f"{dense} {half(dense)} {sizes.recovery}")]


def half(dense: Path) -> Path:
    """Where the model with half the key channels lies."""
    return dense.with_name(f"{dense.name}-half")


def script(name: str, words: str = "", output: Path | None = None) -> Command:
    """A script of `benchmarks/`."""
    return Command((f"benchmarks.{name}", *shlex.split(words)), output=output)


def slimstate(words: str, output: Path | None = None) -> Command:
    return Command((SLIMSTATE, *shlex.split(words)), output=output)
