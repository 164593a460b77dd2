"""From text to batches of tokens.

- `config`: the recipe's `[data]`.
- `sources`, `documents`, `local_files`, `hub`: finding sets of documents and reading them.
- `corpus`, `mqar`, `mqar_tokens`: the embedded text, and generated associative recall.
- `mixing`: several sources in given shares.
- `tokenizer`, `packing`: token ids, cut into rows.
- `loader`, `loader_checks`: rows dealt out to ranks, resumable at any world size.
- `heldout`: held-out text, with the bytes that its tokens stand for.
"""
