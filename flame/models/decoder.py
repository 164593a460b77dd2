"""Decoder and causal language model shared by our families: fla's, with blocks of our own."""

from pathlib import Path
from typing import Any, ClassVar

from fla.models.generation_utils import FLAUnsupportedCacheGenerationMixin
from fla.models.modeling_utils import FLAForCausalLM, FLAModel, FLAPreTrainedModel
from fla.modules import RMSNorm
from torch import nn

from flame.models import write_loading_note


class _PreTrained(FLAPreTrainedModel):
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_cache_class = True


class Decoder(_PreTrained, FLAModel):
    """Embeddings, blocks of `block_class` and a final norm, without a language-modelling head."""

    block_class: ClassVar[type[nn.Module]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        depth = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(self.block_class(config, layer) for layer in depth)
        norm = RMSNorm if config.fuse_norm else nn.RMSNorm
        self.norm = norm(config.hidden_size, eps=config.norm_eps)
        self.use_attnres = config.attnres_block_size is not None
        if self.use_attnres:
            self.res_proj = nn.Linear(config.hidden_size, 1, bias=False)
            self.res_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
            self.res_proj._is_attnres_proj = True
        self.gradient_checkpointing = False
        self.post_init()


class CausalLM(_PreTrained, FLAForCausalLM, FLAUnsupportedCacheGenerationMixin):
    """A decoder with a language-modelling head."""

    decoder_class: ClassVar[type[Decoder]]
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.criterion = None
        self.post_init()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, and add a README that says which import loads the folder."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_loading_note(Path(save_directory), self.config.model_type)


class MixerBlock(nn.Module):
    """Put before fla's block among the bases: makes `attn` a `mixer_class` in recurrent layers.

    The config's `layer_widths()` maps the number of each recurrent layer to its widths.
    """

    mixer_class: ClassVar[type[nn.Module]]

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        widths = config.layer_widths().get(layer_idx)
        if widths is not None:
            self.attn = self.mixer_class(config, layer_idx, widths)
