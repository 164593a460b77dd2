"""Names of fla (flash-linear-attention) that this project replaces, registers with or sets."""

from flame.private.names import PrivateName

NAMES = (
    PrivateName("fla.backends:BaseBackend", "0.6.0", "kernels.fla_cpu: what ours extends"),
    PrivateName("fla.backends:register", "0.6.0", "kernels.fla_cpu: our operators"),
    PrivateName("fla.backends:dispatch", "0.6.0", "kernels.fla_cpu: operators without dispatch"),
    PrivateName(
        "fla.modules.fused_cross_entropy:FusedCrossEntropyLoss.forward",
        "0.6.0",
        "kernels.fla_cpu: it asserts an accelerator",
    ),
    PrivateName(
        "fla.modules.mlp:SwiGLULinear",
        "0.6.0",
        "recovery.lora: `fuse_swiglu` of the gated MLP, unset where `down_proj` is adapted",
    ),
    PrivateName(
        "fla.models.utils:Cache",
        "0.6.0",
        "models.mixer, launch.speed.caches: the layout of a model's recurrent state",
    ),
)
