"""Processes that split the rows of each sequence compute what one process computes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed_runs import alone
from forked import start_forked
from launching import LAUNCH, finish, fsdp_on_a_cpu, told
from safetensors.torch import load_file
from tiny_training import comparisons, demonstrations, gap, loop, metrics, preference, supervised
from transformers import AutoConfig

from align.errors import InputError
from align.models.probe import Forward, split_unsupported_reason
from align.models.tree.sequence_group import SequenceGroup
from align.train.passes.data_ranks import DataRanks, split_sequences
from align.train.settings import TrainSettings

# By launch: processes, and the largest difference of a weight of each case. In fp32, AdamW makes whole steps of
# gradients that are hardly more than rounding; in fp64, the norms within the model still round to fp32.
WAYS = {
    "ddp": (2, {"exact": 1e-8, "parts": 1e-6, "sft": 5e-6, "adapters": 5e-6, "weighted": 5e-6}),
    "2x2": (4, {"exact": 1e-8}),
    "fsdp2": (2, {"exact": 1e-8}),
    "zero3": (2, {"sft": 5e-6}),
}
WORK = ("tokens_computed", "pairs_attended", "targets")


def launched(launch, *arguments, processes=2, **environment):
    more = ["--num_processes", str(processes), "--main_process_port", "0"]
    process = start_forked(launch, *more, *arguments, **environment)
    output, errors = finish(process)
    assert process.returncode == 0, errors[-3000:]
    return told(output)


@pytest.mark.slow
@pytest.mark.distributed
def test_split_attention_has_the_values_and_gradients_of_whole_attention():
    found = launched(LAUNCH / "ddp-cpu-2.yaml", Path(__file__).with_name("sequence_attention.py"))
    assert [each["processes"] for each in found] == [2, 2]
    for each in found:
        assert len(each["gaps"]) == 4 and max(each["gaps"].values()) <= 1e-12
        counted, by_formula = each["sent"]
        assert counted == by_formula > 0


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", WAYS)
def test_a_training_with_split_sequences_does_what_one_process_does(tmp_path, way):
    if way == "zero3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install align[deepspeed]")
    processes, cases = WAYS[way]
    file = fsdp_on_a_cpu(tmp_path) if way == "fsdp2" else LAUNCH / f"{way.replace('2x2', 'ddp')}-cpu-2.yaml"
    where = {"ACCELERATE_TORCH_DEVICE": "cpu"} if way == "fsdp2" else {}
    script = Path(__file__).with_name("distributed_runs.py")
    arguments = script, tmp_path, ",".join(cases), json.dumps({"sequence_parallel": 2})
    assert len(launched(file, *arguments, processes=processes, **where)) == processes * len(cases)
    for name, limit in cases.items():
        lines, folder = alone(name)
        split_lines = metrics(tmp_path / name)
        for line, split in zip(lines, split_lines, strict=True):
            for part in ("loss", "grad_norm"):
                assert line[part] == pytest.approx(split[part], rel=1e-5, abs=2e-6), (name, part)
            if name == "exact" and processes == 2:  # with two ranks, one of them may run rows for nothing
                assert [line[part] for part in WORK] == [split[part] for part in WORK], name
        trained, of_split = (load_file(each / "trained.safetensors") for each in (folder, tmp_path / name))
        assert gap(trained, of_split) <= limit, name


def test_processes_of_a_rank_have_the_same_rows_and_their_sums_count_once():
    def ranks(process):
        reduce = lambda values, reduction: values * 6  # noqa: E731 - six processes with the same values
        return DataRanks(SimpleNamespace(process_index=process, num_processes=6, reduce=reduce), 2)

    assert [ranks(process).own for process in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [ranks(process).is_first_process for process in range(6)] == [True, False] * 3
    assert {ranks(process).number for process in range(6)} == {3}
    assert ranks(0).sum(torch.tensor([7.0])).tolist() == [21.0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_row_is_of_one_process_and_all_have_equally_many(size):
    for number in range(1, 12):
        rows = [SequenceGroup(None, rank, size).rows(number) for rank in range(size)]
        assert [row for own in rows for row in range(number)[own]] == list(range(number))
        assert len({own.stop - own.start for own in rows}) == 1


REASONS = {
    "no attention heads": ({"model_type": "rwkv"}, 2),
    "3 query heads cannot be split over 2": ({"model_type": "llama", "hidden_size": 48, "num_attention_heads": 3}, 2),
    "2 key/value heads cannot be split over 4": (
        {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2},
        4,
    ),
    "mamba has linear_attention; only full": ({"model_type": "mamba"}, 2),
    "router auxiliary loss": ({"model_type": "mixtral", "output_router_logits": True}, 2),
    "dynamic rotary embeddings": (
        {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        2,
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_models_that_cannot_be_split_are_refused(reason):
    values, size = REASONS[reason]
    assert reason in split_unsupported_reason(AutoConfig.for_model(**values), size)
    assert split_unsupported_reason(AutoConfig.for_model("llama"), size) is None


def test_one_process_cannot_split_sequences(tmp_path):
    message = "train.sequence_parallel: 2 needs a launch with a multiple of 2 processes, not 1"
    with pytest.raises(InputError, match=message):
        loop(tmp_path, supervised(), demonstrations(4), sequence_parallel=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forward": Forward("plain", "as set")}, r"a padded forward cannot be split \(as set\)"),
        ({"run": {"teacher": "one"}}, "sft and preference training without selection"),
        ({"run": {"selection": "one"}}, "sft and preference training without selection"),
        ({"policy": "a reward model"}, "sft and preference training without selection"),
    ],
)
def test_trainings_that_cannot_be_split_are_refused(changes, message):
    settings = TrainSettings(learning_rate=1.0, sequence_parallel=2)
    run = SimpleNamespace(**({"settings": settings, "teacher": None, "selection": None} | changes.get("run", {})))
    sharding = SimpleNamespace(policy=changes.get("policy"), accelerator=SimpleNamespace(num_processes=2))
    with pytest.raises(InputError, match=message):
        split_sequences(run, sharding, None, changes.get("forward", Forward("tree")))


def test_one_process_in_each_rank_changes_no_bit(tmp_path):
    made = loop(tmp_path, preference("dpo"), comparisons(8), sequence_parallel=1)
    assert made.policy.sequence_group is None and made.batcher.ranks.size == 1
    assert made.training_run.settings.token_budget == 10**6
    assert TrainSettings(learning_rate=1.0, sequence_parallel=4, tokens_per_micro_batch=8).token_budget == 32
    assert "sequence_parallel" not in made.training_run.settings.cache_key()
