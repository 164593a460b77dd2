"""That the kernels multiply the key channels that there are: matrix instructions in their PTX.

A loop's body is counted once: one chunk in the state passes, one block of values elsewhere, which
the block chosen here makes the only one.
"""

from typing import Any

import pytest

from kernels.narrow_chunks import output_gradients, outputs, pieces, state_gradients, states, writes
from tests.kernels.compiled import compiled, matrix_flop

C, VALUES, WARPS = 64, 64, 4
TYPES = {
    "T": "i32", "scale": "fp32", "g": "*fp32", "dg": "*fp32", "initial": "*fp32", "final": "*fp32",
    "dinitial": "*fp32", "dfinal": "*fp32",
}  # fmt: skip
KERNELS: dict[str, tuple[Any, int, int, int]] = {
    "states": (states.carry_states_kernel, 2, 0, 0),
    "outputs": (outputs.outputs_kernel, 1, 1, 1),
    "gradients of states": (state_gradients.carry_gradients_kernel, 3, 0, 0),
    "gradients of values": (output_gradients.own_value_gradients_kernel, 0, 1, 1),
    "gradients of outputs": (output_gradients.output_gradients_kernel, 3, 2, 1),
    "W and U": (writes.writes_kernel, 0, 1, 1),
    "gradients through W and U": (writes.write_gradients_kernel, 0, 5, 2),
}
"""The kernel, and how many products it has of C × K × V, of C × C × K and of C × C × V."""


def check(name: str, d_k: int) -> None:
    kernel, ckv, cck, ccv = KERNELS[name]
    constants = {
        "H": 16, "HV": 16, "K": d_k, "V": VALUES, "BV": VALUES, "PIECES": pieces(d_k),
        "V_FIRST": True, "gk": None, "cu_seqlens": None, "chunk_indices": None,
        "chunk_offsets": None,
    }  # fmt: skip
    names = set(kernel.arg_names)
    constants = {key: value for key, value in constants.items() if key in names}
    found = matrix_flop(compiled(kernel, constants, TYPES, WARPS).asm["ptx"], WARPS)
    products = ckv * C * d_k * VALUES + cck * C * C * d_k + ccv * C * C * VALUES
    # Two more of C × C × C: A^T dL A^T.
    products += 2 * C**3 * (name == "gradients through W and U")
    assert found == 2 * products, f"{name}, {d_k} key channels: {found / 2 / products:.3f}"


@pytest.mark.parametrize("name", ["states", "outputs"])
def test_arithmetic_follows_the_key_width(name: str):
    check(name, 96)


@pytest.mark.slow
@pytest.mark.parametrize("d_k", [16, 48, 80, 112, 176])
@pytest.mark.parametrize("name", KERNELS)
def test_arithmetic_follows_every_key_width(name: str, d_k: int):
    check(name, d_k)
