"""What a small run leaves: a mixture's rows, a ledger, and policies whose samples come from another model."""

import json
import shutil
from contextlib import nullcontext
from datetime import datetime
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from small_runs import RECIPE, ROOT, EndsInDpo, Told, metrics, run, written
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

from align import artifacts
from align.cli import app
from align.commands.check import check
from align.data import chat_clock
from align.data.chat_templates import TEMPLATES
from align.data.reading import read
from align.errors import InputError, RunError
from align.pipeline import FINISHED, RUNNING, fingerprints, locked
from align.procedural import tasks
from align.stages.costs import meter
from align.stages.preference import Preference
from align.stages.sft import SFT
from align.train.indexed_groups import ROWS
from align.train.sharding import products
from align.workflow import runner as running
from align.workflow.launcher import INSIDE_RUN, Command
from align.workflow.recipe.load import load_recipe
from align.workflow.results import written as writing
from align.workflow.runner import planned, run_recipe

REPLAY = RECIPE.replace(
    "  dpo:",
    "  more: {{stage: sft, data: code, replay: {{share: 0.2}},\n"
    "         train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}}}\n  dpo:",
).replace("steps:\n", '  code: {{path: "tasks:code", limit: 20}}\nsteps:\n')
EACH_ALONE = "steps.sft.train.tokens_per_micro_batch=1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *run(folder, EACH_ALONE, text=REPLAY)


def ids_of(folder, kind, limit):
    """(tokens of the whole row, tokens of its response) of every row, by the template and transformers' tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in tasks.demonstrations(kind, num_rows=limit, seed=0, split="train"):
        chat = [{"role": message.role, "content": message.content} for message in row.messages]
        before = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
        yield (
            len(tokenizer(whole)["input_ids"]),
            len(tokenizer(whole)["input_ids"]) - len(tokenizer(before)["input_ids"]),
        )


def test_the_operations_of_a_step_are_those_counted_from_the_lengths_of_its_rows(finished):
    folder, made, _ = finished
    root = folder / "runs/small"
    lengths = list(ids_of(root / "sft", "general", 24))
    ledger = made["sft"]["ledger"]
    assert ledger["tokens_computed"] == sum(whole for whole, _ in lengths)
    assert ledger["tokens_trained"] == sum(response for _, response in lengths)
    matrices = {name: value for name, value in load_file(root / "sft/model.safetensors").items() if value.dim() == 2}
    embedding = next(value.numel() for name, value in matrices.items() if "embed" in name)
    layers = sum(value.numel() for name, value in matrices.items() if "layers" in name)
    forward = 0
    for whole, response in lengths:
        attended = whole * (whole + 1) // 2  # pairs of one layer; scores and values take 2 operations a unit each
        forward += 2 * layers * whole + 4 * 16 * attended + 2 * embedding * response
    assert ledger["flops"] == 3 * forward
    whole = json.loads((root / "ledger.json").read_text())
    for name in ("tokens_computed", "tokens_trained", "flops", "seconds"):
        assert whole["total"][name] == pytest.approx(sum(each[name] for each in whole["steps"].values()))
    assert whole["steps"].keys() == made.keys()


def test_replay_is_its_share_of_the_rows_that_are_trained(finished):
    folder, made, _ = finished
    # 20 rows of code are 0.8 of an epoch of 25; the other 5 are of the step before
    assert made["more"]["rows"]["epoch"] == 25
    assert sum(line["groups"] for line in metrics(folder, "more")) == 25
    code, general = (list(ids_of(folder / "runs/small/more", *each)) for each in (("code", 20), ("general", 24)))
    replayed = made["more"]["ledger"]["tokens_trained"] - sum(response for _, response in code)
    responses = sorted(response for _, response in general)
    assert sum(responses[:5]) <= replayed <= sum(responses[-5:])
    assert "5 of 24 rows of shown" in made["more"]["format"]


def test_what_a_call_took_beside_its_steps_is_told(finished):
    folder, made, _ = finished
    last = json.loads((folder / "runs/small/ledger.json").read_text())["last_call"]
    steps_s = sum(manifest["ledger"]["seconds"] for manifest in made.values())
    assert 0 < last["overhead_seconds"] <= last["wall_seconds"] - steps_s + 1e-6
    run(folder, EACH_ALONE, text=REPLAY)
    again = json.loads((folder / "runs/small/ledger.json").read_text())
    assert again["last_call"]["overhead_seconds"] == again["last_call"]["wall_seconds"] > 0
    assert again["total"]["seconds"] == pytest.approx(steps_s)  # what the run took in all its calls


class Ends(Told):
    """Ends the run after so many optimizer steps, as an interrupt does."""

    def advance(self, units, metrics=None):
        super().advance(units, metrics)
        if len(self.steps) == 4:
            raise KeyboardInterrupt


def test_the_seconds_of_a_resumed_step_are_those_of_all_its_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(meter, "SAVE_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "steps.sft.train.checkpoint_steps=1", told=Ends())
    working = tmp_path / "runs/small/sft.partial"
    spent = json.loads((working / "spent-1.json").read_text())
    (working / "spent-1.json").write_text(json.dumps({**spent, "seconds": 1000.0}))  # as if it had been a long one
    made, told = run(tmp_path, "steps.sft.train.checkpoint_steps=1")
    assert len([step for step in told.steps if "loss/preference" not in step]) == 3  # from the checkpoint of step 3
    assert made["sft"]["attempts"] == 2
    assert 1000 < made["sft"]["ledger"]["seconds"] < 1000 + 60
    assert not list((tmp_path / "runs/small/sft").glob("spent-*"))
    losses = [line["loss"] for line in metrics(tmp_path, "sft")]
    assert losses == pytest.approx([line["loss"] for line in metrics_of_whole(tmp_path / "whole")], abs=0)


def clock(moment):
    """Return `datetime` with this current time."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return moment

    return Clock


