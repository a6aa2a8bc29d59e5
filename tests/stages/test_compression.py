"""Steps that write smaller copies of policies, and the evaluations that name them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_runs import OF_COPY, ROOT, TIED_POLICY, run, written

from align.artifacts import read_json
from align.commands.export import export
from align.compress import averaging
from align.errors import InputError
from align.stages.compression import averaged
from align.workflow.estimate import estimate
from align.workflow.recipe.load import load_recipe

RECIPE = (
    TIED_POLICY
    + """keep: last
data:
  shown: {{path: "tasks:general", limit: 24}}
  asked: {{path: "tasks:general", split: test, limit: 6}}
steps:
  base: {{stage: import, vocab_size: 300}}
  small: {{stage: export, gguf: Q4_0}}
  sft: {{stage: sft, data: shown, train: {{learning_rate: 1.0e-3, prompts_per_step: 8}}}}
"""
    + OF_COPY
)
PUBLISHED = ("agreement", "kl", "js_similarity", "nll_change")


@pytest.mark.slow
def test_an_exported_policy_is_evaluated_like_any_other_and_nothing_starts_from_it(tmp_path):
    manifests, _ = run(tmp_path, text=RECIPE)
    recipe = load_recipe(written(tmp_path, RECIPE))
    assert recipe.steps["small"].start == "base" == recipe.steps["sft"].start
    folder = tmp_path / "runs" / "small"
    table, changes = read_json(folder / "table.json"), read_json(folder / "changes.json")
    own, copy = (
        {name: table[policy][f"fidelity {name}"]["value"] for name in PUBLISHED} for policy in ("base", "small")
    )
    assert own == pytest.approx({"agreement": 1, "kl": 0, "js_similarity": 1, "nll_change": 0}, abs=1e-6)
    assert 0 < copy["kl"] < 0.4 and 0.5 < copy["js_similarity"] < 1 and 0 <= copy["agreement"] <= 1
    assert changes["small"]["fidelity kl"]["from"] == "base"
    assert any(column.startswith("general") for column in changes["small"])
    counts = manifests["evaluate-small"]["counts"]["fidelity"]
    assert (counts["rows"], counts["left_out"]) == (6, {}) and 0 <= counts["unanswered"] < 6
    ratio = manifests["small"]["compression"]["ratio"]
    assert 4.5 / 32 < ratio < 0.4
    assert "weights" not in json.dumps(read_json(folder / "small" / "manifest.json").get("removed", ""))
    assert list((folder / "small").glob("*.gguf"))


DRIFT = """  evaluate:
    stage: evaluate
    policies: [base, sft]
    tasks:
      back: {{task: fidelity, data: asked, reference: "step:sft", max_new_tokens: 4}}
      drift: {{task: drift, data: asked, reference: "step:base", max_new_tokens: 4}}
"""


def test_drift_is_the_divergence_of_a_policy_from_its_start_along_its_own_answers(tmp_path):
    run(tmp_path, text=RECIPE.replace("keep: last\n", "").split("  evaluate:")[0] + DRIFT)
    table = read_json(tmp_path / "runs/small/table.json")
    assert table["base"]["drift kl"]["value"] == pytest.approx(0, abs=1e-9)
    assert table["sft"]["drift kl"]["value"] == pytest.approx(table["base"]["back kl"]["value"], rel=1e-9)
    assert table["sft"]["drift kl"]["value"] > 1e-4
    assert set(table["sft"]) == {"drift kl", *(f"back {name}" for name in PUBLISHED)}


def test_the_command_writes_a_folder_once(tmp_path, capsys):
    run(tmp_path, text=RECIPE, until="base")
    policy = tmp_path / "runs" / "small" / "base"
    export(str(policy), None, ["gguf=Q5_1"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == str(tmp_path / "runs/small/base-Q5_1/base-Q5_1.gguf") and "of the bytes" in shown[-2]
    with pytest.raises(InputError, match=r"base-Q5_1 exists"):
        export(str(policy), None, ["gguf=Q5_1"])
    with pytest.raises(InputError, match="no such folder"):
        export(str(ROOT / "nowhere" / "policy"), None, [])


MERGED = (
    RECIPE[: RECIPE.index("  small:")]
    + """
  a: {{stage: sft, policy: base, data: shown, train: &train {{learning_rate: 1.0e-2, prompts_per_step: 8}}}}
  b: {{stage: sft, policy: base, data: shown, train: {{<<: *train, learning_rate: 3.0e-2}}}}
  c: {{stage: sft, policy: base, data: shown, train: {{<<: *train, learning_rate: 1.0e+1, max_steps: 1}}}}
  mixed: {{stage: average, of: [a, b]}}
  warp: {{stage: average, of: [a, b], how: slerp, base: base, toward: base, toward_weight: 0.25}}
  soup: {{stage: average, of: [c, a, b], how: greedy, task: {{task: nll, data: shown}}}}
  evaluate: {{stage: evaluate, policies: all, tasks: {{chat: {{task: nll, data: shown}}}}}}
