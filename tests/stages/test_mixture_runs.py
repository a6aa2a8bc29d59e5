"""Runs over mixtures of experts and hybrids: active experts and recurrences count; an unknown cost stops nothing."""

import json

import pytest
from small_runs import metrics, run, written

from align.commands.check import check
from align.workflow.estimate import ModelPlans, disk_need, estimate
from align.workflow.recipe.load import load_recipe
from align.workflow.results.tables import plan_table
from align.workflow.runner import planned

EXPERTS = [
    "policy.from_config.num_local_experts=3",
    "policy.from_config.num_experts_per_tok=2",
    "policy.from_config.num_key_value_heads=2",
]
MIXTRAL = [*EXPERTS, "policy.from_config.model_type=mixtral"]
GPT_OSS = [
    *EXPERTS,
    "policy.from_config.model_type=gpt_oss",
    "policy.from_config.head_dim=8",
]
LFM2 = [
    "policy.from_config.model_type=lfm2",
    "policy.from_config.num_hidden_layers=2",
    "policy.from_config.num_key_value_heads=2",
    "policy.from_config.layer_types=[conv,full_attention]",
    "policy.from_config.block_auto_adjust_ff_dim=false",
]


@pytest.mark.parametrize("overrides", [MIXTRAL, GPT_OSS], ids=["mixtral", "gpt_oss"])
def test_a_mixture_is_imported_and_trained_and_its_unknown_cost_is_null_with_the_reason(tmp_path, overrides):
    made, _ = run(tmp_path, *overrides)
    ledger = json.loads((tmp_path / "runs/small/ledger.json").read_text())["steps"]["sft"]
    steps = metrics(tmp_path, "sft")
    assert len(steps) == 6 and made["dpo"]["optimizer_steps"] == 3
    if overrides is GPT_OSS:
        assert ledger["flops"] is None and ledger["unknown"]["flops"] == 1
        assert "not gpt_oss" in ledger["flops_source"]
        return
    # Of each token: 4 attention matrices of 16 x 16, a router, 2 of 3 experts; the head at each target, pairs 4 x 16
    names = ("tokens_computed", "pairs_attended", "targets")
    tokens, pairs, targets = (sum(step[name] for step in steps) for name in names)
    weights = 4 * 16 * 16 + 16 * 3 + 2 * 3 * 16 * 32
    vocabulary = made["base"]["tokens"]
    assert ledger["flops"] == 3 * (2 * weights * tokens + 4 * 16 * pairs + 2 * 16 * vocabulary * targets)


def test_an_estimate_of_a_mixture_says_what_is_unknown_and_knows_its_size(tmp_path):
    recipe = load_recipe(written(tmp_path), GPT_OSS)
    models, checkpoints = disk_need(ModelPlans(recipe))
    found = list(estimate(recipe))
    assert [each.flops for each in found[1:]] == [None, None]
    assert all("not gpt_oss" in each.unknown and each.tokens for each in found[1:])
    assert all(each.training.memory is None for each in found[1:])
    made, _ = run(tmp_path, *GPT_OSS, "steps={base: {stage: import, vocab_size: 300}}")
    assert models == 3 * 4 * made["base"]["weights"] and checkpoints > 0  # fp32, one for each step
    (table,) = plan_table(planned(recipe, None, None), found)
    assert list(table.columns[4].cells)[1:3] == ["unknown", "unknown"]


def test_an_estimate_of_a_hybrid_has_flops_and_no_memory(tmp_path, capsys):
    path = written(tmp_path)
    sft = list(estimate(load_recipe(path, LFM2)))[1]
    assert sft.training.memory is None
    check(path, LFM2)
    assert capsys.readouterr().out.count("unknown for recurrent layers") == 2
    # Of each token: a projection of 16 to 48, a kernel of 3 for each of 16, a matrix out, 4 matrices of attention, and
    # 3 matrices of an MLP twice. The head and attention add to that
    per_token = 2 * (16 * 48 + 3 * 16 + 16 * 16 + 4 * 16 * 16 + 2 * 3 * 16 * 32)
    head = 2 * 16 * 300
    assert 3 * per_token * sft.tokens < sft.flops < 3 * (per_token + head + 4 * 16 * 256) * sft.tokens
