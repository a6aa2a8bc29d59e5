"""How a launch file spreads a step, and what `align check` says of memory."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from small_runs import written

from align.accounting.communication import Sharding
from align.errors import InputError
from align.stages.training.footprint import allocator_note as holes
from align.stages.training.footprint import sharding_of
from align.workflow.estimate import estimate as check
from align.workflow.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
SMALL_BUDGET = "steps.dpo.train.tokens_per_micro_batch=1"
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp2": 3}  # by the first part of a file's name; the rest has none
FILES = sorted(path.name for path in (ROOT / "launch").glob("*.yaml") if path.name != "skypilot.yaml")


@pytest.mark.parametrize("name", FILES)
def test_a_launch_file_is_read_as_accelerate_reads_it(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # from where the files name each other
    known, found = load_config_from_file(f"launch/{name}"), sharding_of(f"launch/{name}", "each")
    assert (found.processes, found.cpu) == (known.num_processes, known.use_cpu)
    assert (found.stage, found.reduce) == (STAGES.get(name.partition("-")[0], 0), "each")


def test_deepspeeds_own_numbers_are_taken_from_the_file_that_is_named(tmp_path):
    zero = {"stage": 2, "reduce_bucket_size": 5e7, "overlap_comm": True, "stage3_prefetch_bucket_size": "auto"}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    launch = tmp_path / "launch.yaml"
    named = f"deepspeed_config: {{deepspeed_config_file: {tmp_path / 'zero.json'}}}\n"
    launch.write_text(f"distributed_type: DEEPSPEED\nnum_processes: 4\nuse_cpu: true\n{named}")
    assert sharding_of(str(launch)) == Sharding(stage=2, processes=4, bucket=50_000_000)
    (tmp_path / "zero.json").unlink()
    with pytest.raises(InputError, match=r"zero\.json: no such file"):
        sharding_of(str(launch))
    with pytest.raises(InputError, match=r"other\.yaml: no such launch file"):
        sharding_of(str(tmp_path / "other.yaml"))


def memory_of(folder, *overrides):
    """What is said of the memory of each training step of a small recipe."""
    estimates = check(load_recipe(written(folder), overrides))
    return {each.name: each.training.memory for each in estimates if each.training is not None}


def test_check_tells_the_memory_of_the_launch_and_of_other_ways(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = memory_of(tmp_path, "steps.dpo.launch=launch/zero2-cpu-2.yaml")
    assert found["sft"].describe().endswith("in one process, including the Python process")
    assert "in each of 2 processes under ZeRO-2, including the Python process" in found["dpo"].describe()
    for each in found.values():
        assert each.many == 8
        whole, *sharded = each.by_stage
        assert all(peak < whole + 10**8 for peak in sharded)  # DeepSpeed itself takes more than so small a model
    assert found["dpo"].describe().count("ZeRO-") == 4


def test_on_a_gpu_the_process_itself_is_not_in_the_devices_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = memory_of(tmp_path, "steps.sft.launch=launch/gpu-1.yaml")["sft"]
    assert "GiB at the peak in one process;" in found.describe()
    assert found.peak < 600 * 2**20  # of which most are the tiles of logits, larger than on a CPU


def test_without_a_launch_file_a_step_is_where_the_machine_has_its_gpu(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert sharding_of(None).cpu is not there


def test_what_spares_memory_is_seen_to(tmp_path):
    def peak(*overrides):
        return memory_of(tmp_path, "policy.from_config.num_hidden_layers=4", *overrides)["sft"].peak

    assert peak("policy.gradient_checkpointing=true") < peak()
    assert peak("steps.sft.train.precision=bf16") < peak()
    assert peak("steps.sft.train.tokens_per_micro_batch=200") < peak()
    assert peak("steps.sft.train.tokens_per_micro_batch=1000000") == peak()  # as much as a step has


def test_groups_above_the_token_budget_are_in_memory_in_parts_unless_weights_are_gathered(tmp_path):
    def found(*overrides):
        deep = "policy.from_config.num_hidden_layers=16"
        return memory_of(tmp_path, deep, "steps.dpo.train.prompts_per_step=1", *overrides)["dpo"]

    at_once, parts = found("steps.dpo.train.tokens_per_micro_batch=100000"), found(SMALL_BUDGET)
    assert parts.peak < at_once.peak
    assert parts.by_stage[3] == at_once.by_stage[3]  # ZeRO-3
    assert found(SMALL_BUDGET, "policy.forward=plain").peak > parts.peak


def test_processes_that_split_sequences_hold_fewer_activations(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def peak(split):
        wide = "policy.from_config.intermediate_size=2048"
        launch = "steps.sft.launch=launch/ddp-cpu-2.yaml"
        return memory_of(tmp_path, wide, launch, f"steps.sft.train.sequence_parallel={split}")["sft"].peak

    assert peak(2) < peak(1)


@pytest.mark.parametrize(
    ("libc", "threshold", "told"),
    [(("glibc", "2.36"), None, True), (("glibc", "2.36"), "1048576", False), (("glibc", "2.38"), None, False)]
    + [(("", ""), None, False), (("glibc", "3.0"), None, False)],
)
def test_what_an_older_allocator_adds_is_told_where_nothing_keeps_it_from_that(monkeypatch, libc, threshold, told):
    monkeypatch.setattr("platform.libc_ver", lambda: libc)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    if threshold is not None:
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", threshold)
    assert (libc[1] in holes() and "times as much" in holes()) if told else holes() == ""
