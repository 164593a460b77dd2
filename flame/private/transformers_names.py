"""Private names of transformers."""

from flame.private.names import PrivateName

NAMES = (
    PrivateName(
        "transformers:AutoModelForCausalLM._model_mapping",
        "5.23",
        "checkpoint.convert: the class of a config; launch.serving.footprint has another's",
    ),
    PrivateName(
        "transformers:PreTrainedTokenizerFast._encode_plus",
        "5.23",
        "data.tokenizer: a class with another encodes through it and not by the backend alone",
    ),
    PrivateName(
        "transformers:PreTrainedModel._no_split_modules",
        "5.23",
        "model: classes of blocks, which FSDP2 groups",
    ),
    PrivateName(
        "transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected",
        "5.23",
        "hugging_face.stock_form: tensors that a class leaves out",
    ),
    PrivateName(
        "transformers.conversion_mapping:register_checkpoint_conversion_mapping",
        "5.23",
        "models.glm5_next_text: tensors of the whole class, without `language_model`",
    ),
    *(
        PrivateName(
            f"transformers.{path}",
            "5.6 to 5.23",
            "hugging_face.stock_form: without an underscore, but documented nowhere",
        )
        for path in (
            "core_model_loading:WeightTransform.rename_source_key",
            "core_model_loading:WeightTransform.reverse_transform",
            "core_model_loading:WeightTransform.add_tensor",
            "core_model_loading:WeightConverter.convert",
            "core_model_loading:PrefixChange",
            "core_model_loading:WeightRenaming",
            "core_model_loading:dot_natural_key",
            "conversion_mapping:get_model_conversion_mapping",
            "modeling_utils:PreTrainedModel.get_expanded_tied_weights_keys",
        )
    ),
)

MARKS = ("_is_hf_initialized", "_no_weight_decay", "_is_attnres_proj")
"""Attributes that our model classes set on parameters, for transformers and fla to read."""
