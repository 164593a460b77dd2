"""Output errors of removed channels, against layers whose projections have zeros there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pruning.adapters import ADAPTERS
from pruning.calibration.feeding import Feed
from pruning.mixers import find_mixers
from pruning.spaces import HEAD_KINDS
from pruning.statistics import HeadOutputErrors, KeyOutputErrors, Statistic, ValueOutputErrors
from pruning.statistics.row_sample import row_sample
from tests.pruning import families, hybrids
from tests.pruning.masking import difference
from tests.pruning.replays import changes

LENGTH = 70
BUILDS: dict[str, tuple[dict[str, Any], Callable[..., nn.Module]]] = {
    name: (config, build)
    for configs, build in ((families.CONFIGS, families.build), (hybrids.CONFIGS, hybrids.build))
    for name, config in configs.items()
}
KINDS: dict[str, type[Statistic]] = {
    "key": KeyOutputErrors,
    "value": ValueOutputErrors,
    "head": HeadOutputErrors,
    "value-head": HeadOutputErrors,
}


@pytest.mark.parametrize("name", BUILDS)
def test_errors_are_those_of_layers_with_zeros(name: str) -> None:
    config, build = BUILDS[name]
    model, adapter = build(config).double(), ADAPTERS[config["model_type"]]
    spaces = [space for space in adapter.spaces(config) if space.kind in KINDS]
    sums = {space.name: {KINDS[space.kind]: KINDS[space.kind].zeros(space)} for space in spaces}
    feed = Feed(sums, spaces, adapter, row_sample(1, LENGTH, 0))
    layer, mixer = next(iter(find_mixers(model, adapter).items()))
    seen: list[tuple[tuple, dict]] = []
    hook = mixer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    packed = {} if name in hybrids.CONFIGS else {"cu_seqlens": torch.tensor([0, 25, LENGTH])}
    feed.start(0)
    with torch.no_grad(), feed.attached(model):
        model(families.tokens(1, LENGTH), use_cache=False, **packed)
    feed.complain()
    hook.remove()
    for space in spaces:
        if space.layer == layer:
            kind = KINDS[space.kind]
            found = sums[space.name][kind]
            # Of the last head: others are no different.
            expected = changes(model, space, space.num_heads - 1, *seen[0])
            gram = torch.einsum("itc,jtc->ij", expected, expected)
            # fla's layers make decays in float32.
            last = found.gram[-space.head_dim :, -space.head_dim :]
            assert difference(last if space.kind in HEAD_KINDS else found.gram[-1], gram) < 1e-6
            assert int(found.tokens) == LENGTH
            if space.kind in HEAD_KINDS:
                # Without any head nothing is left, so all errors together are the output's square.
                with torch.no_grad():
                    out = mixer(*seen[0][0], **seen[0][1])
                whole = (out[0] if isinstance(out, tuple) else out).square().sum()
                assert difference(found.gram.sum(), whole) < 1e-6
