"""Running a model as an engine decodes it: each token's states are stored in few bits, read again.

The delta-rule operator is replaced where a model's mixers look it up, as `pruning.taps` does it, by
one that goes from token to token and rounds every state when its token is done
(`kernels.stored_states`). Everything else is the model's own: convolution windows, keys and values
of softmax layers, and the dtype of activations. So all text, a prompt too, is read as if it were
decoded. An engine reads a prompt in chunks and stores a state at its end alone, which is kinder.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from kernels.gated_delta_product import spread
from kernels.gated_delta_rule.chunk import Options, gate_beta
from kernels.stored_states import StateStorage, stored_delta_rule
from pruning.adapters.interface import Adapter
from pruning.mixers import find_mixers
from pruning.op_call import arguments_by_name, log_decay
from pruning.taps import replaced


@contextmanager
def storing_states(model: nn.Module, adapter: Adapter, storage: StateStorage) -> Iterator[None]:
    """Let `model` keep its recurrent states in `storage` while the context is open; no gradients.

    Other models of the family, such as the one to compare with, are left alone. A cached state is
    one that was stored, but the residual of error feedback ends with the operator's call.
    """
    running: list[nn.Module] = []

    def wrap(op: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(op)

        def stored(*args: Any, **kwargs: Any) -> Any:
            if not running:
                return op(*args, **kwargs)
            steps = getattr(running[-1], "num_householder", 1)
            return _stored(arguments_by_name(signature, args, kwargs), storage, steps)

        return stored

    with ExitStack() as stack:
        for mixer in find_mixers(model, adapter).values():
            before = mixer.register_forward_pre_hook(lambda module, args: running.append(module))
            stack.callback(before.remove)
            # always_call: a forward pass that raises must not leave its layer behind.
            after = mixer.register_forward_hook(
                lambda module, args, out: running.clear(), always_call=True
            )
            stack.callback(after.remove)
        for site in adapter.op_sites:
            stack.enter_context(replaced(site, wrap))
        yield


def _stored(
    arguments: dict[str, Any], storage: StateStorage, steps: int
) -> tuple[Tensor, Tensor | None]:
    """What the operator called with `arguments` returns, its states stored after each token."""
    q, k, v = (arguments[name] for name in "qkv")
    g, bounds = log_decay(arguments), arguments.get("cu_seqlens")
    # The delta product's chunk operator has a query and a decay a token, its other operator a row.
    per_token = q.shape[1] != k.shape[1]
    if per_token:
        q, g = spread(q, steps, steps - 1), None if g is None else spread(g, steps, 0)
        bounds = None if bounds is None else bounds * steps
    options = Options(
        arguments.get("scale"),
        arguments.get("initial_state"),
        arguments.get("output_final_state", False),
        arguments.get("use_qk_l2norm_in_kernel", False),
        bounds,
        arguments.get("state_v_first", arguments.get("transposestate_layout", False)),
    )
    flags = ("use_beta_sigmoid_in_kernel", "allow_neg_eigval")
    beta = gate_beta(arguments["beta"], *(arguments.get(flag, False) for flag in flags))
    o, state = stored_delta_rule(q, k, v, beta, g, options, storage, steps)
    return o[:, steps - 1 :: steps].contiguous() if per_token else o, state