"""
)


@pytest.mark.slow
def test_averages_are_policies_and_a_greedy_soup_leaves_out_what_makes_it_worse(tmp_path, monkeypatch):
    soups = []

    def write_average(sources, folder, *args, **kwargs):
        soups.append(len(list(folder.parent.glob("soup-*/*.safetensors"))))
        return averaging.write_average(sources, folder, *args, **kwargs)

    monkeypatch.setattr(averaged, "write_average", write_average)
    manifests, _ = run(tmp_path, "keep=all", text=MERGED)
    folder = tmp_path / "runs" / "small"
    parts = {
        name: load_file(folder / name / "model.safetensors")
        for name in manifests
        if (folder / name).is_dir() and (folder / name / "model.safetensors").is_file()
    }
    for name, value in parts["mixed"].items():
        torch.testing.assert_close(value, (parts["a"][name] + parts["b"][name]) / 2)
    name = "model.layers.0.mlp.up_proj.weight"
    base, a, b = (parts[each][name] for each in ("base", "a", "b"))
    middle = (parts["warp"][name] - 0.25 * base) / 0.75 - base  # on the arc between the two differences
    assert (
        torch.linalg.matrix_rank(torch.stack([each.flatten() for each in (middle, a - base, b - base)]), rtol=1e-3) == 2
    )
    nll = {policy: scores["chat nll"]["value"] for policy, scores in read_json(folder / "table.json").items()}
    kept = manifests["soup"]["average"]["of"]
    assert "c" not in kept and nll["c"] == max(nll.values())
    assert nll["soup"] == pytest.approx(manifests["soup"]["average"]["values"]["average"], abs=1e-6)
    assert nll["soup"] <= min(nll["a"], nll["b"]) + 1e-6
    assert read_json(folder / "changes.json")["mixed"]["chat nll"]["from"] == "b"
    assert len(soups) == 5 and not any(soups)  # a candidate is removed before the next one is written
    ledgers = {name: each["ledger"] for name, each in manifests.items()}
    one = ledgers["evaluate-a"]  # the soup is chosen by three own values and those of two candidates on the same rows
    assert ledgers["soup"]["flops"] == 5 * one["flops"] > 0
    assert ledgers["soup"]["tokens_computed"] == 5 * one["tokens_computed"]
    assert ledgers["soup"]["weights"] == ledgers["mixed"]["weights"] and ledgers["mixed"]["flops"] == 0
    disk = {name: step.disk(1) for name, step in load_recipe(written(tmp_path, MERGED)).steps.items()}
    assert (disk["mixed"], disk["warp"], disk["soup"]) == ((1, 2), (1, 3), (1, 4))


SHORT = (
    RECIPE[: RECIPE.index("  small:")].replace("num_hidden_layers: 1", "num_hidden_layers: 3")
    + """
  short: {{stage: drop_layers, drop: 2, data: shown, max_rows: 5}}
  sft: {{stage: sft, data: shown, train: {{learning_rate: 1.0e-3, prompts_per_step: 8}}}}