def test_a_step_resumes_after_midnight_although_its_chat_template_writes_the_time(tmp_path, monkeypatch):
    template = tmp_path / "clock.jinja"
    template.write_text(
        "{{ strftime_now('%d %b %Y %H:%M') }}\n" + TEMPLATES["plain"].source.replace("end_of_turn", "eos_token")
    )
    text = RECIPE.replace("chat_template: chatml", f"chat_template: {template}")
    night, morning = datetime(2026, 12, 31, 23, 59, 58), datetime(2027, 1, 1, 0, 0, 2)
    often = "steps.sft.train.checkpoint_steps=1"
    losses = {}
    for name, again in (("whole", night), ("resumed", morning), ("encoded again", morning), ("other", morning)):
        folder = tmp_path / name
        monkeypatch.setattr(chat_clock, "datetime", clock(again if name == "other" else night))
        with pytest.raises(KeyboardInterrupt):
            run(folder, often, text=text, told=Ends())
        monkeypatch.setattr(chat_clock, "datetime", clock(again))
        if name == "encoded again":
            shutil.rmtree(folder / "runs/small/sft.partial" / ROWS)
        run(folder, often, text=text, until="sft")
        assert not (folder / "runs/small/sft" / chat_clock.BEGAN).exists()
        losses[name] = [line["loss"] for line in metrics(folder, "sft")]
    assert losses["whole"] == losses["resumed"] == losses["encoded again"]
    assert losses["whole"] != losses["other"]  # the time is in the rows


def test_the_seconds_of_a_step_that_was_killed_before_its_manifest_are_not_lost(tmp_path, monkeypatch):
    working = tmp_path / "runs/small/base.partial"

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(artifacts, "complete", killed)
        run(tmp_path, until="base")
    spent = json.loads((working / "spent-1.json").read_text())
    (working / "spent-1.json").write_text(json.dumps({**spent, "seconds": 1000.0}))
    made, _ = run(tmp_path, until="base")
    assert (made["base"]["attempts"], made["base"]["ledger"]["seconds"] > 1000) == (2, True)
    assert not list((tmp_path / "runs/small/base").glob("spent-*"))


