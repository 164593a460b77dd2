"""Experts that lie apart on a disk are one tensor in the model, and rows of it are read alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flame.checkpoint.source import TensorInfo
from flame.hugging_face.model_folder import open_folder, write_hf
from flame.hugging_face.safetensors_source import SafetensorsSource
from tests.pruning.hybrids import CONFIGS, build


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "qwen3_next"])
def test_rows_of_stacked_experts_cost_the_experts_of_these_rows(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = dict(build(CONFIGS[family]).state_dict())
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()}
    write_hf(tmp_path, CONFIGS[family], infos, state.__getitem__)
    source, read = open_folder(tmp_path, CONFIGS[family]), SafetensorsSource.read
    asked: list[str] = []

    def noted(self: Any, name: str, rows: slice | None = None) -> torch.Tensor:
        asked.append(name)
        return read(self, name, rows)

    monkeypatch.setattr(SafetensorsSource, "read", noted)
    for kind, parts in {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.items():
        name = f"model.layers.1.mlp.experts.{kind}"
        asked.clear()
        assert torch.equal(source.read(name, slice(1, 3)), state[name][1:3])
        experts = [f"experts.{e}.{part}_proj.weight" for e in (1, 2) for part in parts]
        assert asked == [f"model.layers.1.mlp.{expert}" for expert in experts]
        assert torch.equal(source.read(name), state[name])
