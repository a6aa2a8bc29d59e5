"""Training on labels with KTO: the reference point is one number per step, however the step is computed."""

import importlib
import json
import random
from contextlib import suppress

import pytest
import torch
from datasets import Dataset
from test_loop_against_trl import EOS, NUM_WORDS, OURS, SPECIAL, TRL_OPTIONS, text, word_tokenizer
from tiny_training import (
    Killed,
    Recorder,
    comparisons,
    gap,
    group,
    labelled,
    llama,
    loop,
    metrics,
    numbers,
    policy,
    preference,
    same,
    weights,
)

from align.data.batching import groups_of_step
from align.errors import InputError
from align.train.indexed_groups import GroupView
from align.train.passes.mismatched import mismatched

WORK = ("tokens_computed", "pairs_attended", "targets", "micro_batches")


def log_ratio(trained, reference, prompt, response):
    """Return log(policy / reference) of a response, from transformers' own logits."""
    values = []
    for model in (trained, reference):
        with torch.no_grad():
            logps_TV = model(torch.tensor([[*prompt, *response]])).logits[0].double().log_softmax(dim=-1)
        values.append(sum(logps_TV[len(prompt) + at - 1, token].item() for at, token in enumerate(response)))
    return values[0] - values[1]


def parts(one):
    """Return the prompt and the responses of a group as lists of tokens."""
    return one.sequences[0].ids[: one.prompt_length].tolist(), [
        sequence.ids[sequence.loss_mask].tolist() for sequence in one.sequences
    ]


def expected_kl(model, reference, groups, longest):
    """Return the mean log-ratio of each prompt with the responses to the prompt before it, at least 0.

    Responses are cut so that no pair is longer than `longest` tokens.
    """
    model.use_forward("plain")
    ratios = []
    for index, one in enumerate(groups):
        prompt, (_, responses) = parts(one)[0], parts(groups[index - 1])
        most = longest - len(prompt)
        ratios += [log_ratio(model.hf, reference, prompt, response[:most]) for response in responses]
    model.use_forward("tree")
    return max(0.0, sum(ratios) / len(ratios))


@pytest.mark.parametrize("budget", [30, 10**6])
def test_the_reference_point_is_the_mean_log_ratio_of_the_mismatched_pairs_of_the_step(tmp_path, budget):
    train, held_out = labelled(13, sizes=(1, 1, 2)), labelled(5, seed=1)  # with a last step of one prompt
    made = loop(
        tmp_path,
        preference("kto", beta=1.0),
        train,
        job={"held_out": held_out},
        prompts_per_step=4,
        tokens_per_micro_batch=budget,
        learning_rate=1e-2,
        warmup_steps=0,
        epochs=2,
    )
    reference, found, cut = llama(), [], 0
    longest = max(len(sequence.ids) for one in (*train, *held_out) for sequence in one.sequences)
    for number in range(8):
        indices = groups_of_step(number, 13, 4, seed=0)
        expected = expected_kl(made.policy, reference, [train[index] for index in indices], longest)
        line = made.step(number)
        assert line["kl"] == pytest.approx(expected if len(indices) > 1 else 0.0, abs=1e-5)
        assert ("kl/tokens_computed" in line) == (len(indices) > 1)
        found.append(line["kl"])
        cut += line.get("kl/tokens_cut", 0)
    assert found[0] == pytest.approx(0, abs=1e-5) and max(found[4:7]) > 0.1 and found[3] == found[7] == 0
    assert cut > 0
    evaluated = made.evaluator.evaluate()
    assert evaluated["kl"] == pytest.approx(expected_kl(made.policy, reference, held_out, longest), abs=1e-5)


def run(folder, stop_after=None, **changes):
    settings = {"epochs": 3, "evaluate_every": 2, "learning_rate": 1e-2} | changes
    held_out = labelled(5, seed=1)
    made = loop(
        folder, preference("kto"), labelled(33), progress=Recorder(stop_after), job={"held_out": held_out}, **settings
    )
    return made, made.run()