def test_no_process_waits_for_the_first_at_a_step_that_lacks_nothing_but_its_name(tmp_path, monkeypatch):
    run(tmp_path, until="sft")
    (tmp_path / "runs/small/sft").rename(tmp_path / "runs/small/sft.partial")
    monkeypatch.setattr(SFT, "run", lambda step, context: pytest.fail("nothing is left to do"))
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        running.run_step(Command(tmp_path / "small.yaml"), "sft", Told())
    assert (tmp_path / "runs/small/sft/manifest.json").exists()


def test_a_stage_of_one_process_is_refused_by_each_process_of_a_launch(tmp_path, monkeypatch):
    path = written(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(InputError, match="^step 'base': import runs in one process, not 2; start it without"):
            running.run_step(Command(path), "base", Told())
    assert not (tmp_path / "runs").exists()


def test_what_the_references_of_a_killed_step_have_taken_is_in_its_ledger(tmp_path):
    often = "steps.dpo.train.checkpoint_steps=1"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, often, told=EndsInDpo())
    killed, told = run(tmp_path, often)
    whole, _ = run(tmp_path / "whole", often)
    assert any(note.startswith("resumed after step 1") for note in told.notes)
    for figure in ("tokens_computed", "flops"):
        assert killed["dpo"]["ledger"][figure] == whole["dpo"]["ledger"][figure]
    assert not list((tmp_path / "runs/small/dpo").glob("references*"))


def test_one_step_is_trained_again_whose_inputs_were_made_again(tmp_path, monkeypatch):
    path, other = tmp_path / "small.yaml", "steps.sft.train.max_steps=2"
    for overrides, until in (((), "dpo"), ((other,), "sft"), ((), "sft")):
        run(tmp_path, *overrides, until=until)
    trained = []
    monkeypatch.setattr(Preference, "run", lambda step, context: trained.append(context.name) or pytest.fail())
    for rank in ("0", "1"):  # what the first process does the others do, once it has begun
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(pytest.fail.Exception):
            running.run_step(Command(path, ()), "dpo", Told())
    assert trained == ["dpo", "dpo"]
    with pytest.raises(InputError, match="needs 'sft', which has to run first"):
        running.run_step(Command(path, (other,)), "dpo", Told())


def test_a_precision_without_effect_is_refused_before_a_run_and_by_a_check(tmp_path, monkeypatch):
    monkeypatch.setattr(products, "bf16_products", nullcontext)  # as on a CPU without instructions for them
    text = RECIPE.replace("3, prompts", "3, precision: bf16-products, prompts", 1)
    with monkeypatch.context() as patch, pytest.raises(InputError) as in_training:
        patch.setattr(SFT, "check_machine", lambda step: None)
        run(tmp_path / "late", text=text)
    with pytest.raises(InputError) as before_run:
        run(tmp_path, text=text)
    assert not (tmp_path / "runs").exists()
    path = tmp_path / "small.yaml"
    with pytest.raises(InputError) as by_check:
        check(path, ())
    line = next(number for number, line in enumerate(path.read_text().splitlines(), 1) if "sft:" in line)
    message = "steps.sft.train.precision: bf16-products has no effect on this CPU with this build of PyTorch; use fp32"
    assert str(by_check.value).startswith(f"{path}:{line}: {message}")
    assert str(by_check.value) == f"{path}:{line}: {before_run.value}"
    assert str(before_run.value) == str(in_training.value)


