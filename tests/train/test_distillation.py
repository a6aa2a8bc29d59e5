"""Distillation in the training loop: the loss by hand from full logits, and what must not change it."""

from functools import partial

import pytest
import torch
from tiny_training import (
    VOCABULARY,
    Killed,
    Recorder,
    comparisons,
    demonstrations,
    distillation,
    gap,
    killed_and_whole,
    loop,
    policy,
    results,
)
from torch.nn.functional import kl_div

from align.accounting.flops import decoder_from_config, forward_flops, training_flops
from align.errors import InputError, RunError
from align.models.tree.batch import tree_batch
from align.train.training_run import Teacher, work_of


def teacher(top_k, seed=5, **changes):
    return {"teacher": Teacher(partial(policy, seed, **changes), top_k)}


def make(folder, train, *, top_k=VOCABULARY, beta=0.0, sft_weight=0.0, job=None, **more):
    job = {**teacher(top_k), **(job or {})}
    return loop(folder, distillation(beta=beta, top_k=top_k, sft_weight=sft_weight), train, job=job, **more)


def logps(model, sequence):
    """Return transformers' log-probabilities of the whole vocabulary at each trained token."""
    ids = torch.from_numpy(sequence.ids.astype("int64"))
    with torch.no_grad():
        return model.hf(input_ids=ids[None]).logits[0, :-1].double().log_softmax(dim=-1)[sequence.loss_mask[1:]]


def by_hand(train, *, beta, top_k):
    """Return divergence and negative log-likelihood of the first policy over all trained tokens, as means."""
    student, model, sums, count = policy(), policy(5), [0.0, 0.0], 0
    for group in train:
        for sequence in group.sequences:
            q, p = logps(student, sequence), logps(model, sequence)
            nll = -q.gather(1, torch.from_numpy(sequence.ids[sequence.loss_mask].astype("int64"))[:, None]).sum()
            top = p.topk(top_k, dim=1).indices
            if top_k < VOCABULARY:  # all others are one class
                q, p = (
                    torch.cat([each.gather(1, top).exp(), 1 - each.gather(1, top).exp().sum(1, keepdim=True)], 1).log()
                    for each in (q, p)
                )
            if beta in (0, 1):
                one, other = (p, q) if beta == 0 else (q, p)
                loss = kl_div(other, one, reduction="sum", log_target=True)
            else:
                mixed = (beta * p.exp() + (1 - beta) * q.exp()).log()
                parts = [kl_div(mixed, each, reduction="sum", log_target=True) for each in (p, q)]
                loss = beta * parts[0] + (1 - beta) * parts[1]
            sums, count = [sums[0] + float(loss), sums[1] + float(nll)], count + len(q)
    return sums[0] / count, sums[1] / count


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top_k", [1, 6, VOCABULARY])
def test_the_loss_is_the_divergence_from_full_logits(tmp_path, beta, top_k):
    train = [*demonstrations(5), *comparisons(3, sizes=(3,))]
    divergence, nll = by_hand(train, beta=beta, top_k=top_k)
    line = make(tmp_path, train, top_k=top_k, beta=beta, sft_weight=0.25).step(0)
    assert divergence > 1e-3
    assert line["loss/distillation"] == pytest.approx(divergence, rel=1e-4)
    assert line["nll"] == pytest.approx(nll, rel=1e-5)
    assert line["loss"] == pytest.approx(divergence + 0.25 * nll, rel=1e-4)
    assert (line["teacher/rest"] == 0) == (top_k == VOCABULARY)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(tmp_path):
    line = make(tmp_path, demonstrations(8), beta=0.5, top_k=4, job=teacher(4, seed=0)).step(0)
    assert abs(line["loss"]) < 1e-6 and line["grad_norm"] < 1e-4


def test_the_student_comes_close_to_its_teacher(tmp_path):
    made = make(tmp_path, demonstrations(8), top_k=8, epochs=60, learning_rate=1e-2, schedule="constant")
    result = made.run()
    assert result.last_metrics["loss"] < 0.15 * result.first_metrics["loss"]


