"""Loading a tokenizer of a stranger's files.

- `files`: what the files must look like, and how much they may make of a text.
- `trial`: loading them in a process of their own first, within bounds of time and memory.
- `child`: what that process runs.
- `loading`: loading them here.
"""
