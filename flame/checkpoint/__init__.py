"""Checkpoints: saving and loading whole steps, and any model reference as a source of tensors.

- `steps`, `save`, `background`, `manager`: what makes a step whole; saving, resuming, purging.
- `reference`: a run, a step, a Hugging Face folder or a hub name, found on this machine.
- `source`, `dcp_source`, `lora_source`: a model read tensor by tensor.
- `fingerprint`, `adapter_names`, `peft_folder`: what identifies and names tensors.
- `load`, `convert`: loading into models, sharded or not; DCP <-> Hugging Face.
"""
