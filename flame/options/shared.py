"""What several stages declare in the same words."""

from typing import Literal

DType = Literal["auto", "float32", "bfloat16"]
"""Names of compute dtypes, as `flame.process.distributed.compute_dtype` takes them."""

StoredAs = Literal["float32", "bfloat16", "float16", "float8", "int8"]
"""Names of dtypes in which engines keep weights, states, keys and values; float8 is e4m3."""

DTYPE_HELP = "compute dtype; auto is bfloat16 on CUDA and float32 on a CPU"