def test_results_do_not_depend_on_the_micro_batches(tmp_path):
    (whole, _), (cut, _) = run(tmp_path / "one"), run(tmp_path / "many", tokens_per_micro_batch=60)
    lines, others = metrics(tmp_path / "one"), metrics(tmp_path / "many")
    assert lines[0]["micro_batches"] == 1 and others[0]["micro_batches"] >= 4
    assert lines[0]["kl/micro_batches"] == 1 and others[0]["kl/micro_batches"] >= 4
    cut_only = {"seconds", "peak_memory_bytes", "imbalance", "rewards/accuracies"}
    for line, other in zip(lines, others, strict=True):
        for name in line.keys() - cut_only:
            if not name.endswith(WORK) and "accuracies" not in name:
                assert other[name] == pytest.approx(line[name], rel=1e-5, abs=1e-5), name
    assert gap(weights(whole.policy), weights(cut.policy)) <= 5e-5
    assert max(line["kl"] for line in lines) > 0.01


@pytest.mark.parametrize("stop_after", [1, 6])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, stop_after):
    whole, _ = run(tmp_path / "whole", checkpoint_steps=1)
    with suppress(Killed):
        run(tmp_path / "killed", stop_after, checkpoint_steps=1)
    resumed, _ = run(tmp_path / "killed", checkpoint_steps=1)
    noted = [note for note in resumed.progress.notes if note.startswith("resumed after step")]
    assert noted == [f"resumed after step {stop_after - 1} of 15"] * (stop_after > 1)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert same(weights(whole.policy), weights(resumed.policy))


def test_references_of_mismatched_pairs_are_computed_once(tmp_path):
    references = tmp_path / "references"
    for name, missing in (("first", 99 + 5), ("second", 0)):
        progress = Recorder()
        loop(
            tmp_path / name,
            preference("kto", beta=0.2 if missing else 0.5),
            labelled(33),
            progress=progress,
            references=references,
            job={"held_out": labelled(5, seed=1)},
            epochs=3,
        )
        (note,) = [note for note in progress.notes if "of mismatched pairs" in note]
        found = int(note.split(": ")[1].split()[0])
        # In the last step of an epoch one prompt is paired with itself, which the training rows have already
        assert 90 <= found <= missing if missing else found == 0


def test_the_work_of_the_estimates_is_counted(tmp_path):
    _, result = run(tmp_path)
    lines = metrics(tmp_path)
    tokens = sum(line.get(f"{prefix}kl/tokens_computed", 0) for line in lines for prefix in ("", "held_out/"))
    start = lines[0]["start/held_out/kl/tokens_computed"]
    own = [line.get(f"{prefix}tokens_computed", 0) for line in lines for prefix in ("held_out/", "start/held_out/")]
    assert tokens > 0
    assert result.forward_only.tokens == result.references.work.tokens + tokens + start + sum(own)
    stored = [json.loads((tmp_path / f"{kind}references.computed").read_text()) for kind in ("", "kl-")]
    assert result.references.work.tokens == stored[0][0] + stored[1][0] and stored[1][0] > 2 * stored[0][0]


def test_a_mismatched_pair_has_one_prompt_and_the_other_responses():
    one, other = group([1, 2, 3], [[4, 5]]), group([6], [[7, 8, 9], [7]], row=1)
    made = mismatched(one, other, max_length=5)
    assert [sequence.ids.tolist() for sequence in made.sequences] == [[1, 2, 3, 7, 8], [1, 2, 3, 7]]
    assert [sequence.loss_mask.tolist() for sequence in made.sequences] == [
        [False, False, False, True, True],
        [False, False, False, True],
    ]
    assert [sequence.is_cut for sequence in made.sequences] == [True, False]


def test_no_mismatched_pair_is_longer_than_the_longest_row(tmp_path):
    long_prompt, long_response = group(range(30), [[1]], rewards=[1.0]), group([1], [range(30)], rewards=[0.0])
    made = loop(tmp_path, preference("kto"), [long_prompt, long_response], prompts_per_step=2)
    assert GroupView(made.kl_pass._pairs.train).column("longest").max() == 31
    assert made.step(0)["kl"] == pytest.approx(0, abs=1e-5)


