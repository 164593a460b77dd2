"""Budgets for engines and for squares: the widths that they become, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from flame.errors import UserError
from flame.hugging_face.outer_model import OuterModel
from pruning.methods import METHODS
from pruning.planning.budgets import Budget
from pruning.planning.fitting import fitted
from tests.pruning.serving.test_verdict import DENSE

SMALL: dict[str, Any] = DENSE | {"linear_key_head_dim": 32, "linear_value_head_dim": 48}
WIDE: dict[str, Any] = DENSE | {"linear_key_head_dim": 96, "linear_value_head_dim": 192}
GATED: dict[str, Any] = {"model_type": "gated_deltanet", "head_dim": 32, "num_heads": 4}
KDA: dict[str, Any] = {"model_type": "kda", "head_dim": 32, "num_heads": 4, "hidden_size": 64}


def found(config: dict[str, Any] = DENSE, method: str = "l1", **budget: Any) -> tuple[Any, Any]:
    made = fitted(Budget(**budget), config, METHODS[method]())
    return made.space, made.width


@pytest.mark.parametrize(
    ("budget", "space", "width"),
    [
        # Half the state: key channels where any width runs, heads where only 64 or 128 square do.
        ({"ratio": 0.5, "for_": ("vllm-gpu",)}, "key", {"key": 64}),
        ({"ratio": 0.5, "for_": ("vllm-gpu", "vllm-cpu")}, "head", {"head": 8}),
        # A quarter is both a square and heads: the square comes first, it keeps all heads.
        ({"ratio": 0.75, "for_": ("vllm-cpu",)}, "key,value", {"key": 64, "value": 64}),
        ({"ratio": 0.9, "for_": ("vllm-cpu",)}, "head", {"head": 1}),
        # As a number of bytes: 64 layers, of which 48 are linear, 48 heads, 128 x 128, float32.
        # A third is one value head of three in each of 16 groups; whole groups make 5 of 16.
        ({"state_bytes": 48 * 48 * 2**16 // 3, "for_": ("vllm-cpu",)}, "value-head",
         {"value-head": 1}),
        ({"state_bytes": 48 * 48 * 2**16 // 3, "space": "head", "for_": ("vllm-cpu",)}, "head",
         {"head": 5}),
        ({"ratio": 0.5, "space": "value-head", "for_": ("sglang",)}, "value-head",
         {"value-head": 1}),
        ({"ratio": 0.3, "space": "square", "for_": ("vllm-cpu",)}, "key,value",
         {"key": 64, "value": 64}),
        ({"ratio": 0.3, "space": "square"}, "key,value", {"key": 80, "value": 80}),
        ({"width": 96, "space": "square"}, "key,value", {"key": 96, "value": 96}),
        ({"state_bytes": 48 * 48 * 2**14, "space": "square"}, "key,value",
         {"key": 64, "value": 64}),
        ({"ratio": 0.3, "space": "key", "for_": ("sglang",)}, "key", {"key": 80}),
    ],
)  # fmt: skip
def test_widths(budget: dict[str, Any], space: str, width: dict[str, int]) -> None:
    assert found(**budget) == (space, width)


def test_a_square_counts_on_the_narrower_side_and_drops_what_stays() -> None:
    assert found(WIDE, ratio=0.5, space="square") == ("key,value", {"key": 48, "value": 48})
    assert found(WIDE, width=96, space="square") == ("value", {"value": 96})
    assert found(SMALL, ratio=0.25, space="square") == ("key,value", {"key": 24, "value": 24})


def test_a_method_is_asked_for_spaces_that_it_chooses_in_alone() -> None:
    assert found(method="drrqr", ratio=0.5, for_=("sglang",)) == ("key", {"key": 64})
    with pytest.raises(UserError, match="key: vllm-cpu takes no width.*head: drrqr does not"):
        found(method="drrqr", ratio=0.5, for_=("vllm-cpu",))


def test_other_budgets_stay_and_what_became_of_these_is_said() -> None:
    plain = Budget(ratio=0.5)
    assert fitted(plain, GATED, METHODS["l1"]()) is plain
    made = fitted(Budget(ratio=0.5, for_=("vllm-cpu",)), DENSE, METHODS["l1"]())
    assert made.fitted == "--for vllm-cpu keeps 8 of 16 heads, 50 % of the state"
    assert made.record()["for"] == "vllm-cpu" and made.record()["width"] == "head=8"
    assert fitted(made, DENSE, METHODS["l1"]()) == made


def test_engines_see_the_whole_of_which_a_text_model_is_part() -> None:
    whole = OuterModel(Path(), {"model_type": "qwen3_5", "text_config": DENSE})
    made = fitted(Budget(ratio=0.5, for_=("mlx-lm",)), DENSE, METHODS["l1"](), whole)
    assert made.width == {"key": 64}


@pytest.mark.parametrize(
    ("config", "budget", "message"),
    [
        (GATED, {"for_": ("sglang",)}, "sglang does not serve.*no serving engine.*gated_deltanet"),
        (DENSE, {"for_": ("mlx-lm",)}, "mlx-lm does not serve.*no class for qwen3_5_text"),
        (DENSE, {"for_": ("vllm-cpu",), "space": "key"}, "--space key --for vllm-cpu: .*64 x 128"),
        (SMALL, {"for_": ("vllm-cpu",), "space": "square"}, "square --for vllm-cpu.*16 x 16"),
        (SMALL, {"for_": ("vllm-cpu",)}, "key: vllm-cpu .*square: vllm-cpu .*head: vllm-cpu"),
        (DENSE, {"for_": ("vllm-cpu",), "space": "key,value", "ratio": 0.3}, "80 x 80"),
        (DENSE, {"for_": ("vllm-cpu",), "allocate": "model"}, "--for needs one width"),
        (DENSE, {"space": "square", "allocate": "layer"}, "square needs one width"),
        (DENSE, {"for_": ("vllm-cpu",), "ratio": None, "width": 64}, "needs a --space"),
        (DENSE, {"for_": ("vllm-cpu",), "ratio": {"key": 0.5}}, "takes one --ratio"),
        (DENSE, {"space": "square", "ratio": None, "width": {"key": 64}}, "takes one --width"),
        (DENSE, {"space": "square", "ratio": None, "width": 256}, "up to 128 channels"),
        (KDA, {"space": "square"}, "value.* kda .*rank"),
        (DENSE, {"for_": ("vllm-cpu",), "strict_ratio": True, "ratio": 0.6}, "--strict-ratio"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(config: Any, budget: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        found(config, **({"ratio": 0.5} | budget))
    assert "\n" not in str(error.value)
