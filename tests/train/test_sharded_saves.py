"""Weights that lie over two processes are saved in files of limited size, and no process holds more than one file."""

import json
from pathlib import Path

import pytest
import torch
from forked import start_forked
from launching import LAUNCH, finish, fsdp_on_a_cpu, told
from safetensors.torch import load_file
from sharded_saves import CASES, KEPT, LIMIT, MASTER
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.data.tokenizer import train_tokenizer

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install align[deepspeed]")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

MESSAGES = 4096  # bytes, between the processes
# What transformers converts, or peft merges, is in memory twice for a while
WITH_COPY = ("experts", "adapters", "tied adapters")
ROUNDED = ("tied", "tied adapters", "master")  # the files, or the forward pass that they are compared with
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "original": torch.float32}


@pytest.mark.parametrize("way", ["zero3", "fsdp2"])
def test_no_process_holds_more_than_a_file_and_what_is_gathered_at_once(tmp_path, way):
    launch, where, cases = LAUNCH / "zero3-cpu-2.yaml", {}, CASES
    if way == "fsdp2":
        launch, where, cases = fsdp_on_a_cpu(tmp_path), {"ACCELERATE_TORCH_DEVICE": "cpu"}, CASES | MASTER
    train_tokenizer(["a b"], vocab_size=259, chat_template="").save_pretrained(tmp_path / "tokenizer")
    script, names = Path(__file__).with_name("sharded_saves.py"), ",".join(cases)
    launched = start_forked(
        launch, "--main_process_port", "0", script, tmp_path, tmp_path / "tokenizer", names, **where
    )
    output, errors = finish(launched)
    assert launched.returncode == 0, errors[-3000:]
    seen = told(output)
    assert sorted((one["case"], one["main"]) for one in seen) == sorted(
        (case, is_main) for case in cases for is_main in (0, 1)
    )
    for one in seen:
        # What transformers converts is one tensor of all experts here, which it may hold for a while after that, too
        held = one["largest"] * (2 if one["case"] in WITH_COPY and one["main"] else 1)
        assert 0 < one["most"] <= held + one["main"] * LIMIT + MESSAGES, one
        is_rounded = one["case"] in ROUNDED
        assert one["max_difference"] <= (0.1 if is_rounded else 1e-3), one
        assert one["loaded"] == [str(DTYPES[cases[one["case"]][-1]])] * one["main"]
    for case, (*_, dtype) in cases.items():
        if case != KEPT:
            check_files(tmp_path / case, DTYPES[dtype], is_reward=case == "reward")
    whole, saved = (
        load_file(tmp_path / KEPT / name) for name in ("whole.safetensors", "saved/adapter_model.safetensors")
    )
    assert saved.keys() == whole.keys() and all(torch.equal(saved[name], value) for name, value in whole.items())


def check_files(folder, dtype, *, is_reward):
    """Several files that hold each weight once, rounded, in total less than the limit each; transformers loads them."""
    index = json.loads((folder / "saved/model.safetensors.index.json").read_text())
    files = sorted((folder / "saved").glob("*.safetensors"))
    found = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) >= 2 and [file.name for file in files] == found
    whole = load_file(folder / "whole.safetensors")
    for file in files:
        tensors = load_file(file)
        assert {name for name, where in index["weight_map"].items() if where == file.name} == tensors.keys()
        assert sum(value.nbytes for value in tensors.values()) <= LIMIT
        assert {value.dtype for value in tensors.values()} == {dtype}
    assert index["metadata"]["total_size"] == sum(value.nbytes for file in files for value in load_file(file).values())
    auto = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    saved = auto.from_pretrained(folder / "saved", dtype=dtype)
    assert saved.dtype == dtype and str(dtype).endswith(json.loads((folder / "saved/config.json").read_text())["dtype"])
    loaded = saved.state_dict()
    assert loaded.keys() == whole.keys()
    assert index["metadata"]["total_parameters"] == saved.num_parameters()
    for name, value in whole.items():
        rounded = value.bfloat16() if "master" in folder.name else value
        assert torch.equal(loaded[name], rounded.to(dtype)), name
