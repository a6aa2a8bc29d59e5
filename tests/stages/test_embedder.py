"""An `embedder` step in a recipe, the tasks on its encoder, and its errors."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from small_runs import run
from transformers import TrainingArguments

from align.artifacts import read_manifest
from align.curate.embeddings.folder import set_dropout
from align.curate.embeddings.pipelines import load_pipeline, word_vectors
from align.curate.embeddings.settings import JestSettings, TrainingSettings
from align.curate.embeddings.training import SigmoidLoss, train_encoder
from align.errors import InputError, RunError
from align.losses.contrastive import sigmoid_losses
from align.stages.embedder import Embedder
from align.stages.inputs.sources import SourceSettings
from align.workflow.recipe.load import load_recipe

RECIPE = """
run: small
runs: {runs}
policy:
  from_config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2,
          num_attention_heads: 2, max_position_embeddings: 256, initializer_range: 0.05}}
  chat_template: chatml
data:
  texts: {{path: "{folder}/pairs.jsonl", columns: {{text: sentence1}}}}
  pairs: {{path: "{folder}/pairs.jsonl", columns: {{anchor: sentence1, positive: sentence2}}}}
  rated: {{path: "{folder}/pairs.jsonl"}}
steps:
  base: {{stage: import, vocab_size: 300}}
  simcse:
    stage: embedder
    encoder: {{pooling: mean, whiten: 4}}
    data: texts
    train: {{objective: simcse, batch_size: 4, epochs: 2, learning_rate: 1.0e-3, log_every: 1}}
  sigmoid:
    stage: embedder
    encoder: {{model: "step:simcse"}}
    data: pairs
    train: {{objective: sigmoid, batch_size: 6, jest: {{reference: "step:simcse", chunks: 2}}}}
  scores:
    stage: evaluate
    policies: [base, sigmoid]
    tasks: {{sts: {{task: sts, data: rated}}, align: {{task: alignment, data: rated, encoder: {{max_tokens: 8}}}}}}