def test_steps_of_one_prompt_are_refused(tmp_path):
    with pytest.raises(InputError, match="use at least 2, or the loss apo_zero_unpaired"):
        loop(tmp_path, preference("kto"), labelled(4), prompts_per_step=1)
    line = loop(tmp_path, preference("apo_zero_unpaired"), labelled(4), prompts_per_step=1).step(0)
    assert line["loss"] == pytest.approx(0.5, abs=1e-5) and "kl" not in line


def test_metrics_are_means_over_desirable_and_undesirable_responses(tmp_path):
    train = labelled(6, sizes=(1, 2))
    made = loop(tmp_path, preference("kto", beta=0.5), train, prompts_per_step=6, warmup_steps=0)
    line = made.step(0)
    sides = {"chosen": [], "rejected": []}
    for one in train:
        prompt, responses = parts(one)
        for response, label in zip(responses, one.rewards, strict=True):
            logps_TV = llama()(torch.tensor([[*prompt, *response]])).logits[0].double().log_softmax(dim=-1)
            logp = sum(logps_TV[len(prompt) + at - 1, token].item() for at, token in enumerate(response))
            sides["chosen" if label else "rejected"].append(logp)
    for side, values in sides.items():
        assert line[f"logps/{side}"] == pytest.approx(sum(values) / len(values), rel=1e-5)
        assert line[f"rewards/{side}"] == pytest.approx(0, abs=1e-5)
    assert line["loss"] == pytest.approx(0.5, abs=1e-5)


def test_a_sft_term_is_refused():
    with pytest.raises(InputError, match="a loss on labels has no SFT term"):
        preference("kto", sft_weight=0.1)
    assert comparisons(1)  # the other losses keep theirs
    preference("dpo", sft_weight=0.1)


PER_STEP, NUM_ROWS = 4, 26  # the last step of the epoch has two rows


def trl_rows():
    """(prompt, completion, label) as token lists without the final EOS, of unequal lengths."""
    draw = random.Random(4)
    tokens = lambda low, high: [draw.randrange(2, NUM_WORDS) for _ in range(draw.randint(low, high))]  # noqa: E731
    return [(tokens(2, 9), tokens(1, 20), draw.random() < 0.7) for _ in range(NUM_ROWS)]


def train_with_trl(folder, ordered):
    trl = importlib.import_module("trl")
    config = trl.KTOConfig(
        output_dir=str(folder),
        beta=0.2,
        desirable_weight=1.5,
        **TRL_OPTIONS,
        per_device_train_batch_size=PER_STEP,
    )
    told = [{"prompt": text(a), "completion": " " + text(b), "label": label} for a, b, label in ordered]
    trainer = trl.KTOTrainer(
        model=llama(**SPECIAL), args=config, train_dataset=Dataset.from_list(told), processing_class=word_tokenizer()
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line], trainer.model.cpu().state_dict()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_the_losses_and_the_trained_weights_are_those_of_trls_kto_trainer(tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL's trainers report their use over the network, but not from tests
    made = trl_rows()
    groups = [group(prompt, [[*response, EOS]], rewards=(float(label),)) for prompt, response, label in made]
    model = policy(**SPECIAL)
    changes = {"prompts_per_step": PER_STEP, "warmup_steps": 0, "schedule": "constant"} | OURS
    objective = preference("kto", beta=0.2, desirable_weight=1.5)
    ours = loop(tmp_path, objective, groups, model=model, **changes)
    ours.run()
    lines = metrics(tmp_path)
    order = [index for step in range(len(lines)) for index in groups_of_step(step, NUM_ROWS, PER_STEP, seed=0)]
    theirs, trained = train_with_trl(tmp_path / "trl", [made[index] for index in order])
    assert len(lines) == len(theirs) == 7
    for line, their in zip(lines, theirs, strict=True):
        assert line["loss"] == pytest.approx(their["loss"], rel=0, abs=1e-5)
        assert line["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-4)
        assert line["kl"] == pytest.approx(their["kl"], abs=1e-4)
        names = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
        assert {name for name in names if name in line} == {name for name in names if name in their}
        for name in line.keys() & names:
            assert line[name] == pytest.approx(their[name], rel=1e-5, abs=1e-4), name
    assert gap(weights(ours.policy), trained) <= 5e-5
    assert max(line["kl"] for line in lines) > 0.01
