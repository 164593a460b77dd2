"""A causal language model of GLM-5.3's text model, for which transformers 5.23 has no class.

transformers has the text model without a head, and with one the model of text and images. This is
the former with the latter's head: names and values are those of `Glm5NextForConditionalGeneration`
without its `language_model`, and the folder of either loads in the other's place.
"""

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
from transformers.models.glm5_next.modeling_glm5_next import (
    Glm5NextForConditionalGeneration,
    Glm5NextPreTrainedModel,
    Glm5NextTextModel,
)
from transformers.utils import can_return_tuple


class Glm5NextTextForCausalLM(Glm5NextPreTrainedModel, GenerationMixin):
    """The stock text model with a language-modelling head."""

    config: Glm5NextTextConfig
    config_class = Glm5NextTextConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    create_masks_for_generate = staticmethod(
        Glm5NextForConditionalGeneration.create_masks_for_generate
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Glm5NextTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # The stock class ignores the layer after the last of a model with 45, which is an MTP head.
        self._keys_to_ignore_on_load_unexpected = [
            r"^model\.visual\.",
            rf"layers\.{config.num_hidden_layers}\.",
            r"layers\.\d+\.shared_head\.",
        ]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Predict tokens. Arguments and results are those of transformers' causal models.

        The loss, given with `labels`, is without that of the router's balance.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


register_checkpoint_conversion_mapping(
    Glm5NextTextForCausalLM.__name__,
    [PrefixChange(prefix_to_remove="language_model", model_prefix="model")],
    overwrite=True,
)

CLASSES = (Glm5NextTextConfig, Glm5NextTextModel, Glm5NextTextForCausalLM)
