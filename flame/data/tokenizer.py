"""Loading, training and applying tokenizers."""

from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame.data.hub import download, hub_problem
from flame.data.tokenizing.loading import FILES, load_folder, one_line
from flame.errors import UserError, first_line

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
"""Every byte, and the end of text."""

CHUNK_DOCUMENTS = 64
CHUNK_CHARACTERS = 1 << 17
"""Documents and characters after which a chunk ends. A chunk is tokenised in one call: it is large
enough to keep the tokenizer busy, and small enough not to be waited for."""

_NEW = " (for a new model, `slimstate tokenizer FOLDER` makes one)"


def load_tokenizer(reference: str) -> Any:
    """Return the tokenizer in a folder, or that of a hub model (cached or from the network).

    Code that comes with a tokenizer is never run.

    Raises:
        UserError: the folder has no tokenizer, or the hub cannot be reached.
    """
    if not reference:
        raise UserError("no tokenizer: give data.tokenizer (a folder or a hub name)")
    path = Path(reference).expanduser()
    if path.exists():
        return load_folder(path)
    if path.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1:
        raise UserError(f"tokenizer folder {reference} does not exist{_NEW}")
    try:
        folder = download(reference, FILES)
    except UserError as error:
        reason = hub_problem() or first_line(error)
        raise UserError(
            f"cannot load tokenizer {reference!r}: it is no local folder, and as a hub name it "
            f"cannot be loaded: {reason}{_NEW}"
        ) from error
    return load_folder(folder)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> Any:
    """Train a byte-level BPE on `texts`, save it in `folder` and return it.

    The same texts in the same order give the same files. The tokenizer can encode every text; its
    end of text and its padding are `<|endoftext|>`, id 0. The method is that of Sennrich et al.
    (arXiv 1508.07909), over bytes as in GPT-2.

    Raises:
        UserError: `vocab_size` is below 257.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"a byte-level vocabulary of {vocab_size} is too small: "
            f"it takes at least {SMALLEST_VOCABULARY}"
        )
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raise `UserError` if the tokenizer may give text ids of `vocab_size` or more."""
    largest = largest_id(tokenizer)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer has token ids up to {largest}, beyond the model's vocabulary of "
            f"{vocab_size}: use the model's own tokenizer, or set vocab_size to {largest + 1}"
        )


def largest_id(tokenizer: Any) -> int:
    """Return the largest id that text can have.

    A padding token is not counted if it is a special one, as text that spells it is encoded like
    any other (`Encoder`).
    """
    padding, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    spared = {padding} & special - {end}
    return max((i for i in tokenizer.get_vocab().values() if i not in spared), default=-1)


class Encoder:
    """Turns texts into token ids, with an end-of-text token after each if `add_eos`.

    No token is put before a text, and an empty text has no tokens. Text that spells a special token
    is encoded like any other: only the end-of-text token that is asked for is special. Raises
    `UserError` if the tokenizer lacks it, or cannot encode a text.
    """

    def __init__(self, tokenizer: Any, add_eos: bool) -> None:
        if add_eos and tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token: set data.add_eos to false")
        self.tokenizer = tokenizer
        self.end = [tokenizer.eos_token_id] if add_eos else []
        self._largest = largest_id(tokenizer)
        self._is_stock = _encodes_as_its_backend(tokenizer)

    def stream(self, texts: Iterator[str]) -> Iterator[NDArray[np.int64]]:
        """Yield the token ids `[n]` of each text; n is 0 for an empty one."""
        for chunk in chunks(texts):
            # One array for the chunk: numpy's calls would cost more than a short text's tokens.
            parts = [(ids, self.end if ids else []) for ids in self._ids(chunk)]
            bounds = [0, *accumulate(len(ids) + len(end) for ids, end in parts)]
            tokens = chain.from_iterable(chain.from_iterable(parts))
            whole = self._checked(np.fromiter(tokens, np.int64, bounds[-1]))
            for start, stop in pairwise(bounds):
                yield whole[start:stop]

    def stream_with_bytes(self, texts: Iterator[str]) -> Iterator[NDArray[np.int64]]:
        """Yield ids and UTF-8 bytes `[2, n]` of each text's tokens; the bytes sum to the text's.

        A character that spans several tokens counts with the first of them; the end-of-text token
        has no bytes. Raises `UserError` if the tokenizer is not a fast one.
        """
        if not self.tokenizer.is_fast:
            raise UserError("counting bytes needs a fast tokenizer (tokenizer.json): convert it")
        for chunk in chunks(texts):
            encoded = self._encode(chunk, return_offsets_mapping=True)
            for text, ids, spans in zip(
                chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True
            ):
                end = self.end if ids else []
                sizes = [*token_bytes(text, spans), *([0] * len(end))]
                self._checked(np.array(ids, dtype=np.int64))
                yield np.array([[*ids, *end], sizes], dtype=np.int64)

    def _ids(self, texts: list[str]) -> Iterable[list[int]]:
        """Return the ids of each text, by the shortest way: without offsets, masks or copies."""
        if not self._is_stock:
            return self._encode(texts)["input_ids"]
        backend = self.tokenizer.backend_tokenizer
        # Others that share the tokenizer may have set these; its own calls set them anew.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        with one_line("the tokenizer cannot encode a text"):
            found = backend.encode_batch_fast(texts, add_special_tokens=False)
        return (encoding.ids for encoding in found)

    def _encode(self, texts: list[str], **options: Any) -> Any:
        with one_line("the tokenizer cannot encode a text"):
            return self.tokenizer(
                texts,
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
                **options,
            )

    def _checked(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        if ids.size and not 0 <= ids.min() <= ids.max() <= self._largest:
            raise UserError(
                f"the tokenizer gives id {ids.max()}, beyond its own vocabulary's largest, "
                f"{self._largest}: use another tokenizer"
            )
        return ids


def _encodes_as_its_backend(tokenizer: Any) -> bool:
    """Return whether a fast tokenizer's class adds nothing to what its compiled backend does."""
    from transformers import PreTrainedTokenizerFast

    own = getattr(type(tokenizer), "_encode_plus", None)
    return tokenizer.is_fast and own is PreTrainedTokenizerFast._encode_plus


def token_bytes(text: str, spans: list[tuple[int, int]]) -> NDArray[np.int64]:
    """Return the UTF-8 bytes `[n]` of each token, which sum to those of `text`.

    `spans` says where each token's characters begin and end. Characters between spans count with
    the next token, those after the last span with the last token.
    """
    if not spans:
        return np.zeros(0, dtype=np.int64)
    code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = 1 + sum((code_points >= bound).astype(np.int64) for bound in (0x80, 0x800, 0x10000))
    position = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    ends = np.maximum.accumulate(np.array([end for _, end in spans]))
    ends[-1] = len(text)
    return np.diff(position[ends], prepend=0)


def chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    """Yield `texts` in lists, ended by the 64th text or by the one that passes 2¹⁷ characters."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if len(chunk) >= CHUNK_DOCUMENTS or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
