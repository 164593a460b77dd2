"""Checkpoints: saving and loading whole steps, and any model reference as a source of tensors.

- `steps`, `save`, `background`, `manager`: what makes a step whole; saving, resuming, purging.
- `reference`: a run, a step, a Hugging Face folder or a hub name, found on this machine.
- `source`, `dcp_source`: a model read tensor by tensor.
- `verify`: hashes compared once for all ranks of a job.
- `fingerprint`: what identifies a model.
- `load`, `convert`: loading into models, sharded or not; DCP <-> Hugging Face.
"""
