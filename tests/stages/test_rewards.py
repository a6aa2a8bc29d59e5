"""A reward model by a recipe: what it leaves behind, what it reports, and whatever can be wrong with one."""

import json
import random
import statistics

import pytest
import torch
from test_cli import align
from transformers import AutoModelForSequenceClassification, AutoTokenizer

RECIPE = """
run: rewards
runs: {runs}
policy:
  from_config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
           num_attention_heads: 2, max_position_embeddings: 256, initializer_range: 0.05}}
  chat_template: chatml
data:
  rated: {{path: {rated}, held_out: 0.3}}
  pairs: {{path: {pairs}, held_out: 0.3}}
steps:
  base: {{stage: import, vocab_size: 1024}}
  rate:
    stage: reward_model
    data: rated
    head: {{attributes: [shout, length], weights: [1.0, -0.5], lr_multiplier: 10}}
    train: {{learning_rate: 1.0e-3, prompts_per_step: 16, epochs: 8, keep: best, evaluate_every: 5,
            checkpoint_steps: 5}}
  rank:
    stage: reward_model
    data: pairs
    loss: bt
    subset: kind
    train: {{learning_rate: 1.0e-3, prompts_per_step: 8}}
  sharpen:
    stage: reward_model
    policy: rate
    data: pairs
    loss: bt_scaled
    train: {{learning_rate: 1.0e-4, prompts_per_step: 8}}
"""
WORDS = ("red", "green", "blue", "grey")


def rated_rows(number=120):
    """Responses whose attributes a tiny model can see: whether they shout, how long they are; some are not known."""
    draw = random.Random(0)
    for row in range(number):
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, 5))]
        shouts = draw.random() < 0.5
        attributes = {"shout": 4.0 * shouts, "length": float(len(words))}
        if row % 5 == 0:
            attributes.pop(draw.choice(["shout", "length"]))
        if row % 30 == 29:
            attributes = {}
        text = " ".join(words).upper() if shouts else " ".join(words)
        yield {
            "prompt": [{"role": "user", "content": f"colours of {draw.choice(WORDS)} number {row}"}],
            "responses": [{"content": text, "attributes": attributes}],
            "metadata": {},
        }


