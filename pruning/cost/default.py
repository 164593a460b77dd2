"""What `prune` does where no method is named, and what that takes, in words."""

from collections.abc import Iterable

from pruning.calibration.data import CalibrationData
from pruning.spaces import Space


def said_default(
    spaces: Iterable[Space], data: CalibrationData, calibrates: bool, repairs: bool, measured: int
) -> str:
    """The end of a sentence that begins with the method's name.

    Args:
        spaces: those that are pruned.
        data: what is calibrated on.
        calibrates: whether the method's statistics are still to be summed.
        repairs: whether output projections are refitted.
        measured: held-out sequences on which pruned models are measured.
    """
    passes = "two passes" if calibrates and repairs else "a pass"
    said = f"chooses{', refits the output projections (--repair output)' if repairs else ''}; "
    said += f"{passes} over {data.tokens:,} tokens"
    widths = [space.head_dim for space in spaces if space.kind == "key"]
    if calibrates:
        runs = max(widths, default=0) + 1
        said += (
            f", {runs} runs of each head's delta rule on {data.replayed_tokens:,} of them "
            "(--replay-fraction F: on another part)"
        )
    if measured:
        said += (
            f"; pruned models beside the dense one on {measured} held-out sequences, to keep what "
            "helps (--gain measured)"
        )
    if repairs and widths:
        said += ". Closer still, and slower: --method taylor --repair layer"
    return said
