"""Names of torchtitan that its own API does not promise, private or replaced here."""

from flame.private.names import PrivateName

NAMES = (
    PrivateName(
        "torchtitan.protocols.train_spec:_extra_train_specs",
        "0.2.2",
        "training.train_spec: whether the spec is registered already",
    ),
    PrivateName(
        "torchtitan.components.optimizer:OptimizersContainer._post_init",
        "0.2.2",
        "training.optimizer: what torchtitan's constructor ends with",
    ),
    PrivateName(
        "torchtitan.tools.utils:device_type", "0.2.2", "process.titan_cpu: set when it is imported"
    ),
    PrivateName(
        "torchtitan.tools.utils:get_peak_flops", "0.2.2", "process.titan_cpu: replaced on a CPU"
    ),
    PrivateName(
        "torchtitan.components.metrics:build_device_memory_monitor",
        "0.2.2",
        "process.titan_cpu: replaced on a CPU",
    ),
    PrivateName(
        "torchtitan.distributed.utils:set_pg_timeouts",
        "0.2.2",
        "process.titan_cpu: replaced on a CPU",
    ),
)