def pair_rows(number=60):
    draw = random.Random(1)
    for row in range(number):
        short, long = draw.choice(WORDS), " ".join(draw.choice(WORDS) for _ in range(4))
        yield {
            "prompt": [{"role": "user", "content": f"a colour of {draw.choice(WORDS)} number {row}"}],
            "responses": [{"content": short, "reward": 3.0 - row % 3}, {"content": long, "reward": 0.0}],
            "metadata": {"kind": "odd" if row % 2 else "even"},
        }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_in(folder, rated=None, pairs=None):
    rated = write(folder / "rated.jsonl", rated or rated_rows())
    pairs = write(folder / "pairs.jsonl", pairs or pair_rows())
    path = folder / "rewards.yaml"
    path.write_text(RECIPE.format(runs=folder / "runs", rated=rated, pairs=pairs))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The recipe after its run, with what was printed."""
    folder = tmp_path_factory.mktemp("rewards")
    ended = align("run", str(recipe_in(folder)))
    assert ended.returncode == 0, ended.stderr
    return folder / "runs" / "rewards", ended


def manifest(root, step):
    return json.loads((root / step / "manifest.json").read_text())


def scores_by_transformers(folder, rows):
    """Attributes of each row's first response from plain transformers and the chat template, one padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    chats = [[*row["prompt"], {"role": "assistant", "content": row["responses"][0]["content"]}] for row in rows]
    texts = [text.rstrip("\n") for text in tokenizer.apply_chat_template(chats, tokenize=False)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        return model(**inputs).logits


def test_a_reward_model_is_a_plain_classifier_with_its_attributes(finished):
    root, _ = finished
    model = AutoModelForSequenceClassification.from_pretrained(root / "rate")
    assert model.config.id2label == {0: "shout", 1: "length"}
    assert model.config.problem_type == "regression"
    assert model.config.aggregate == {"shout": 1.0, "length": -0.5}
    assert not list((root / "rate").glob("checkpoint-*")) and not list((root / "rate").glob("best*"))
    assert manifest(root, "rate")["aggregate"] == {"shout": 1.0, "length": -0.5}


def test_every_row_is_accounted_for_and_rows_without_a_label_are_dropped(finished):
    counts = manifest(finished[0], "rate")["rows"]
    assert counts["rows"] == 120 == counts["trained"] + counts["held_out"] + counts["dropped:no label"]
    assert counts["dropped:no label"] == 4
    assert counts["held_out"] > 20


def test_the_report_is_what_plain_transformers_makes_of_the_held_out_rows(finished):
    root, _ = finished
    report = {each["attribute"]: each for each in manifest(root, "rate")["report"]["attributes"]}
    rows = [row for row in rated_rows() if row["responses"][0]["attributes"]]
    scores = scores_by_transformers(root / "rate", rows).tolist()
    held_out, trained = split(root, rows)
    for index, name in enumerate(("shout", "length")):
        known = [
            (scores[at][index], rows[at]["responses"][0]["attributes"][name])
            for at in held_out
            if name in rows[at]["responses"][0]["attributes"]
        ]
        labels = [row["responses"][0]["attributes"].get(name) for row in (rows[at] for at in trained)]
        constant = statistics.mean(label for label in labels if label is not None)
        assert report[name]["n"] == len(known)
        assert report[name]["mse"] == pytest.approx(statistics.mean((a - b) ** 2 for a, b in known), abs=1e-4)
        assert report[name]["mse_of_mean"] == pytest.approx(statistics.mean((constant - b) ** 2 for _, b in known))
        assert report[name]["pearson"] == pytest.approx(statistics.correlation(*zip(*known, strict=True)), abs=1e-4)
        assert report[name]["gain"]["value"] == pytest.approx(report[name]["mse_of_mean"] - report[name]["mse"])
    assert report["shout"]["mse"] < report["shout"]["mse_of_mean"] / 2  # it has learnt something


def split(root, rows):
    """Indices of the rows that were held out and of those that were trained on, found by their numbers."""
    counts = manifest(root, "rate")["rows"]
    tokenizer = AutoTokenizer.from_pretrained(root / "rate")
    held_out, trained = [], []
    for at, row in enumerate(rows):
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        (held_out if is_held_out(ids, 0.3) else trained).append(at)
    assert (len(held_out), len(trained)) == (counts["held_out"], counts["trained"])
    return held_out, trained


def is_held_out(ids, share):
    import hashlib  # noqa: PLC0415 - beside its one use

    digest = hashlib.sha256(torch.tensor(ids, dtype=torch.int32).numpy().tobytes()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def test_regression_starts_near_the_mean_predictor(finished):
    root, _ = finished
    first = json.loads((root / "rate" / "metrics.jsonl").read_text().splitlines()[0])
    labels = [row["responses"][0]["attributes"].get("shout") for row in rated_rows()]
    spread = statistics.pvariance([label for label in labels if label is not None])
    assert first["mse/shout"] < 2 * spread < statistics.mean(label**2 for label in labels if label is not None)


def test_the_best_of_the_evaluated_weights_are_kept(finished):
    root, _ = finished
    found = manifest(root, "rate")
    lines = [json.loads(line) for line in (root / "rate" / "metrics.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line["held_out/loss"] for line in lines if "held_out/loss" in line}
    assert len(evaluated) > 4
    assert found["kept"]["step"] == min(evaluated, key=evaluated.get)


def test_pairs_are_reported_overall_by_margin_and_by_subset(finished):
    root, _ = finished
    found = manifest(root, "rank")["report"]
    pairs = found["pairs"]
    assert found["attributes"] == []  # the rows rate none
    held_out = manifest(root, "rank")["rows"]["held_out"]
    assert pairs["all"]["pairs"] == pairs["all"]["n"] == held_out
    assert pairs["all"]["low"] <= pairs["all"]["value"] <= pairs["all"]["high"]
    assert [each["margin"] for each in pairs["by_margin"]] == [[1, 1], [2, 2], [3, 3]]
    assert {each["subset"] for each in pairs["by_subset"]} == {"odd", "even"}
    for parts in (pairs["by_margin"], pairs["by_subset"]):
        assert sum(each["pairs"] for each in parts) == held_out
        assert sum(each["pairs"] * each["value"] for each in parts) == pytest.approx(held_out * pairs["all"]["value"])


def test_a_reward_model_goes_on_with_its_head(finished):
    root, _ = finished
    assert manifest(root, "sharpen")["inputs"].keys() == {"rate"}
    assert manifest(root, "rank")["inputs"].keys() == {"base"}
    model = AutoModelForSequenceClassification.from_pretrained(root / "sharpen")
    assert model.config.aggregate == {"shout": 1.0, "length": -0.5}
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(root / step).score.weight for step in ("rate", "sharpen")
    )
    assert 0 < (before - after).abs().max() < 0.02


def test_the_ledger_of_a_reward_model_has_no_language_model_head(finished):
    root, _ = finished
    steps = [json.loads(line) for line in (root / "sharpen" / "metrics.jsonl").read_text().splitlines()]
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 64)  # of two layers: attention and MLP

    def forward(prefix):
        tokens, pairs = (
            sum(step.get(prefix + name, 0) for step in steps) for name in ("tokens_computed", "pairs_attended")
        )
        return 2 * weights * tokens + 2 * 4 * 32 * pairs

    assert manifest(root, "sharpen")["ledger"]["flops"] == 3 * forward("") + forward("held_out/") + forward(
        "start/held_out/"
    )


def test_the_tables_show_what_was_reported(finished):
    _, ended = finished
    for words in ("shout", "length", "margin 1 to 1", "odd", "even", "95 %"):
        assert words in ended.stdout
    assert "reward: 1 shout + -0.5 length" in ended.stderr


def test_check_and_preview_know_the_stage(finished):
    root, _ = finished
    path = str(root.parent.parent / "rewards.yaml")
    said = align("check", path)
    assert said.returncode == 0, said.stderr
    assert "dropped:no label 4" in said.stdout
    shown = align("preview", path, "--step", "rate", "--rows", "1")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("prompt tokens") == 1


WRONG = {
    "an attribute that the model does not rate": (
        ["steps.rate.head.attributes=[shout]", "steps.rate.head.weights=null"],
        "no attribute 'length', only shout; set head.attributes to the attributes of the rows: length, shout",
    ),
    "no labels at all": (["steps.rate.data=pairs"], "no response has an attribute; regression needs shout, length"),
    "weights of the wrong length": (
        ["steps.rate.head.weights=[1.0]"],
        "override 'steps.rate.head.weights=[1.0]': steps.rate.head.weights: 1 weights for 2 attributes (shout, length)",
    ),
    "an unknown loss": (["steps.rank.loss=bradley"], "steps.rank.loss"),
    "one response for a pair": (["steps.rank.data=rated"], "no row is left to train on"),
    "no rewards for a margin": (
        ["steps.rank.data=rated", "steps.rank.loss=bt_margin"],
        "has no rewards, and bt_margin",
    ),
    "a subset that no row has": (
        ["steps.rank.subset=kin"],
        "no held-out row has 'kin' in its metadata; keys there: kind",
    ),
    "the best of nothing held out": (
        ["data.rated.held_out=0.0"],
        "steps.rate.train.keep: needs held-out rows, and no row is held out: set held_out of rated",
    ),
    "other attributes than were trained": (
        ["steps.sharpen.head.attributes=[a, b]"],
        "head.attributes: this reward model rates shout, length, not a, b",
    ),
    "a reward model for a policy": (
        ["steps.dpo={stage: preference, policy: rate, data: pairs, train: {learning_rate: 1e-4}}"],
        "steps.dpo.policy: step 'rate' makes a reward model, not a policy",
    ),
    "a rate of nothing": (["steps.rate.head.lr_multiplier=0"], "steps.rate.head.lr_multiplier"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line_with_status_two(finished, case):
    root, _ = finished
    overrides, words = WRONG[case]
    step = next((part.split(".")[1] for part in overrides if part.startswith("steps.")), "rate")
    path = str(root.parent.parent / "rewards.yaml")
    command = ["check", path] if step == "dpo" else ["train", path, "--step", step]
    ended = align(*command, *overrides)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("align:")]
    assert ended.returncode == 2, ended.stderr
    assert len(lines) == 1 and words in lines[0], ended.stderr
    assert (root / "rate" / "manifest.json").is_file()  # what was finished is as it was