"""
ANIMALS = ("cat", "dog", "wolf", "bird", "fish", "mouse")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder")
    rows = [
        {"sentence1": f"The {animal} is {colour}.", "sentence2": f"A {colour} {animal}", "score": score}
        for animal, score in zip(ANIMALS, (5, 4.5, 4, 3, 1, 0), strict=True)
        for colour in ("red", "blue")
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """The folder of a finished run."""
    run(folder, text=RECIPE.replace("{folder}", str(folder)))
    return folder / "runs" / "small"


def test_an_encoder_is_trained_and_whitened_and_loads_without_this_package(finished):
    manifest = read_manifest(finished / "simcse")
    assert manifest["whitening"] == {"texts": 12, "dimensions": 4}
    steps, values = zip(*manifest["training"]["losses"], strict=True)
    assert steps == (1, 2, 3, 4, 5, 6) and values[-1] < values[0]
    vectors = SentenceTransformer(str(finished / "simcse"), device="cpu").encode(["The cat is red.", "A blue dog"])
    assert vectors.shape == (2, 4)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert not (finished / "simcse" / "checkpoints").exists()


def test_selection_trains_half_of_the_scored_rows_and_the_tasks_compare_encoders(finished):
    manifest = read_manifest(finished / "sigmoid")
    assert (manifest["training"]["steps"], manifest["training"]["rows_scored"]) == (2, 12)
    scores = read_manifest(finished / "scores-sigmoid")["scores"]["sigmoid"]
    assert set(scores) == {"sts spearman", "align alignment"}
    assert scores["align alignment"]["n"] == 4 and 0 <= scores["align alignment"]["value"] <= 4
    assert -1 <= scores["sts spearman"]["low"] <= scores["sts spearman"]["high"] <= 1


def train_sigmoid(finished, folder):
    """Train an encoder for two epochs of two steps; return it and what was done."""
    model = load_pipeline(str(finished / "simcse")).model
    rows = [{"anchor": f"The {animal} is red.", "positive": f"A red {animal}"} for animal in ANIMALS * 2]
    settings = TrainingSettings(
        objective="sigmoid", batch_size=6, epochs=2, learning_rate=0.05, log_every=1, jest=JestSettings(chunks=2)
    )
    return model, train_encoder(model, rows, settings, folder=folder)


def test_a_killed_training_resumes_with_the_weights_and_counts_of_its_loss(finished, tmp_path, monkeypatch):
    whole, done = train_sigmoid(finished, tmp_path / "whole")
    forward, calls = SigmoidLoss.forward, []

    def killed(self, *args, **kwargs):
        calls.append(args)
        return forward(self, *args, **kwargs) if len(calls) < 4 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(SigmoidLoss, "forward", killed)
        with pytest.raises(ZeroDivisionError):
            train_sigmoid(finished, tmp_path / "killed")
    (tmp_path / "killed" / "checkpoint-3").mkdir()  # of a kill while it was written
    resumed, again = train_sigmoid(finished, tmp_path / "killed")
    assert (again.steps, again.rows_scored) == (done.steps, done.rows_scored) == (4, 24)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


@pytest.mark.parametrize(("bad_call", "error"), [(3, "step 3: the loss is not"), (4, "weights are not finite")])
def test_training_ends_with_an_error_where_a_loss_or_a_weight_is_not_finite(
    finished, tmp_path, monkeypatch, bad_call, error
):
    forward, calls = SigmoidLoss.forward, []

    def broken(self, *args, **kwargs):
        calls.append(args)
        loss = forward(self, *args, **kwargs)
        if len(calls) < bad_call:
            return loss
        zero = (self.bias - self.bias.detach()).abs()
        return loss * torch.nan if bad_call == 3 else loss + zero.sqrt()  # the gradient of the root is not finite

    monkeypatch.setattr(SigmoidLoss, "forward", broken)
    with pytest.raises(RunError, match=error):
        train_sigmoid(finished, tmp_path)


def test_the_batch_does_not_grow_with_the_number_of_gpus(finished, tmp_path, monkeypatch):
    made = TrainingArguments.__post_init__

    def with_gpus(self):
        made(self)
        assert self.n_gpu in (0, 1)
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_gpus)
    _, done = train_sigmoid(finished, tmp_path)
    assert (done.steps, done.rows_scored) == (4, 24)  # two epochs of 12 rows, 6 at a time


class Lookup(torch.nn.Module):
    """An encoder of token ids by a table."""

    def __init__(self, width=8):
        super().__init__()
        self.table = torch.nn.Embedding(100, width, _weight=torch.randn(100, width))

    def forward(self, features):
        return {"sentence_embedding": self.table(features["input_ids"][:, 0])}


def test_without_a_filter_selection_gives_the_loss_of_the_whole_batch_and_with_one_that_of_the_chosen_rows():
    torch.manual_seed(0)
    model = Lookup()
    features = [{"input_ids": torch.arange(8)[:, None]}, {"input_ids": torch.arange(8)[:, None] + 50}]
    first, second = (model(each)["sentence_embedding"] for each in features)
    matrix = sigmoid_losses(first, second, 10.0, -10.0)
    whole = SigmoidLoss(model, JestSettings(filter=0, chunks=4), None, 0)(features)
    torch.testing.assert_close(whole, matrix.sum() / 8)
    # With a high gain and one chunk the rows with the largest own losses are chosen
    part = SigmoidLoss(model, JestSettings(filter=0.75, chunks=1, gain=1e9), None, 0)(features)
    chosen = matrix.diag().topk(2).indices
    torch.testing.assert_close(part, matrix[chosen][:, chosen].sum() / 2)


def test_selection_refuses_word_vectors_and_a_reference_that_reads_other_tokens(tmp_path):
    (tmp_path / "one.txt").write_text("red 1 0\nblue 0 1\n")
    (tmp_path / "other.txt").write_text("green 1 0\nblue 0 1\n")
    model, other = (word_vectors(tmp_path / name).model for name in ("one.txt", "other.txt"))
    with pytest.raises(InputError, match="another tokenizer than the encoder"):
        SigmoidLoss(model, JestSettings(), other, 0)
    features = [model.preprocess(["red", "blue"]) for _ in range(2)]
    with pytest.raises(InputError, match="word vectors are not supported by selection"):
        SigmoidLoss(model, JestSettings(), None, 0)(features)


def test_dropout_is_set_in_modules_and_attributes_and_refused_where_there_is_none():
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.0))
    layer[0].attention_dropout = 0.0
    set_dropout(layer, 0.3)
    assert (layer[1].p, layer[0].attention_dropout) == (0.3, 0.3)
    with pytest.raises(InputError, match="the model has no dropout"):
        set_dropout(torch.nn.Linear(2, 2), 0.3)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("pooling: mean", "pooling: echo", "echo wraps the text in a template"),
        ("objective: sigmoid", "objective: simcse", "selection needs the loss of each pair of rows"),
        ("task: sts", "task: nll", "step 'sigmoid' makes an encoder of texts, not a policy"),
        ("encoder: {max_tokens: 8}", "encoder: {model: some/model}", "the step's own policies are embedded"),
        ("data: pairs", "data: pairs\n    launch: launch/ddp-cpu-2.yaml", "sigmoid.launch: .* runs in one process"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_it_runs(folder, tmp_path, old, new, error):
    text = RECIPE.replace("{folder}", str(folder)).replace("{{", "{").replace("}}", "}")
    assert old in text
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace(old, new).replace("{runs}", str(tmp_path)))
    with pytest.raises(InputError, match=error):
        load_recipe(path, ())


def test_rows_without_the_columns_of_the_objective_are_refused(folder):
    step = Embedder(data="rows", train=TrainingSettings(objective="classification", batch_size=2))
    source = SourceSettings(path=str(folder / "pairs.jsonl"))
    with pytest.raises(InputError, match="has no columns sentence1, sentence2, label; it has sentence1, sentence2, sc"):
        step.open_rows("rows", source)
    cosine = Embedder(data="rows", train=TrainingSettings(objective="cosine", max_score=4))
    with pytest.raises(InputError, match="row 1 has score 5, not from 0 to max_score: 4"):
        cosine.training_rows(source)


@pytest.mark.parametrize(
    ("labels", "numbers"), [((3, 1, 2), [2, 0, 1]), ((-1, 1, -1), [0, 1, 0]), ((0.5, 2, 0), [1, 2, 0])]
)
def test_labels_become_numbers_from_zero_and_one_class_is_refused(finished, tmp_path, labels, numbers):
    path = tmp_path / "pairs.jsonl"
    rows = [{"sentence1": "The cat is red.", "sentence2": "A red cat", "label": label} for label in labels]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    step = Embedder(data="rows", train=TrainingSettings(objective="classification", batch_size=3, epochs=1))
    found = step.training_rows(SourceSettings(path=str(path)))
    assert [row["label"] for row in found] == numbers
    model = load_pipeline(str(finished / "simcse")).model
    assert train_encoder(model, found, step.train, folder=tmp_path / "checkpoints").steps == 1
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(InputError, match=f"all rows have label {labels[0]}; classification needs"):
        step.training_rows(SourceSettings(path=str(path)))
