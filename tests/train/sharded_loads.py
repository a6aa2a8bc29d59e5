"""Models that two processes load and shard with FSDP2: accelerate launch ... sharded_loads.py FOLDER.

Each folder in FOLDER is loaded whole and in shards. Prints, in each process, the bytes that it has allocated for the
model in both ways, and whether weights and training agree bit for bit.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from distributed_runs import join_fsdp
from tiny_training import comparisons, loop, numbers, same, settings, supervised, weights

from align.models.policy import load_policy
from align.models.settings import LoraSettings, PolicySettings
from align.models.weights import fingerprint
from align.train.sharding.accelerator import make_accelerator, sharded_loading

LORA = LoraSettings(rank=2, modules_to_save=["lm_head"])


def allocated():
    """Bytes of all tensors in main memory, each storage once."""
    gc.collect()
    found = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    found = [getattr(each, "_local_tensor", each) for each in found]
    storages = [each.untyped_storage() for each in [*found, *(getattr(each, "shard", each) for each in found)]]
    return sum({each.data_ptr(): each.nbytes() for each in storages if each.device.type == "cpu"}.values())


def trained(folder, work, *, in_shards, **changes):
    """Load, train for two steps, and return bytes after loading, fingerprint, metrics and weights."""
    join_fsdp()
    accelerator = make_accelerator(settings(**changes))
    asked = PolicySettings(path=str(folder), lora=LORA if "lora" in folder.name else None)
    before = allocated()
    if in_shards:
        with sharded_loading(accelerator, asked.lora):
            policy, _ = load_policy(asked)
    else:
        policy, _ = load_policy(asked)
    held, largest = allocated() - before, max(value.numel() * 4 for value in policy.parameters())
    made = loop(work, supervised(), comparisons(16), model=policy, accelerator=accelerator, **changes)
    start = made.initial_weights
    made.run()
    found = held, largest, start, numbers(work), weights(made.policy), fingerprint(made.policy)
    accelerator.free_memory()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        changes = {"precision": "bf16", "weights": "bf16_master"} if "master" in folder.name else {}
        work = folder.parents[1] / "work" / folder.name
        whole, shards = (
            trained(folder, work / str(in_shards), in_shards=in_shards, **changes) for in_shards in (False, True)
        )
        told = {
            "case": folder.name,
            "whole": whole[0],
            "shards": shards[0],
            "largest": shards[1],
            "steps": len(whole[3]),
            "start": whole[2] == shards[2],
            "metrics": whole[3] == shards[3] or os.environ["RANK"] != "0",
            "weights": same(whole[4], shards[4]) and whole[5] == shards[5],
            "changed": whole[2] != whole[5],
        }
        print(json.dumps(told), flush=True)
    os._exit(0)  # torch with gloo aborts at random while the interpreter comes down
