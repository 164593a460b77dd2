"""docs/support.md is what the adapters and methods say, and every cell of it is tried."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pruning import prune
from pruning.adapters import ADAPTERS, PRUNED, TIED, adapter_for
from pruning.methods import METHODS
from pruning.planning.plan import planned_spaces
from pruning.planning.plan_file import read_plan, with_loaded_tensors
from pruning.repair.gates import needs_of
from pruning.support import SPACES, Cell, cells, kinds_of, page
from tests.pruning import hybrids, kda_hybrids
from tests.pruning.families import CONFIGS, build
from tests.pruning.kda_hybrids import replace_gates_
from tests.pruning.masking import difference, mask
from tests.pruning.models import write_hf, write_text

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"

OF_TRANSFORMERS = hybrids.CONFIGS | kda_hybrids.CONFIGS

EPS = 1e-12
"""Of all norms: so far below what they read that no scaling of it is seen."""


def tiny(family: str, space: str) -> dict[str, Any]:
    """The first of the tests' small configs of a family, with the vocabulary of `home`.

    For value heads, three of them to a key head.
    """
    known = [*CONFIGS.values(), *OF_TRANSFORMERS.values()]
    config = next(config for config in known if config["model_type"] == family)
    eps = {key: EPS for key in ("norm_eps", "rms_norm_eps")}
    grouped = {}
    if space == "value-head":
        heads = next(s.head_dim for s in ADAPTERS[family].spaces(config) if s.kind == "head")
        grouped = {ADAPTERS[family].value_heads_key: 3 * heads}
    return {**config, **eps, **grouped, "vocab_size": 300}


def model_of(config: dict[str, Any]) -> nn.Module:
    of_transformers = config["model_type"] in OF_TRANSFORMERS
    return (hybrids.build if of_transformers else build)(config).double()


def marked() -> list[Any]:
    """All cells; of each family and space one method is not slow, another one each time."""
    found: list[Any] = []
    for group in dict.fromkeys((cell.family, cell.space) for cell in cells()):
        methods = [cell.method for cell in cells() if cell[:2] == group]
        chosen = methods[len(found) % len(methods)]
        marks = {name: () if name == chosen else (pytest.mark.slow,) for name in methods}
        found += [
            pytest.param(*group, n, marks=marks[n], id="-".join((*group, n))) for n in methods
        ]
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cells")
    write_text(folder)
    return folder


@pytest.mark.parametrize(("family", "space", "method"), marked())
def test_every_cell_prunes_a_model_that_its_class_loads(
    family: str, space: str, method: str, home: Path, tmp_path: Path
) -> None:
    """What the stock class computes is the dense model with zeros for what is gone."""
    from transformers import AutoModelForCausalLM

    config, adapter = tiny(family, space), ADAPTERS[family]
    dense = model_of(config)
    tensors = {name: tensor.clone().contiguous() for name, tensor in dense.state_dict().items()}
    words = [str(write_hf(tmp_path / "dense", config, tensors)), str(tmp_path / "out")]
    words += ["--to", "hf", "--space", space, "--method", method, "--ratio", "0.5"]
    pruned = [each for each in adapter.spaces(config) if each.kind in SPACES[space]]
    if needs_of(METHODS[method], pruned):
        words += ["--data", str(home / "text.jsonl"), "--tokenizer", str(home / "tokenizer")]
        words += ["--sequences", "2", "--seq-len", "64"]
    options = prune.STAGE.parse([*words, "--multiple-of", "1"])
    prune.check(options)
    prune.run(options)
    plan = with_loaded_tensors(read_plan(tmp_path / "out" / "plan.json"), tmp_path / "out")
    spaces = planned_spaces(plan, plan.config_before)
    assert {each.kind for each in spaces} <= {*SPACES[space]}
    assert adapter.state_bytes(plan.config_after) <= 0.6 * adapter.state_bytes(config)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float64, output_loading_info=True
    )
    assert type(model) is type(dense) and not any(report.values())
    ids = torch.arange(3, 43)[None] % 300
    with torch.no_grad():
        found = hybrids.one_by_one(model.eval())(ids, use_cache=False).logits
        if hasattr(METHODS[method], "new_tensors"):
            assert found.isfinite().all()
            return
        mask(dense, spaces, plan.kept, kept_norms=not plan.undo_gain)
        if not plan.undo_gain:
            hybrids.shrink_output_eps(dense, spaces, plan.kept)
        replace_gates_(dense, plan)
        assert difference(found, dense(ids, use_cache=False).logits) < 1e-4


def test_every_family_space_and_method_is_in_the_table() -> None:
    text = page()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    families = [name for name in ADAPTERS if name not in PRUNED]
    assert [row.split("`")[1] for row in rows] == [*families, *METHODS]
    assert all(f"`{name}` (" in text for name in TIED)
    assert "| `kda` | yes, but for `pca` | no | yes | yes (`num_v_heads`) | no |" in text
    for family in kda_hybrids.CONFIGS:
        assert f"| `{family}` | in a square only | in a square only | yes | no | yes |" in text
    assert "value channels of `kda` (its value width is also" in text
    yes = sum(cell.strip().startswith("yes") for row in rows for cell in row.split("|")[2:7])
    groups = {cell[:2] for cell in cells()} | {(cell.method, cell.space) for cell in cells()}
    assert len(groups) == yes
    assert Cell("kda", "key", "pca") not in cells()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_s_spaces_are_those_of_real_models(name: str) -> None:
    adapter = adapter_for(CONFIGS[name])
    real = {space.kind for space in adapter.spaces(CONFIGS[name])}
    assert real | ({"value-head"} if adapter.value_heads_key else set()) == kinds_of(adapter)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run python -m pruning.support > docs/support.md"
