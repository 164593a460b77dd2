"""peft's `adapter_config.json`: checked, and turned into what peft must know of one module."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from flame.errors import UserError, first_line
from flame.lora.patterns import Patterns

FILE = "adapter_config.json"

TYPES = {
    "LORA": "lora_",
    "LOHA": "hada_",
    "LOKR": "lokr_",
    "IA3": "ia3_",
    "OFT": "oft_",
    "HRA": "hra_",
}
"""Kinds of adapters that change each module by itself and merge into its weight; what the names of
their tensors begin with."""

PLAIN_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "lora_ga")
"""Values of `init_lora_weights` that leave the base as it is when adapters are loaded."""

BASE_CHANGING_STARTS = ("pissa", "olora", "mica")
"""Values of `init_lora_weights` with which peft looks at the base, or changes it, at each load."""

UNMERGEABLE = {
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "arrow_config": "Arrow chooses among adapters for each token",
    "layer_replication": "it makes another model of the base",
    "target_parameters": "these are no modules",
    "trainable_token_indices": "rows of an embedding are no adapter of a module",
    "use_qalora": "its base is quantised",
    "megatron_config": "its base is Megatron's",
}
"""Options of peft that adapters cannot be merged with here, and why."""

VARIANTS = ("velora_config", "monteclora_config", "use_bdlora", "kasa_config")
"""Options that make a LoRA layer another formula than `W + scale · B A`; peft merges these."""

PEFT_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What peft raises for configurations and tensors that do not fit."""

_LARGEST_RANK = 65536
_LARGEST_ALPHA = 1e30
"""Beyond it products in float32 overflow."""


