"""fla counts the chunks of packed documents on the host, and finds what it finds on the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import flame.register  # noqa: F401
from flame.models.document_bounds import INDICES, remember
from flame.models.packed_hybrids import _translated
from tests.flame.training.step.stand_in_device import StandInDevice

BOUNDS = [0, 1, 64, 129, 300, 301]


def moved() -> tuple[torch.Tensor, StandInDevice]:
    """Boundaries on a stand-in device, which remember the host's, and the device."""
    host = torch.tensor(BOUNDS)
    bounds = remember(host.clone(), host)
    return bounds, StandInDevice([bounds])


CALLS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "chunks": lambda index, bounds: index.prepare_chunk_indices(bounds, 64),
    "by name": lambda index, bounds: index.prepare_chunk_indices(
        cu_seqlens=bounds, chunk_size=16, cu_seqlens_cpu=None
    ),
    "positions": lambda index, bounds: index.prepare_position_ids(bounds),
    "sequences": lambda index, bounds: index.prepare_sequence_ids(cu_seqlens=bounds),
}


@pytest.mark.parametrize("call", CALLS)
def test_documents_are_indexed_without_waiting_for_the_device(call: str) -> None:
    from fla.ops.utils import index

    expected = CALLS[call](index, torch.tensor(BOUNDS))
    bounds, device = moved()
    with device:
        found = CALLS[call](index, bounds)
        again = CALLS[call](index, bounds)
    assert device.events == []
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    assert call == "by name" or again is found


def test_boundaries_that_remember_nothing_are_waited_for() -> None:
    from fla.ops.utils import index

    bounds = torch.tensor(BOUNDS)
    device = StandInDevice([bounds])
    with device:
        index.prepare_chunk_indices(bounds, 64)
    assert [kind for kind, _ in device.events] == ["wait"]


def test_every_function_of_fla_is_reached() -> None:
    from fla.ops.utils import index

    for name in INDICES:
        called = [cell.cell_contents for cell in getattr(index, name).__closure__]
        assert any(getattr(value, "__name__", "") == "indices" for value in called), name


@pytest.mark.parametrize("family", ["qwen3_5_text", "kimi_linear", "glm5_next_text"])
def test_hybrids_get_positions_and_lengths_without_waiting(family: str) -> None:
    model = torch.nn.Module()
    model.config = AutoConfig.for_model(family)
    bounds, device = moved()
    with device:
        _, found = _translated(model, (), {"cu_seqlens": bounds})
    assert device.events == []
    assert ("cu_seqlens" in found) == (family != "qwen3_5_text")
    assert found["max_length_q"] == 171
    lengths = torch.tensor(BOUNDS).diff().tolist()
    assert found["position_ids"][0].tolist() == [n for length in lengths for n in range(length)]
