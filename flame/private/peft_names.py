"""Names of peft that its API does not promise: how a layer with adapters is built."""

from flame.private.names import PrivateName

NAMES = (
    PrivateName(
        "peft.tuners.lora.layer:LoraLayer.adapter_layer_names",
        "0.21.2",
        "lora.names: a layer's `lora_A`, `lora_B` and `lora_magnitude_vector`",
    ),
    PrivateName(
        "peft.tuners.lora.dora:DoraLinearLayer.forward",
        "0.21.2",
        "recovery.dora: the call that our layer takes in its place",
    ),
)
