"""Which way of summing outer products a device gets, and that a calibration takes it."""

import pytest
import torch

from pruning.calibration.products import add_in_pieces_, products_for
from pruning.statistics.products import add_products_

GPUS = {
    "A100": ((8, 0), True),
    "H100": ((9, 0), True),
    "B200": ((10, 0), True),
    "RTX 3090": ((8, 6), False),
    "L40S": ((8, 9), False),
    "B300": ((10, 3), False),
    "RTX 5090": ((12, 0), False),
}


@pytest.mark.parametrize("name", GPUS)
def test_gpus_that_are_slow_at_float64_take_pieces(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability, fast = GPUS[name]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = products_for(torch.device("cuda", 0))
    assert chosen is (add_products_ if fast else add_in_pieces_)


def test_a_cpu_takes_float64_and_an_option_decides_everywhere() -> None:
    cpu = torch.device("cpu")
    assert products_for(cpu) is add_products_
    assert products_for(cpu, "pieces") is add_in_pieces_
    assert products_for(torch.device("cuda", 0), "float64") is add_products_
