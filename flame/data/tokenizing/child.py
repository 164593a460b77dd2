"""Loads a tokenizer and encodes a little text; what is wrong with it ends this process alone.

It is run as a file, with `tokenizer.json` or a folder without one. Its output is the reason why
the tokenizer cannot be used, in one line; its status is 1 then, and 0 where it can be.
"""

import resource
import sys

SECONDS = 60
"""Most processor time."""

MEMORY = {True: 6 * 2**30, False: 24 * 2**30}
"""Most bytes of addresses, with the tokenizers library alone and with transformers."""

MOST_TOKENS = 64
"""Most tokens of one character."""

TEXTS = (
    "The state's size: 12,345.67 bytes\n\tdef f(x):\r\n    return x ** 2",
    "\u00a0\u2014 \u00e9 \u6570 \U0001f642",
    "".join(map(chr, range(32, 127))),
    "a" * 3000,
    " " * 3000,
    "\n" * 1000,
    "ab " * 1000,
    "\u0301" * 300 + "\ufdfa" * 100,
)


def main(path: str) -> None:
    alone = path.endswith(".json")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY[alone],) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    encode = _library(path) if alone else _transformers(path)
    for text in TEXTS:
        count = len(encode(text))
        if count > MOST_TOKENS * len(text):
            raise ValueError(f"it makes {count} tokens of {len(text)} characters")


def _library(path: str):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _transformers(path: str):  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def report(kind: type[BaseException], error: BaseException, _: object) -> None:
    """Print an error, which may be a panic of compiled code, in one line."""
    lines = str(error).strip().splitlines() or [kind.__name__]
    print(lines[0][:300].encode("ascii", "backslashreplace").decode(), flush=True)


if __name__ == "__main__":
    sys.excepthook = report
    main(sys.argv[1])
