"""On CUDA: one calibration serves all methods, and its sums are those of the CPU's activations."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from flame.process.distributed import local_device, process_group
from pruning import calibrate
from pruning.adapters import adapter_for
from pruning.calibration.data import calibration_data
from pruning.methods import METHODS
from pruning.op_call import OpCall
from pruning.options import DataOptions
from pruning.planning.applicable import why_not
from pruning.planning.choose import Budget, choose
from pruning.statistics import QueryKeyGram
from pruning.taps import tap_ops
from tests.pruning.families import tiny_config
from tests.pruning.models import weights, write_hf, write_text

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FAMILIES = ["delta_net", "gated_deltanet", "gated_deltaproduct", "kda"]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_calibration_serves_all_methods(name: str, tmp_path: Path) -> None:
    config = tiny_config(name, vocab_size=300)
    write_text(tmp_path)
    reference = resolve(write_hf(tmp_path / "model", config, weights(config)))
    text, tokenizer = (str(tmp_path / part) for part in ("text.jsonl", "tokenizer"))
    options = DataOptions(data=text, tokenizer=tokenizer, sequences=3, seq_len=160)
    data, adapter = calibration_data(reference, options), adapter_for(config)
    with process_group():
        kinds = calibrate.kinds_of(tuple(METHODS), config)
        collected, meta = calibrate.calibrate(reference, kinds, data)
    assert meta.tokens == 3 * 160
    sums = [t for of in collected.values() for s in of.values() for t in s.state_dict().values()]
    assert all(t.device.type == local_device().type and t.isfinite().all() for t in sums)
    assert_near_grams_of_the_cpu(reference, data, collected)
    source, spaces = reference.source(), adapter.spaces(config)
    for method in METHODS.values():
        for kind in method.kinds:
            if kind in {space.kind for space in spaces} and why_not(method, kind, spaces) is None:
                budget = Budget(0.5, multiple_of=1, space=kind)
                plan = choose(config, source, method(), budget, collected, meta.for_plan())
                assert len(plan.kept) == len([s for s in spaces if s.kind == kind])


def assert_near_grams_of_the_cpu(reference: Any, data: Any, collected: Any) -> None:
    """To the precision of bfloat16, in which calibration runs on a GPU."""
    model, adapter = load_model(reference).cpu().float(), adapter_for(reference.config)
    spaces = {s.layer: s for s in adapter.spaces(reference.config) if s.kind == "key"}
    grams = {layer: QueryKeyGram.zeros(space) for layer, space in spaces.items()}

    def keep(call: OpCall) -> None:
        grams[call.layer].update(call)

    loader = data.loader(0, 1)
    with torch.no_grad(), tap_ops(model, adapter, keep):
        for _, (inputs, _labels) in zip(range(data.sequences), loader, strict=False):
            model(inputs["input"], cu_seqlens=inputs["cu_seqlens"], use_cache=False)
    loader.close()
    for layer, space in spaces.items():
        found = collected[space.name][QueryKeyGram].gram.cpu()
        error = (found - grams[layer].gram).norm() / grams[layer].gram.norm()
        assert error < 0.05, f"{space.name}: {error:.1e}"
