"""Hugging Face folders: read as transformers loads them, written as it saves them.

- `config_file`, `config_keys`: `config.json` read, and refused or warned of where it cannot be
  meant.
- `safetensors_source`: the tensors of a folder under the names that they have on the disk.
- `stock_form`, `regrouped_source`: what the stock class calls them, and how one becomes the other.
- `model_folder`: a folder as a source of the stock class's tensors; a folder written and read back.
- `ties`: which tensors are one. `companions`, `model_card`: what lies beside the weights.
"""
