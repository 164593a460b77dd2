"""How exact measured states are: what they were made from, and by what."""

BFLOAT16_NOISE = 2.0**-8
"""Relative rounding of a number in bfloat16."""


def precision_sentence(activations: str, device: str) -> str:
    """Say what the states were made from, and which singular values are rounding.

    Args:
        activations: the dtype that the model computed in, such as `bfloat16`.
        device: `cpu` or `cuda`.
    """
    if device == "cpu":
        return f"The states are float64, made from {activations} activations."
    made = f"The states come from GPU kernels that multiply in {activations}"
    if activations != "bfloat16":
        return f"{made}."
    return (
        f"{made}: singular values below about {BFLOAT16_NOISE:.1g} of the largest are rounding. "
        f"Give --epsilon {BFLOAT16_NOISE:.1g} or more for the threshold rank, or analyze on a CPU."
    )
