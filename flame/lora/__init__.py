"""Adapters of peft as they lie on a disk: their names, their configuration, and their merge.

- `names`: of tensors, in a model with adapters and in peft's files.
- `config`, `patterns`: `adapter_config.json`, checked; ranks and scales by module.
- `merging`, `source`: peft's merge of one module; a whole model, merged when it is read.
- `base`, `peft_folder`: the model that adapters belong to; writing a folder that peft loads.
"""