"""
)


def test_layers_are_dropped_and_the_next_step_trains_what_is_left(tmp_path):
    manifests, told = run(tmp_path, text=SHORT)
    found = manifests["short"]["layers"]
    influence, dropped = found["influence"], found["dropped"]
    assert (found["before"], found["rows"], len(influence), len(dropped)) == (3, 5, 3, 2)
    (kept,) = set(range(3)) - set(dropped)
    assert influence[kept] == max(influence) and dropped == sorted(dropped)
    assert sum("influence" in note for note in told.notes) == 3
    folder = tmp_path / "runs" / "small"
    assert {read_json(folder / name / "config.json")["num_hidden_layers"] for name in ("short", "sft")} == {1}
    recipe = load_recipe(written(tmp_path, SHORT))
    assert recipe.steps["sft"].start == "short"
    estimates = {each.name: each for each in estimate(recipe)}
    size = manifests["short"]["ledger"]["weights"]
    assert size == manifests["sft"]["ledger"]["weights"] < manifests["base"]["ledger"]["weights"]
    assert 0.99 < estimates["short"].disk / (4 * size) <= 1 and estimates["short"].rows == 5
    assert estimates["short"].tokens == manifests["short"]["ledger"]["tokens_computed"]


def test_a_policy_keeps_a_layer(tmp_path):
    with pytest.raises(InputError, match=r"short\.drop: 3 of 3 layers; at least one must be left"):
        run(tmp_path, text=SHORT.replace("drop: 2", "drop: 3"))


DISTILLED = (
    SHORT[: SHORT.index("  sft:")]
    + """
  healed: {{stage: distill, teacher: base, data: shown, loss: {{top_k: 16}},
           train: &train {{learning_rate: 3.0e-3, prompts_per_step: 4, epochs: 4}}}}
  sampled: {{stage: generate, policies: [healed], data: asked, judges: [],
            sampling: {{num_responses: 2, max_new_tokens: 6}}}}
  on_policy: {{stage: distill, policy: healed, teacher: base, data: sampled, responses: all,
              loss: {{beta: 1.0, top_k: 400}}, train: {{<<: *train, epochs: 1}}}}
  mixed: {{stage: distill, policy: healed, teacher: base, data: {{shown: 1.0, more: 3.0}},
          loss: {{beta: 0.5, sft_weight: 0.1}}, train: {{<<: *train, epochs: 1}}}}
  evaluate:
    stage: evaluate
    policies: [base, short, healed]
    tasks:
      fidelity: {{task: fidelity, data: asked, reference: "step:base", max_new_tokens: 8}}
"""
).replace(
    '  asked: {{path: "tasks:general", split: test, limit: 6}}\n',
    """  asked: {{path: "tasks:general", split: test, limit: 6}}
  more: {{path: "tasks:general", split: validation, limit: 24}}
""",
)


def test_a_student_of_fewer_layers_follows_its_teacher_more_closely_once_distilled(tmp_path):
    manifests, told = run(tmp_path, text=DISTILLED)
    table = read_json(tmp_path / "runs" / "small" / "table.json")
    kl = {policy: table[policy]["fidelity kl"]["value"] for policy in ("base", "short", "healed")}
    assert kl["base"] < 1e-9 and kl["healed"] < 0.95 * kl["short"]
    healed, size = manifests["healed"], manifests["short"]["ledger"]["weights"]
    assert healed["ledger"]["weights"] == size
    assert healed["last"]["loss/distillation"] < healed["first"]["loss/distillation"]
    assert healed["rows"]["trained"] == 24 and manifests["on_policy"]["rows"]["trained"] > 3
    assert manifests["on_policy"]["first"]["teacher/rest"] == 0  # more than the vocabulary: exact
    assert manifests["mixed"]["first"]["loss"] == pytest.approx(
        manifests["mixed"]["first"]["loss/distillation"] + 0.1 * manifests["mixed"]["first"]["nll"]
    )
    assert sum("of the teacher" in note for note in told.notes) == 3
    # One forward pass of the teacher; four passes with a backward one of the student, which has a third of the layers
    of_student = estimate_of(tmp_path, "healed")
    assert 4.2 < healed["ledger"]["tokens_computed"] / of_student.tokens <= 5
    assert healed["ledger"]["flops"] / of_student.flops == pytest.approx(1, abs=0.1)
    assert of_student.disk - 4 * size == pytest.approx(of_student.tokens * (16 * 8 + 4), rel=0.02)


def estimate_of(folder, name):
    return next(each for each in estimate(load_recipe(written(folder, DISTILLED))) if each.name == name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("teacher: base, data: shown", "teacher: short, data: shown"), "healed.teacher: 'short' is also the student"),
        (("loss: {{top_k: 16}}", "loss: {{beta: 1.5}}"), "healed.loss.beta"),
        (("loss: {{top_k: 16}}", "selection: {{score: hard}}"), "healed.selection: is not supported by distill"),
        (("teacher: base, data: shown", "teacher: shown, data: shown"), "healed.teacher"),
    ],
)
def test_settings_of_distillation_that_cannot_work_are_refused(tmp_path, changes, message):
    assert changes[0] in DISTILLED
    with pytest.raises(InputError, match=message):
        load_recipe(written(tmp_path, DISTILLED.replace(*changes)))