@pytest.mark.parametrize("forward", ["tree", "plain"])
def test_micro_batches_do_not_change_the_result(tmp_path, forward):
    train, held_out = comparisons(20, sizes=(1, 3)), comparisons(4, sizes=(2,), seed=3)
    runs = []
    for budget in (40, 10**6):
        folder = tmp_path / str(budget)
        job = {"forward": forward, "held_out": held_out}
        settings = {"tokens_per_micro_batch": budget, "evaluate_every": 2}
        runs.append(results(make(folder, train, top_k=5, beta=0.5, job=job, **settings)))
    (lines, trained), (others, of_others) = runs
    for line, other in zip(lines, others, strict=True):
        for name in ("loss", "nll", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-4), name
    assert lines[-1]["held_out/loss"] == pytest.approx(others[-1]["held_out/loss"], rel=1e-4)
    assert gap(trained, of_others) < 5e-5


def test_a_killed_run_goes_on_bit_for_bit_and_the_teacher_computes_nothing_again(tmp_path):
    train = demonstrations(24)
    options = {"top_k": 5, "beta": 0.5, "epochs": 2, "checkpoint_steps": 2, "tokens_per_micro_batch": 90}
    resumed = killed_and_whole(partial(make, train=train, **options), tmp_path)
    assert any("of the teacher: 0 groups to compute, 24" in note for note in resumed.progress.notes)


def test_new_rows_and_another_k_are_computed_and_old_ones_are_not(tmp_path):
    train, shared = demonstrations(12), tmp_path / "shared"
    notes = []
    for number, (rows, top_k) in enumerate([(train[:8], 4), (train, 4), (train, 6), (train[::-1], 4)]):
        made = make(tmp_path / str(number), rows, top_k=top_k, references=shared)
        notes += [note.split(": ")[1].split(" ")[0] for note in made.progress.notes if "teacher" in note]
    assert notes == ["8", "4", "12", "0"]


def test_another_teacher_is_another_run(tmp_path):
    train = demonstrations(16)
    with pytest.raises(Killed):
        make(tmp_path, train, top_k=4, checkpoint_steps=1, progress=Recorder(stop_after=2)).run()
    with pytest.raises((InputError, RunError)):
        make(tmp_path, train, top_k=4, checkpoint_steps=1, job=teacher(4, seed=6)).run()


def test_the_first_step_counts_the_pass_of_the_teacher(tmp_path):
    own, large = (decoder_from_config(policy(hidden_size=size).base.config.to_dict()) for size in (32, 64))
    train = demonstrations(16)
    job = {"teacher": Teacher(partial(policy, 5, hidden_size=64), 4, large)}
    made = make(tmp_path, train, top_k=4, job=job)
    made.run()
    whole = tree_batch([sequence for each in train for sequence in each.sequences]).work()
    extra = [step["flops"] - training_flops(own, work_of(step)) for step in made.progress.steps]
    assert extra == [forward_flops(large, whole), 0]
    assert [step["timed_flops"] for step in made.progress.steps] == [
        training_flops(own, work_of(step)) for step in made.progress.steps
    ]


def test_the_cache_is_written_before_it_takes_much_memory(tmp_path, monkeypatch):
    train = demonstrations(12)
    expected = make(tmp_path / "one", train, top_k=4).step(0)
    monkeypatch.setattr("align.train.distillation.cache.SEGMENT_BYTES", 1000)
    found = make(tmp_path / "many", train, top_k=4, tokens_per_micro_batch=90).step(0)
    sizes = [path.stat().st_size for path in (tmp_path / "many/references").glob("*/*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 6000  # a micro-batch at least, and headers
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match="teacher: has 130 tokens, and the student 120"):
        make(tmp_path, demonstrations(2), job=teacher(4, vocab_size=130))


def test_a_damaged_segment_is_found(tmp_path):
    make(tmp_path / "a", demonstrations(4), top_k=4, references=tmp_path / "shared")
    (file,) = (tmp_path / "shared").glob("*/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match="damaged|delete it"):
        make(tmp_path / "b", demonstrations(4), top_k=4, references=tmp_path / "shared")
