"""Checkpoints: whole steps on disk, safe reading, and any model reference as a source of tensors.

- `checksums`, `steps`: what makes a step whole; saving, loading, verifying and purging steps.
- `safe`, `writer`: DCP with an allow-list unpickler and a hash per file.
- `reference`, `source`, `lora_source`: run, step, HF folder or hub name, read tensor by tensor.
- `fingerprint`, `load`, `convert`: identity, loading into (sharded) models, DCP <-> HF.
"""
