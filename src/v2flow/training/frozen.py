"""Checkpoints without frozen weights: what does not learn is rebuilt from where it came from."""

from typing import Any

from torch import nn


def leave_out_frozen(module: nn.Module) -> None:
    """From now on the state of `module` holds the parameters that require gradients alone, and loading it misses no
    others. Copies of the module do the same."""
    module.register_state_dict_post_hook(_keep_trained)
    module.register_load_state_dict_post_hook(_forgive_frozen)


def trained_names(module: nn.Module) -> set[str]:
    """Names of the parameters that require gradients."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def _keep_trained(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    kept = {prefix + name for name in trained_names(module)}
    for name in [name for name in state if name.startswith(prefix) and name not in kept]:
        del state[name]


def _forgive_frozen(module: nn.Module, keys: Any) -> None:
    trained = trained_names(module)
    # Inside an average of the weights the names have a prefix.
    keys.missing_keys[:] = [name for name in keys.missing_keys if name.removeprefix("module.") in trained]
