"""Full fp32 weights and the optimizer's moments in and out of a DeepSpeed engine, whatever its ZeRO stage.

Tensors leave and enter whole and under the model's own parameter names, so a checkpoint knows nothing of ranks and
partitions and any stage and world size can load it. (DeepSpeed's own files tie a checkpoint to both.)

The engine keeps fp32 weights in every precision (half precision is autocast), so weights are loaded into the model
before the engine is built and only the moments are restored after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import nn

from sparselt_dist.optim import state_keys


def trainable(engine: DeepSpeedEngine) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that the optimizer updates, tied ones once, in model order."""
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def gather_weights(engine: DeepSpeedEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and persistent buffer, whole, to be copied before the next. All ranks must iterate together."""
    for name, parameter in engine.module.named_parameters():
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            yield name, parameter.detach()
    for name, buffer in engine.module.named_buffers():
        owner = engine.module.get_submodule(name.rpartition(".")[0])
        if name.rpartition(".")[2] not in owner._non_persistent_buffers_set:
            yield name, buffer.detach()


def gather_moments(engine: DeepSpeedEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """The moments of all parameters, Adam's as `<parameter>#exp_avg` and `#exp_avg_sq`; zeros before the first step. To
    be copied before the next; all ranks together."""
    _create_states(engine)
    for name, parameter, keys in _with_state_keys(engine):
        for key in keys:
            if engine.zero_optimization_stage() == 0:
                value = engine.basic_optimizer.state[parameter][key]
            else:
                value = safe_get_full_optimizer_state(parameter, key)
            yield f"{name}#{key}", value.detach()


def num_bytes(engine: DeepSpeedEngine) -> int:
    """Of all weights and moments, whole ones; buffers apart."""

    def size(parameter: Any) -> int:  # under ZeRO-3 a rank holds a part
        return int(getattr(parameter, "ds_numel", parameter.numel())) * int(parameter.element_size())

    weights = sum(size(parameter) for parameter in engine.module.parameters())
    return weights + sum(len(keys) * size(parameter) for _, parameter, keys in _with_state_keys(engine))


def restore_moments(engine: DeepSpeedEngine, read: Callable[[str], torch.Tensor], steps_taken: int) -> None:
    """Put back what `gather_moments` gave; `read` takes its names. Sets Adam's own step count as well."""
    _create_states(engine)
    for name, parameter, keys in _with_state_keys(engine):
        for key in keys:
            value = read(f"{name}#{key}")
            if engine.zero_optimization_stage() == 0:
                engine.basic_optimizer.state[parameter][key].copy_(value)
            elif engine.zero_optimization_stage() == 3:
                safe_set_local_optimizer_state(parameter, _own_partition(engine, parameter, value), key)
            else:
                safe_set_full_optimizer_state(parameter, value.to(engine.device), key)
    for state in engine.basic_optimizer.state.values():
        if "step" in state:  # Muon counts none
            state["step"].fill_(float(steps_taken))


def _with_state_keys(engine: DeepSpeedEngine) -> Iterator[tuple[str, nn.Parameter, tuple[str, ...]]]:
    """`trainable`, and what the optimizer keeps for each; partitioned groups are all of one kind."""
    groups = engine.basic_optimizer.param_groups
    of_parameter = {id(parameter): state_keys(group) for group in groups for parameter in group["params"]}
    usual = state_keys(groups[0])
    for name, parameter in trainable(engine):
        yield name, parameter, of_parameter.get(id(parameter), usual)


def _own_partition(engine: DeepSpeedEngine, parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """This rank's slice under ZeRO-3, zero-padded; DeepSpeed 0.19 sets whole tensors only if they divide over ranks."""
    size, ranks = parameter.partition_numel(), dist.get_world_size()
    padded = nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
    return padded.narrow(0, size * dist.get_rank(), size).to(engine.device)


def optimizer_steps(engine: DeepSpeedEngine) -> int:
    """How many updates Adam has made (fp16 may have skipped some steps)."""
    counts = (state["step"] for state in engine.basic_optimizer.state.values() if "step" in state)
    return int(next(counts, torch.zeros(())).item())


def _optimizer_tensors(engine: DeepSpeedEngine) -> Iterator[tuple[torch.Tensor, tuple[str, ...]]]:
    """The tensors that the optimizer sees, parameters or this rank's flat fp32 partitions, and what it keeps for each."""
    stage, groups = engine.zero_optimization_stage(), engine.basic_optimizer.param_groups
    if stage > 0:
        optimizer = engine.optimizer
        flat = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
        yield from ((tensor, state_keys(groups[0])) for tensor in flat)
        return
    for group in groups:
        yield from ((parameter, state_keys(group)) for parameter in group["params"])


def _create_states(engine: DeepSpeedEngine) -> None:
    """The optimizer's states as they are before its first step, where they do not exist yet."""
    optimizer = engine.basic_optimizer
    for tensor, keys in _optimizer_tensors(engine):
        if keys[0] not in optimizer.state[tensor]:
            if "exp_avg" in keys:
                # torch keeps the count on the device for fused AdamW and as fp32 everywhere
                optimizer.state[tensor]["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            for key in keys:
                optimizer.state[tensor][key] = torch.zeros_like(tensor.data)
    if engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed 0.19 links parameters to their states after the FIRST group's first step, when the other groups have
        # none yet, and never again; so link anew.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _loss_scaler(engine: DeepSpeedEngine) -> Any:
    """The fp16 loss scaler, wherever the ZeRO stage keeps it; None in other precisions."""
    return engine.torch_autocast_z0_gradscaler or getattr(engine.optimizer, "torch_autocast_gradscaler", None)


def loss_scaler_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """State of the fp16 loss scaler, plain numbers; empty in other precisions."""
    scaler = _loss_scaler(engine)
    return {} if scaler is None else dict(scaler.state_dict())


def restore_loss_scaler(engine: DeepSpeedEngine, state: dict[str, Any]) -> None:
    """Put back what `loss_scaler_state` gave; a change of precision starts a fresh one."""
    scaler = _loss_scaler(engine)
    if scaler is not None and state:
        scaler.load_state_dict(state)
