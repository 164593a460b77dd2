"""Adapters of a model whose input and output embedding are one tensor."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from flame.errors import UserError
from flame.hugging_face.ties import OUTPUT_EMBEDDING, input_embedding, is_tied


class Ties:
    """The tied embeddings of a model, empty if it ties none.

    Args:
        config: the model's `config.json`.
        names: the tensors that its checkpoint holds.
    """

    def __init__(self, config: Mapping[str, Any], names: Collection[str]) -> None:
        twin = input_embedding(names) if config and is_tied(config) else None
        self.names = (OUTPUT_EMBEDDING, twin) if twin else ()
        """The names of the output and of the input embedding."""
        self.repeated = {OUTPUT_EMBEDDING} if twin else set()
        """Names that repeat another tensor."""

    def check(
        self,
        adapted: Collection[str],
        replaced: Mapping[str, str],
        read: Callable[[str], Tensor],
        saved: Any,
    ) -> None:
        """Raise `UserError` if adapters change one embedding and not the other.

        peft unties a model there: what it computes is no model with tied embeddings.

        Args:
            adapted: modules with adapters.
            replaced: names in the adapter file, by the parameters that they replace.
            read: reads a tensor of the adapter file.
            saved: peft's `modules_to_save`, of which peft makes copies. An input embedding that is
                replaced without being named there stays tied, as in a run of this project.
        """
        if not self.names:
            return
        head, twin = self.names
        touched = [name for name in self.names if name.removesuffix(".weight") in adapted]
        if head in replaced or (twin in replaced and saved):
            both = head in replaced and twin in replaced
            if not both or not torch.equal(read(replaced[head]), read(replaced[twin])):
                touched += [name for name in self.names if name in replaced]
        if touched:
            raise UserError(
                f"the adapters change {' and '.join(touched)}, and config.json ties {head} to "
                f"{twin}: peft would untie them; give the base an {head} of its own and set "
                "tie_word_embeddings to false"
            )