class AdapterConfig:
    """A checked `adapter_config.json`.

    Args:
        content: the JSON object.

    Raises:
        UserError: a value is of the wrong type or out of range, or peft's merge of such adapters
            would not give what they compute.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = {key: value for key, value in content.items() if value is not None}
        self.kind = str(self.content.get("peft_type", "LORA")).rpartition(".")[2]
        if self.kind not in TYPES:
            raise UserError(
                f"{FILE}: adapters of type {self.kind!r} cannot be merged here, only "
                f"{', '.join(TYPES)}: merge them with peft's merge_and_unload and save the model"
            )
        self._check_types()
        self._check_known()
        self._check_mergeable()
        self._ranks = Patterns(self._pattern("rank_pattern"), f"{FILE}: rank_pattern")
        self._alphas = Patterns(self._pattern("alpha_pattern"), f"{FILE}: alpha_pattern")

    @property
    def mark(self) -> str:
        """What the names of the adapters' tensors begin with, after the module's name."""
        return TYPES[self.kind]

    @property
    def start(self) -> str:
        """`init_lora_weights` in lower case, `true` by default."""
        return str(self.content.get("init_lora_weights", True)).lower()

    @property
    def is_dora(self) -> bool:
        return bool(self.content.get("use_dora"))

    @property
    def row_by_row(self) -> bool:
        """Whether a row of a merged linear weight needs that row of the base alone."""
        plain = self.start in PLAIN_STARTS and not any(map(self.content.get, VARIANTS))
        return self.kind == "LORA" and plain

    @property
    def alpha_option(self) -> str:
        return "lora_alpha" if self.kind == "LORA" else "alpha"

    def rank(self, module: str) -> int:
        """Return the rank of a module's adapter, by `r` and `rank_pattern`."""
        key = self._ranks.first_match(module)
        return self.content.get("r", 8) if key is None else self.content["rank_pattern"][key]

    def alpha(self, module: str) -> float:
        """Return the numerator of a module's scale, by alpha and `alpha_pattern`."""
        key = self._alphas.first_match(module)
        default = self.content.get(self.alpha_option, 8)
        return default if key is None else self.content["alpha_pattern"][key]

    def for_module(self, module: str) -> Any:
        """Return peft's configuration of `module` alone.

        Rank and scale are set, so that peft need not match a pattern. What training needs is left
        out. Raises `UserError` if peft refuses the rest.
        """
        from peft import PeftConfig

        options = {
            k: v for k, v in self.content.items() if k in self._fields and k not in _LEFT_OUT
        }
        options |= {"peft_type": self.kind, "target_modules": [module]}
        if "rank_pattern" in self._fields:
            options |= {"r": self.rank(module), self.alpha_option: self.alpha(module)}
        if self.kind == "IA3":
            options["feedforward_modules"] = [module] if self._is_feedforward(module) else []
        try:
            return PeftConfig.from_peft_type(**options)
        except PEFT_ERRORS as error:
            raise UserError(f"peft refuses {FILE}: {first_line(error)}") from error

    @cached_property
    def _fields(self) -> set[str]:
        import dataclasses

        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[self.kind]]
        return {field.name for field in dataclasses.fields(kind)}

    def _is_feedforward(self, module: str) -> bool:
        named = self.content.get("feedforward_modules", [])
        names = named if isinstance(named, list) else []
        if not all(isinstance(name, str) for name in names) or isinstance(named, str):
            raise UserError(f"{FILE}: feedforward_modules is not a list of names")
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _check_types(self) -> None:
        rank, alpha = self.content.get("r", 8), self.content.get(self.alpha_option, 8)
        if self.kind == "LORA" and "lora_alpha" not in self.content:
            raise UserError(f"{FILE} has no lora_alpha: it is not a LoRA configuration")
        _check_rank("r", rank, least=0 if self.kind == "OFT" else 1)
        _check_alpha(self.alpha_option, alpha)
        others = {
            k: v for k, v in self.content.items() if k not in (self.alpha_option, "alpha_pattern")
        }
        _check_sizes(others)
        for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
            if not isinstance(self.content.get(key, False), bool):
                raise UserError(f"{FILE}: {key} is {self.content[key]!r}, expected true or false")
        for name, value in self._pattern("rank_pattern").items():
            _check_rank(f"rank_pattern of {name!r}", value)
        for name, value in self._pattern("alpha_pattern").items():
            _check_alpha(f"alpha_pattern of {name!r}", value)

    def _check_known(self) -> None:
        from peft import __version__

        unknown = [k for k, v in self.content.items() if v and k not in self._fields | _NOTES]
        if unknown:
            raise UserError(
                f"{FILE} sets {', '.join(sorted(unknown))}, which peft {__version__} does not "
                "know: merge the adapters with the peft that made them"
            )

    def _check_mergeable(self) -> None:
        for option, reason in UNMERGEABLE.items():
            if self.content.get(option):
                raise UserError(
                    f"{FILE} sets {option}, and {reason}: such adapters cannot be merged here"
                )
        if self.kind != "LORA" or self.start in (*PLAIN_STARTS, *BASE_CHANGING_STARTS):
            return
        if self.start.startswith("pissa_niter_"):
            raise UserError(
                f"{FILE} says init_lora_weights {self.start}: peft draws the base of such adapters "
                "anew at each load, so what they add is not known; save them with peft's "
                "path_initial_model_for_weight_conversion"
            )
        raise UserError(
            f"{FILE} says init_lora_weights {self.start}, which changes the base by what the "
            "folder does not hold: merge the adapters where they were trained"
        )

    def _pattern(self, name: str) -> dict[str, Any]:
        pattern = self.content.get(name, {})
        if not isinstance(pattern, dict):
            raise UserError(f"{FILE}: {name} is no table of module names")
        return pattern


_NOTES = {"peft_version", "base_model_name_or_path"}
"""Keys that peft writes into the file and that are no options of the adapters."""

_LEFT_OUT = {
    *("auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "lora_dropout", "modules_to_save", "revision"),
    *("rank_pattern", "alpha_pattern", "task_type", "loftq_config", "runtime_config"),
    *("eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying", "megatron_core"),
}
"""Options that choose modules or steer training, and change nothing in one module's merge."""


def _check_rank(name: str, value: Any, least: int = 1) -> None:
    if type(value) is not int or not least <= value <= _LARGEST_RANK:
        raise UserError(f"{FILE}: {name} is {_shown(value)}, expected a rank from {least} up")


def _check_alpha(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= _LARGEST_ALPHA:
        raise UserError(f"{FILE}: {name} is {_shown(value)}, expected a finite number")


def _check_sizes(options: Mapping[str, Any]) -> None:
    """Raise `UserError` for an integer, in a table of a table too, that would fill the memory."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            _check_sizes(value)
        elif isinstance(value, int) and abs(value) > _LARGEST_RANK:
            raise UserError(f"{FILE}: {key} is {_shown(value)}, expected at most {_LARGEST_RANK}")


def _shown(value: Any) -> str:
    """Return a value as it is printed, cut: an integer of thousands of digits cannot be printed."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)[:60]
