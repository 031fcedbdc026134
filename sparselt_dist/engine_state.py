"""fp32 weights and the optimizer's moments in and out of a DeepSpeed engine, whatever its ZeRO stage.

Each rank gives the elements that it holds, by the model's own names and places in whole tensors, and takes those that it will
hold: no communication, and any stage and world size can load what another saved. (DeepSpeed's own files tie a checkpoint to
both.)

The engine keeps fp32 weights in every precision (half precision is autocast), so weights are loaded into the model
before the engine is built and only the moments are restored after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state
from torch import nn

from sparselt_dist.optim import state_keys
from sparselt_dist.tensor_files import Slice, cut


def trainable(engine: DeepSpeedEngine) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that the optimizer updates, tied ones once, in model order."""
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def own_weights(engine: DeepSpeedEngine) -> Iterator[Slice]:
    """What this rank saves of parameters and persistent buffers: what it alone holds, and its share of what all hold. Views
    of what training changes, to be copied at once."""
    held_by_all: list[tuple[str, torch.Tensor]] = []
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            yield from _partition(name, parameter, parameter.ds_tensor)
        else:
            held_by_all.append((name, parameter.detach()))
    for name, buffer in engine.module.named_buffers():
        owner = engine.module.get_submodule(name.rpartition(".")[0])
        if name.rpartition(".")[2] not in owner._non_persistent_buffers_set:
            held_by_all.append((name, buffer.detach()))
    yield from cut(held_by_all, dist.get_rank(), dist.get_world_size())


def own_moments(engine: DeepSpeedEngine) -> Iterator[Slice]:
    """What this rank saves of the moments of all parameters, Adam's as `<parameter>#exp_avg` and `#exp_avg_sq`; zeros before
    the first step. Views, as those of `own_weights`."""
    _create_states(engine)
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        yield from _flat_moments(engine)
        return
    held_by_all: list[tuple[str, torch.Tensor]] = []
    for name, parameter, keys in _with_state_keys(engine):
        for key in keys:
            if stage == 0:
                held_by_all.append((f"{name}#{key}", engine.basic_optimizer.state[parameter][key]))
            else:
                yield from _partition(f"{name}#{key}", parameter, safe_get_local_optimizer_state(parameter, key))
    yield from cut(held_by_all, dist.get_rank(), dist.get_world_size())


def num_bytes(engine: DeepSpeedEngine) -> int:
    """Of all weights and moments, whole ones; buffers apart."""

    def size(parameter: Any) -> int:  # under ZeRO-3 a rank holds a part
        return int(getattr(parameter, "ds_numel", parameter.numel())) * int(parameter.element_size())

    weights = sum(size(parameter) for parameter in engine.module.parameters())
    return weights + sum(len(keys) * size(parameter) for _, parameter, keys in _with_state_keys(engine))


def restore_moments(engine: DeepSpeedEngine, read: Callable[[str, int, int], torch.Tensor], steps_taken: int) -> None:
    """Put back what all ranks' `own_moments` gave; `read` takes a name, the first element and how many. Sets Adam's own step
    count as well. No communication."""
    _create_states(engine)
    if engine.zero_optimization_stage() in (1, 2):
        for own in _flat_moments(engine):
            own.values.copy_(read(own.name, own.start, own.values.numel()))
    else:
        for name, parameter, keys in _with_state_keys(engine):
            for key in keys:
                if engine.zero_optimization_stage() == 0:
                    value = engine.basic_optimizer.state[parameter][key]
                    value.copy_(read(f"{name}#{key}", 0, value.numel()).view_as(value))
                else:
                    safe_set_local_optimizer_state(parameter, _read_partition(parameter, f"{name}#{key}", read), key)
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


def _flat_moments(engine: DeepSpeedEngine) -> Iterator[Slice]:
    """Views of this rank's moments under ZeRO-1 and 2, where each group's parameters lie one behind the other in a flat tensor
    that is cut into equal partitions. (DeepSpeed's own map of it is wrong with `round_robin_gradients`.)"""
    optimizer, rank = engine.optimizer, dist.get_rank()
    names = {id(parameter): name for name, parameter in trainable(engine)}
    keys = state_keys(engine.basic_optimizer.param_groups[0])
    for flat, parameters, offsets in zip(
        optimizer.single_partition_of_fp32_groups,
        optimizer.round_robin_bit16_groups,
        optimizer.round_robin_bit16_offsets,
        strict=True,
    ):
        first, state = flat.numel() * rank, engine.basic_optimizer.state[flat]
        for parameter, offset in zip(parameters, offsets, strict=True):
            start, stop = max(offset, first), min(offset + parameter.numel(), first + flat.numel())
            if start < stop or (parameter.numel() == 0 and rank == 0):
                for key in keys:
                    values = state[key][start - first : stop - first]
                    yield Slice(f"{names[id(parameter)]}#{key}", tuple(parameter.shape), start - offset, values)


def _partition(name: str, parameter: Any, held: torch.Tensor) -> Iterator[Slice]:
    """What this rank holds of a parameter or moment under ZeRO-3, without the padding."""
    start, numel = _place(parameter)
    if numel > 0 or (parameter.ds_numel == 0 and dist.get_rank() == 0):
        yield Slice(name, tuple(parameter.ds_shape), start, held.detach()[:numel])


def _place(parameter: Any) -> tuple[int, int]:
    """First element and number of elements of this rank's partition under ZeRO-3."""
    start = min(parameter.partition_numel() * dist.get_rank(), parameter.ds_numel)
    return start, min(parameter.partition_numel(), parameter.ds_numel - start)


def _read_partition(parameter: Any, name: str, read: Callable[[str, int, int], torch.Tensor]) -> torch.Tensor:
    values = read(name, *_place(parameter))
    return nn.functional.pad(values, (0, parameter.partition_numel() - values.numel()))


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
