"""Decoders of fla's making around token mixers of ours."""

from pathlib import Path
from typing import Any, ClassVar

from fla.models.generation_utils import FLAUnsupportedCacheGenerationMixin
from fla.models.modeling_utils import FLAForCausalLM, FLAModel
from fla.modules import RMSNorm
from torch import nn

from flame.models.loading_note import write_loading_note


class Decoder(FLAModel):
    """Embeddings, blocks, norm: fla's decoder with the blocks of `block_class`."""

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


class CausalLM(FLAForCausalLM, FLAUnsupportedCacheGenerationMixin):
    """A decoder with a language-modelling head; folders it saves say how to load them."""

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
        """As in transformers; the folder gets a README that says which import loads it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_loading_note(Path(save_directory), self.config.model_type)
