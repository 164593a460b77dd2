"""Text to token batches: sources of documents, tokenizers, packing, loading, held-out sets.

`config` holds the recipe's `[data]`; `sources` finds the documents (`corpus` the embedded ones),
`mixing` draws on several in given shares;
`packing` cuts them into rows; `loader` deals the rows out to ranks, resumable at any world size;
`heldout` measures bytes beside tokens; `tokenizer` loads and trains tokenizers; `hub` tells early
that there is no network.
"""