def test_a_launched_child_reports_a_recipe_that_changed_since_the_run_began(tmp_path, monkeypatch):
    run(tmp_path, until="base")
    marks = fingerprints(Command(tmp_path / "small.yaml").loaded.pipeline())
    monkeypatch.setenv(INSIDE_RUN, marks["sft"])
    edits = ("limit: 24", "limit: 20"), ("vocab_size: 300", "vocab_size: 310")  # of the step, and of one before it
    with locked(tmp_path / "runs/small", print):  # as the pipeline that launched it does
        for edit, rank in product(edits, ("0", "1")):
            path = written(tmp_path, RECIPE.replace(*edit))
            monkeypatch.setenv("RANK", rank)
            with pytest.raises(RunError, match="^step 'sft': the recipe, or a file that it names, has changed since"):
                running.run_step(Command(path), "sft", Told())
    assert not list((tmp_path / "runs/small").glob("sft*"))


def metrics_of_whole(folder):
    run(folder, "steps.sft.train.checkpoint_steps=1")
    return metrics(folder, "sft")


def test_a_dry_run_lists_every_step_with_its_rows_and_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ended = CliRunner().invoke(app, ["run", str(written(tmp_path, REPLAY)), "--dry-run"])
    assert ended.exit_code == 0, ended.output
    cells = [line.split() for line in ended.stdout.splitlines()]
    told = {line[0]: line[1:] for line in cells if line and line[0] in ("base", "sft", "more", "dpo")}
    assert (told["base"][0], told["base"][-1]) == ("import", "runs")
    rows = {name: told[name][:2] for name in ("sft", "more", "dpo")}
    assert rows == {"sft": ["sft", "24"], "more": ["sft", "25"], "dpo": ["preference", "12"]}
    assert not (tmp_path / "runs").exists()


TWO_BASES = """
run: bases
runs: {runs}
policy: {{chat_template: chatml}}
data:
  shown: {{path: "tasks:general", limit: 8}}
  test: {{path: "tasks:general", split: test, limit: 2}}
steps:
  small: {{stage: import, vocab_size: 300, from_config: &small {{model_type: llama, hidden_size: 16,
          intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 256}}}}
  large: {{stage: import, vocab_size: 300, from_config: {{<<: *small, num_hidden_layers: 2}}}}
  sft: {{stage: sft, policy: large, data: answers, train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}}}
  answers:
    stage: generate
    policies: [small]
    data: test
    sampling: {{num_responses: 2, max_new_tokens: 4}}
    judges: [{{name: "small_runs:longer"}}]
    groups: {{keep: best}}
"""


def test_a_larger_base_learns_from_the_best_responses_of_a_smaller_one(tmp_path):
    path = tmp_path / "bases.yaml"
    path.write_text(TWO_BASES.format(runs=tmp_path / "runs"))
    made = run_recipe(Command(path, ()), Told(), disk=(0, 0))
    root = tmp_path / "runs/bases"
    layers = {name: AutoConfig.from_pretrained(root / name).num_hidden_layers for name in ("small", "large", "sft")}
    assert layers == {"small": 1, "large": 2, "sft": 2}
    groups = read(str(root / "answers/groups.jsonl")).records
    assert [len(group.responses) for group in groups] == [1] * len(groups)
    assert made["sft"]["rows"]["trained"] == len(groups) == 2


WEAK_TO_STRONG = """
run: strong
runs: {runs}
policy:
  from_config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
          num_attention_heads: 2, max_position_embeddings: 256, initializer_range: 0.05}}
  chat_template: chatml
data:
  prompts: {{path: "tasks:general"}}
steps:
  base: {{stage: import, path: {weak}/base}}
  samples:
    stage: generate
    models: [{weak}/dpo]
    data: prompts
    prompts: {{prompts: 6}}
    sampling: {{num_responses: 3, max_new_tokens: 6}}
    engine: {{local: {{precision: fp32}}}}
    judges: [{{name: "small_runs:longer"}}]
  rescored: {{stage: score, data: samples, judges: [{{name: "small_runs:longer"}}], groups: {{keep: best_worst}}}}
  dpo: {{stage: preference, data: rescored, train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}}}
"""


