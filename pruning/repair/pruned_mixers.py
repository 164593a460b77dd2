"""The pruned layers of a plan, run beside the dense ones on the dense model's hidden states."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from flame.checkpoint.load import load_weights
from flame.checkpoint.reference import ModelReference
from flame.checkpoint.source import TensorInfo, TensorSource
from flame.model import full_precision_parameters, meta_model, shard
from flame.process.distributed import local_device
from pruning.adapters import ADAPTERS, Adapter
from pruning.mixers import find_mixers, output_projection
from pruning.planning.plan import Plan
from pruning.statistics import OutputPair
from pruning.transform.sliced_source import InMemory, SlicedSource
from pruning.transform.slices import slices_of


@dataclass(frozen=True)
class PrunedMixers:
    """The token mixers of a pruned model, each sharded by itself."""

    mixers: Mapping[int, nn.Module]
    """By layer."""
    positions: Mapping[int, Int64[Tensor, " kept"] | None]
    """Which of the dense output projection's columns a layer keeps; None for all."""
    inputs: dict[int, tuple[tuple, dict[str, Any]]] = field(default_factory=dict)
    """Arguments of the dense mixers that are running, by layer."""

    @contextmanager
    def attached(
        self, model: nn.Module, adapter: Adapter, on_pair: Callable[[int, OutputPair], None]
    ) -> Iterator[None]:
        """Call `on_pair(layer, pair)` for each pass of a mixer of the dense `model`.

        Every rank must run the model as often as the others, since the pruned layers are gathered.
        """
        with ExitStack() as stack:
            for layer, mixer in find_mixers(model, adapter).items():
                keep, output = self._keep(layer), output_projection(mixer)
                hook = mixer.register_forward_pre_hook(keep, with_kwargs=True)
                stack.callback(hook.remove)
                compare = self._compare(layer, on_pair)
                stack.callback(output.register_forward_pre_hook(compare).remove)
            yield

    def _keep(self, layer: int) -> Callable[..., None]:
        def hook(mixer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.inputs[layer] = (args, kwargs)

        return hook

    def _compare(self, layer: int, on_pair: Callable[[int, OutputPair], None]) -> Callable:
        def hook(output: nn.Module, given: tuple[Tensor, ...]) -> None:
            dense = given[0].detach().flatten(0, -2)
            pruned, at = self._outputs(layer), self.positions[layer]
            if at is not None:
                at = at.to(pruned.device)
                pruned = torch.zeros_like(dense).index_copy(1, at, pruned.to(dense.dtype))
            on_pair(layer, OutputPair(dense, pruned))

        return hook

    @torch.no_grad()
    def _outputs(self, layer: int) -> Float[Tensor, "n kept"]:
        """What the pruned layer gives to its output projection for the dense layer's inputs."""
        mixer, seen = self.mixers[layer], []
        args, kwargs = self.inputs.pop(layer)
        hook = output_projection(mixer).register_forward_pre_hook(
            lambda module, given: seen.append(given[0].flatten(0, -2))
        )
        with ExitStack() as stack:
            stack.callback(hook.remove)
            mixer(*args, **kwargs)
        if isinstance(mixer, FSDPModule):
            # Roots of FSDP2 stay gathered otherwise, and each of these is one.
            mixer.reshard()
        return seen[0]


def pruned_mixers(
    reference: ModelReference, plan: Plan, mesh: DeviceMesh, dtype: torch.dtype
) -> PrunedMixers:
    """The token mixers that `plan` makes of those of `reference`, sharded over `mesh`. Collective.

    Args:
        plan: its new tensors, if it has any, are in memory.
        dtype: compute dtype.
    """
    model, names, found = _on_meta(plan)
    slices = slices_of(plan, reference.config)
    positions = {}
    for layer, mixer in found.items():
        cut = slices.get(f"{names[output_projection(mixer)]}.weight", ())
        positions[layer] = cut[0].kept if cut else None
        shard(mixer, mesh, dtype)
    _load(model, names, found, _pruned_source(reference, plan))
    return PrunedMixers({layer: mixer.eval() for layer, mixer in found.items()}, positions)


def whole_mixers(
    reference: ModelReference, plan: Plan, layers: Sequence[int], dtype: torch.dtype
) -> Iterator[tuple[int, str, nn.Module]]:
    """These layers' mixers that `plan` makes, with their names, whole on this process's device.

    Weights are cast to `dtype`, but those that FSDP2 would leave in fp32.

    Args:
        plan: its new tensors, if it has any, are in memory.
    """
    model, names, found = _on_meta(plan)
    source = _pruned_source(reference, plan)
    for layer in layers:
        mixer = found[layer]
        kept = full_precision_parameters(mixer)
        for name, parameter in mixer.named_parameters():
            if name not in kept or dtype == torch.float64:
                parameter.data = parameter.data.to(dtype)
        _load(model, names, {layer: mixer}, source)
        yield layer, names[mixer], mixer
        mixer.to("meta")


def _on_meta(plan: Plan) -> tuple[nn.Module, dict[nn.Module, str], dict[int, nn.Module]]:
    """The pruned model on the meta device, the names of its modules, its mixers by layer."""
    model = meta_model(plan.config_after)
    names = {module: name for name, module in model.named_modules()}
    return model, names, find_mixers(model, ADAPTERS[plan.config_after["model_type"]])


def _pruned_source(reference: ModelReference, plan: Plan) -> SlicedSource:
    slices = slices_of(plan, reference.config)
    return SlicedSource(reference.source(), slices, InMemory(plan.new_tensors))


def _load(
    model: nn.Module,
    names: Mapping[nn.Module, str],
    found: Mapping[int, nn.Module],
    source: TensorSource,
) -> None:
    """Fill mixers of `model`, which are on the meta device, from the pruned model's tensors."""
    prefixes = {str(layer): names[mixer] for layer, mixer in found.items()}
    mixers = nn.ModuleDict({str(layer): mixer for layer, mixer in found.items()})
    mixers.to_empty(device=local_device())
    for name, buffer in mixers.named_buffers():
        layer_name, _, rest = name.partition(".")
        buffer.copy_(model.initial_buffers[f"{prefixes[layer_name]}.{rest}"])  # type: ignore[index]
    load_weights(mixers, _Renamed(source, prefixes))


@dataclass(frozen=True)
class _Renamed:
    """The tensors of some modules of a source, named after their layer in place of their module."""

    source: TensorSource
    prefixes: Mapping[str, str]
    """The modules' names by layer."""

    def names(self) -> list[str]:
        return sorted(
            f"{layer}{name.removeprefix(prefix)}"
            for name in self.source.names()
            for layer, prefix in self.prefixes.items()
            if name.startswith(f"{prefix}.")
        )

    def info(self, name: str) -> TensorInfo:
        return self.source.info(self._stored(name))

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self.source.read(self._stored(name), rows)

    def _stored(self, name: str) -> str:
        layer, _, rest = name.partition(".")
        return f"{self.prefixes[layer]}.{rest}"
