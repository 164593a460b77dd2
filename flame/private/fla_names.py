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
    PrivateName(
        "fla.layers.delta_net:DeltaNet.forward",
        "0.6.0",
        "kernels.fla_decode: the forward around our decode step; so of the next two",
    ),
    PrivateName("fla.layers.gated_deltanet:GatedDeltaNet.forward", "0.6.0", "kernels.fla_decode"),
    PrivateName("fla.layers.kda:KimiDeltaAttention.forward", "0.6.0", "kernels.fla_decode"),
    PrivateName(
        "fla.layers.utils:get_layer_cache", "0.6.0", "models.mixer, kernels.decode_step.fla_layers"
    ),
    PrivateName(
        "fla.layers.utils:update_layer_cache",
        "0.6.0",
        "models.mixer, kernels.decode_step.fla_layers: what a layer keeps of a sequence",
    ),
)