def test_a_base_takes_its_samples_from_another_model_and_a_score_judges_them_anew(finished, tmp_path):
    folder, _, _ = finished
    weak = folder / "runs/small"
    path = tmp_path / "strong.yaml"
    path.write_text(WEAK_TO_STRONG.format(runs=tmp_path / "runs", weak=weak))
    made = run_recipe(Command(path, ()), Told(), disk=(0, 0))
    root = tmp_path / "runs/strong"
    base, copied = (load_file(each / "model.safetensors") for each in (weak / "base", root / "base"))
    assert base.keys() == copied.keys() and all(torch.equal(base[name], copied[name]) for name in base)
    groups = [json.loads(line) for line in (root / "samples/groups.jsonl").read_text().splitlines()]
    rescored = [json.loads(line) for line in (root / "rescored/groups.jsonl").read_text().splitlines()]
    assert 0 < len(rescored) <= len(groups) <= 6
    texts = {json.dumps(row["prompt"]): {one["content"] for one in row["responses"]} for row in groups}
    for row in rescored:
        assert {one["content"] for one in row["responses"]} <= texts[json.dumps(row["prompt"])]
        assert [one["reward"] for one in row["responses"]] == [len(one["content"]) for one in row["responses"]]
        assert len(row["responses"]) == 2
    assert made["samples"]["inputs"] == {} and made["dpo"]["inputs"].keys() == {"base", "rescored"}
    tokenizer, ledger = AutoTokenizer.from_pretrained(weak / "dpo"), made["samples"]["ledger"]
    prompts = tasks.prompts("general", num_rows=6, seed=0, split="train")  # a tie has no group, and is computed, too
    chats = [[{"role": message.role, "content": message.content} for message in each.messages] for each in prompts]
    assert texts.keys() <= set(map(json.dumps, chats))
    asked = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    assert 6 * 3 <= ledger["tokens_computed"] - sum(map(len, asked)) <= 6 * 3 * 6  # three responses of 1 to 6 tokens
    weights = sum(each.numel() for name, each in base.items() if ".layers." in name and each.ndim == 2)
    assert ledger["flops"] > 2 * weights * ledger["tokens_computed"] and ledger["weights"] > weights


def test_evaluations_that_one_step_stands_for_are_all_run_again(tmp_path):
    text = REPLAY + "  evaluate: {{stage: evaluate, policies: [base, sft], tasks: {{code: {{data: code}}}}}}\n"
    loaded = load_recipe(written(tmp_path, text))
    for name in loaded.steps:
        (loaded.root / name).mkdir(parents=True)
        mark = fingerprints(loaded.pipeline())[name]
        (loaded.root / name / "manifest.json").write_text(json.dumps({"fingerprint": mark}))
    states = {each.step.name: each.state for each in planned(loaded, None, "evaluate")}
    assert [name for name, state in states.items() if state != FINISHED] == ["evaluate-base", "evaluate-sft"]
    assert {each.state for each in planned(loaded, None, None)} == {FINISHED}


def test_the_page_is_rewritten_after_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MAX_PAGE_SHARE", 1e9)  # after every step, however long the page takes
    seen = {}

    class Watching(Told):
        def watch(self, step, state):
            page = tmp_path / "runs/small/report.html"
            if state == RUNNING:
                seen[step] = page.read_text() if page.is_file() else ""

    run_recipe(Command(written(tmp_path), ()), Watching(), disk=(0, 0))
    assert [text.partition(" of 3 steps finished")[0][-1:] for text in seen.values()] == ["", "1", "2"]
    manifest = json.loads((tmp_path / "runs/small/dpo/manifest.json").read_text())
    assert manifest["environment"]["host"] in (tmp_path / "runs/small/report.html").read_text()
