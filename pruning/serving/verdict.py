"""What the serving contract says of one model: where it loads, on which kernel, with which flag."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flame.errors import UserError
from flame.hugging_face.outer_model import OuterModel, text_config
from pruning.adapters.interface import Config
from pruning.adapters.kda_hybrids import KDA_HYBRIDS
from pruning.serving.contract import ENGINES, EVIDENCE, Engine, Evidence, Kernel
from pruning.serving.shape import ServedShape, served_shape


@dataclass(frozen=True)
class Verdict:
    """What one engine does with one model."""

    name: str
    """As `--for` takes it."""
    engine: Engine
    refusal: str | None
    """Why it does not serve the model; None if it does."""
    model_class: str = ""
    kernels: tuple[Kernel, ...] = ()
    """Those that take the model's widths."""
    lost: tuple[Kernel, ...] = ()
    """Those that take the dense model's widths alone."""
    flags: tuple[str, ...] = ()
    """What must be said on its command line, with the hardware that it is for."""
    parallel: tuple[int, ...] = ()
    """The numbers of tensor-parallel processes that can share the model."""

    @property
    def evidence(self) -> Evidence:
        """How the weakest of the kernels that take the model, or of all if none does, is known."""
        of = self.kernels or self.engine.kernels
        return min((kernel.evidence for kernel in of), key=EVIDENCE.index)

    @property
    def who(self) -> str:
        """The engine, its release, and how the verdict is known."""
        return f"{self.name} ({self.engine.program} {self.engine.release}, {self.evidence})"

    @property
    def what(self) -> str:
        """What it does with the model, in one line."""
        if self.refusal is not None:
            return f"no, {self.refusal}"
        said = f"{self.model_class} on {names(self.kernels)}"
        said += f"; say {', '.join(self.flags)}" if self.flags else ""
        lost = ", ".join(f"{kernel.name} ({kernel.where})" for kernel in self.lost)
        said += f"; the dense model has {lost} too" if lost else ""
        return f"{said}; tensor parallel {numbers(self.parallel)}"


def verdicts(
    config: Config, engines: Iterable[str] = ENGINES, dense: Config | None = None
) -> list[Verdict]:
    """What engines do with a model.

    Args:
        config: the model's config.json.
        engines: their names, as in `ENGINES`.
        dense: the config of the model that it was pruned from, if it was.

    Raises:
        UserError: the config's sizes do not go together.
    """
    shape = served_shape(config)
    before = served_shape(dense) if dense is not None else None
    return [_verdict(name, ENGINES[name], config, shape, before) for name in engines]


def check_served(config: Config, engines: Iterable[str]) -> None:
    """Raise UserError, with the reason, unless the named engines serve the model."""
    for verdict in verdicts(config, engines):
        if verdict.refusal is not None:
            raise UserError(f"{verdict.name} does not serve this model: {verdict.refusal}")


def check_family(config: Config, engines: Iterable[str]) -> None:
    """Raise UserError unless the named engines serve models of this family."""
    shape = served_shape(config)
    for name in engines:
        reason = _no_class(config)
        if shape is not None:
            reason = against_family(ENGINES[name], shape.family) or ""
        if reason:
            raise UserError(f"{name} does not serve this model: {reason}")


def check_parallel(config: Config, size: int) -> None:
    """Raise UserError unless `size` tensor-parallel processes can share the model."""
    shape = served_shape(config)
    if shape is None:
        raise UserError(f"--tensor-parallel {size}: {_no_class(config)}")
    reason = shape.against_parallel(size)
    if reason is not None:
        raise UserError(
            f"--tensor-parallel {size}: {reason}; sizes that do are "
            f"{numbers(shape.parallel_sizes())}"
        )


def _verdict(
    name: str, engine: Engine, config: Config, shape: ServedShape | None, dense: ServedShape | None
) -> Verdict:
    refusal = _no_class(config) if shape is None else against(engine, shape)
    if refusal is not None or shape is None:
        return Verdict(name, engine, refusal)
    kernels = tuple(_taking(engine, shape))
    lost = () if dense is None else tuple(k for k in _taking(engine, dense) if k not in kernels)
    return Verdict(
        name,
        engine,
        None,
        engine.classes[shape.family],
        kernels,
        lost,
        (*engine.flags, *_flags(engine, shape)),
        tuple(shape.parallel_sizes()),
    )


def against(engine: Engine, shape: ServedShape) -> str | None:
    """Why an engine does not serve a model of this shape; None if it does."""
    if (reason := against_family(engine, shape.family)) is not None:
        return reason
    if shape.tied and shape.family in engine.untied:
        return f"its class for {shape.family} does not tie the output projection to the embedding"
    if engine.conv_widths and shape.conv_width not in engine.conv_widths:
        taken = " or ".join(map(str, engine.conv_widths))
        return f"short convolutions of {shape.conv_width} taps, it takes {taken}"
    softmax = shape.softmax_width
    if engine.softmax_widths and softmax is not None and softmax not in engine.softmax_widths:
        taken = ", ".join(map(str, engine.softmax_widths))
        return f"softmax heads of {softmax} channels, it takes {taken}"
    if not any(_taking(engine, shape)):
        taken = ", or ".join(dict.fromkeys(str(kernel.takes) for kernel in _of(engine, shape)))
        return f"linear heads of {shape.widths} channels (d_k x d_v), it takes {taken}"
    return None


def against_family(engine: Engine, family: str) -> str | None:
    """Why an engine serves no model of a family, whatever its widths; None if it does."""
    if family in engine.refused:
        return f"{family}: {engine.refused[family]}"
    return None if family in engine.classes else f"it has no class for {family}"


def _of(engine: Engine, shape: ServedShape) -> Iterator[Kernel]:
    return (each for each in engine.kernels if not each.only or shape.family in each.only)


def _taking(engine: Engine, shape: ServedShape) -> Iterator[Kernel]:
    widths = shape.key_width, shape.value_width
    return (kernel for kernel in _of(engine, shape) if kernel.takes.hold(*widths))


def _flags(engine: Engine, shape: ServedShape) -> Iterator[str]:
    """The flags that keep the engine from kernels which it would choose wrongly."""
    widths = shape.key_width, shape.value_width
    for kernel in _of(engine, shape):
        if kernel.chosen is not None and kernel.chosen.hold(*widths):
            if not kernel.takes.hold(*widths):
                yield f"{kernel.flag} on {kernel.where}"


def _no_class(config: Config) -> str:
    text = text_config(config) or config
    if text.get("model_type") in {family.model_type for family in KDA_HYBRIDS}:
        return f"the serving contract says nothing of {config.get('model_type')} yet"
    return f"no serving engine has a class for {config.get('model_type')}"


def around(config: Config, outer: OuterModel | None) -> Config:
    """The config that engines read: that of the whole model, if `config` is of its text model."""
    return config if outer is None else outer.config_around(config)


def serving_lines(config: Config, dense: Config | None = None) -> list[str]:
    """A line for each engine on what it does with a model, or one if none has a class for it."""
    if served_shape(config) is None:
        return [f"{_no_class(config)}: transformers loads it"]
    return [f"{verdict.who}: {verdict.what}" for verdict in verdicts(config, dense=dense)]


def names(kernels: Iterable[Kernel]) -> str:
    """The names of kernels, each once."""
    return ", ".join(dict.fromkeys(kernel.name for kernel in kernels))


def numbers(sizes: Iterable[int]) -> str:
    """Numbers as a list in words."""
    return ", ".join(map(str, sizes))
