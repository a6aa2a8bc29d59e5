"""Attention whose rows and heads two or more processes split, against whole attention: gaps and sent bytes, as JSON."""

import json
import os
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from align.accounting.communication import exchange_bytes
from align.accounting.flops import Decoder
from align.data.token_groups import TokenSequence
from align.models.tree.attention import tree_attention
from align.models.tree.batch import tree_batch
from align.models.tree.sequence_group import SequenceGroup

# Query heads, key heads, widths of keys and values, lengths of two responses to a prompt of 5 tokens, soft-capping
CASES = {
    "even": (4, 4, 8, 8, (3, 4), None),
    "grouped heads, odd rows": (8, 4, 8, 8, (9, 7), None),
    "soft-capped": (4, 2, 8, 8, (2, 3), 20.0),
    "values of another width": (2, 2, 12, 8, (1, 5), None),
}


def layout(lengths):
    prompt, draw = list(range(5)), np.random.default_rng(0)
    rows = [np.array([*prompt, *draw.integers(50, 99, number)], np.int32) for number in lengths]
    return tree_batch([TokenSequence(ids, np.arange(len(ids)) > 4) for ids in rows]).layout


def compare(group, case):
    """The largest differences of this process's outputs and gradients."""
    query_heads, key_heads, key_width, value_width, lengths, softcap = CASES[case]
    tree, draw = layout(lengths), torch.Generator().manual_seed(1)

    def random(heads, width):
        return torch.randn(1, heads, tree.num_rows, width, generator=draw, dtype=torch.float64)

    whole = [random(query_heads, key_width), random(key_heads, key_width), random(key_heads, value_width)]
    weight = random(query_heads, value_width).transpose(1, 2)
    own, length = group.rows(tree.num_rows), -(-tree.num_rows // group.size)
    share = [torch.zeros(1, each.shape[1], length, each.shape[3], dtype=torch.float64) for each in whole]
    for part, each in zip(share, whole, strict=True):
        part[:, :, : each[:, :, own].shape[2]] = each[:, :, own]
    inputs = [each.requires_grad_() for each in (*whole, *share)]
    expected = tree_attention(nn.Identity(), *whole, None, tree=tree, softcap=softcap)[0]
    (expected * weight).sum().backward()
    found = tree_attention(nn.Identity(), *share, None, tree=replace(tree, group=group), softcap=softcap)[0]
    number = expected[:, own].shape[1]
    (found[:, :number] * weight[:, own]).sum().backward()
    gaps = [(found[:, :number] - expected[:, own]).abs()]
    for each, part in zip(inputs[:3], inputs[3:], strict=True):
        gaps += [(part.grad[:, :, :number] - each.grad[:, :, own]).abs(), part.grad[:, :, number:].abs()]
    return max(gap.max().item() for gap in gaps if gap.numel())


def sent(group):
    """The bytes that this process sends in a layer of an even number of rows, and by formula."""
    counted, exchange = [], dist.all_to_all_single

    def counting(received, blocks, **more):
        counted.append(blocks[0].nbytes * (group.size - 1))
        return exchange(received, blocks, **more)

    dist.all_to_all_single = counting
    compare(group, "even")
    dist.all_to_all_single = exchange
    model = Decoder(hidden=1, layers=1, query_width=32, kv_width=32, intermediate=1, vocab=1)
    tokens = 2 * layout(CASES["even"][4]).num_rows
    return sum(counted), exchange_bytes(model, tokens=tokens, split=group.size, processes=group.size, size=8)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = SequenceGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    told = {case: compare(group, case) for case in CASES}
    print(json.dumps({"processes": group.size, "gaps": told, "sent": sent(group)}), flush=True)
    os._exit(0)  # torch with gloo aborts at random while the interpreter comes down
