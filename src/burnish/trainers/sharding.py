"""The frozen weights of the network spread over processes, where `accelerate launch` asks for FSDP2.

Only they are: an adapter, its gradient and its optimiser are small, stay whole on every process, and are averaged and
stored as ever. Every process has to call the network equally often, then, for each call gathers weights.
"""

import os
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from burnish.errors import UserError
from burnish.policies import Policy
from burnish.policies.trained import Adapter


def shard(policy: Policy, accelerator: Accelerator) -> None:
    """Spread the network's frozen weights over the processes, a transformer block a unit, if the launch says so.

    accelerate itself would shard the adapter too, and looks at FSDP on accelerators only; its plugin is read here, so
    that CPUs do the same. UserError for DeepSpeed and FSDP1, for a network of which all is trained, and for a merged
    adapter.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError(
            "burnish does not train under DeepSpeed: an adapter's optimiser is too small to be worth ZeRO, and frozen "
            "weights are spread by FSDP2: accelerate launch --config_file recipes/accelerate/fsdp2.yaml"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or not dist.is_initialized():
        return
    plugin: Any = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError("the launch asks for FSDP1, and burnish shards by FSDP2: set fsdp_version: 2")
    if not isinstance(policy.trained, Adapter):
        raise UserError("lora=null trains all weights, which burnish does not shard: set lora, or launch without FSDP")
    if policy.trained.merged:
        raise UserError("lora.merged adds the adapter into weights that FSDP spreads: set lora.merged=false")
    network: Any = policy.module
    whole = {p for p in network.parameters() if p.requires_grad or not p.is_floating_point()}  # 4-bit weights, too
    options = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "reshard_after_forward": plugin.reshard_after_forward,
        "ignored_params": whole,
    } | ({"offload_policy": plugin.cpu_offload} if plugin.cpu_offload else {})
    names = {*(getattr(network, "_no_split_modules", None) or ()), *(getattr(network, "_repeated_blocks", None) or ())}
    for module in reversed(list(network.modules())[1:]):  # those inside others first
        if type(module).__name__ in names:
            fully_shard(module, **options)
    fully_shard(network, **options)
    policy.sharded = True
