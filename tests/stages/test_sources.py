"""A step's rows on their way into its store: whole or not at all, by one process for all, and gone when it is done."""

import json
import re
from collections import Counter
from datetime import datetime
from functools import cache

import pytest
from planned import inputs_of, step_rows, tokenizer_of

from align.content_hash import content_of
from align.data.chat_clock import pinned_time
from align.data.store import KEYS, TOKENS
from align.errors import InputError, RunError
from align.records import Demonstration
from align.stages.inputs.sources import SourceSettings, prompts, streamed
from align.stages.responses.tasks import likelihood_rows
from align.stages.training.rows import RowRequest, describe, remove_rows
from align.stages.training.rows import step_rows as stored_rows
from align.synth.settings import ConstraintSettings
from align.train.indexed_groups import ROWS
from align.train.objectives.settings import PreferenceSettings
from align.workflow.preview import preview_rows
from align.workflow.recipe.load import load_recipe
from align.workflow.runner import run_context

RECIPE = """
run: rows
runs: {runs}
policy:
  from_config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
           num_attention_heads: 2, max_position_embeddings: 256}}
  chat_template: chatml
data:
  words: {{path: "tasks:general", limit: 20, held_out: 0.3}}
  rows: {{path: {rows}, held_out: 0.3}}
steps:
  base: {{stage: import, vocab_size: 512}}
  sft:
    stage: sft
    data: {{words: 1, rows: 1}}
    stopping_strategy: down_weight
    train: {{learning_rate: 1.0e-3}}
  prefer: {{stage: preference, data: rows, loss: {{name: dpo}}, train: {{learning_rate: 1.0e-3}}}}
"""


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def step(tmp_path):
    """(the recipe, its tokenizer, the file of its rows): 300 rows of one's own, of which some teach nothing."""
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"say {row}", "completion": f"it is {row}" * (1 + row % 7)} for row in range(300)]
    rows.write_text(as_lines(lines))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(runs=tmp_path / "runs", rows=rows))
    recipe = load_recipe(path, ())
    return recipe, tokenizer_of(recipe, "sft", tmp_path), rows


def content(folder):
    return sorted(path.name for path in folder.iterdir())


def test_rows_follow_each_other_source_by_source_and_are_counted(step, tmp_path):
    recipe, tokenizer, _ = step
    data = step_rows(recipe, "sft", tokenizer, tmp_path / "work", model_limit=256)
    both = [*data.train, *data.held_out]
    assert sorted(group.row for group in both) == list(range(320))
    assert [group.row for group in data.train] == sorted(group.row for group in data.train)
    assert data.counts["trained"] == len(data.train) == data.mixture.num_rows == data.counts["epoch"]
    assert (data.counts["held_out"], data.counts["rows"]) == (len(data.held_out), 320)
    assert data.mixture.sizes == (
        sum(group.row < 20 for group in data.train),
        sum(group.row > 19 for group in data.train),
    )
    said = [tokenizer.decode(group.sequences[0].ids) for group in data.train if group.row >= 20]
    assert all("say" in text and "it is" in text for text in said)


def test_the_first_process_writes_and_the_others_read_what_it_wrote(step, tmp_path):
    recipe, tokenizer, _ = step
    asked = []
    mine = step_rows(recipe, "sft", tokenizer, tmp_path, model_limit=256)
    theirs = step_rows(
        recipe, "sft", tokenizer, tmp_path, model_limit=256, run_on_main=lambda _, doing: asked.append(doing)
    )
    assert asked == ["tokenizing rows"]
    assert theirs.train.columns.digest == mine.train.columns.digest
    assert (theirs.counts, theirs.format, theirs.mixture) == (mine.counts, mine.format, mine.mixture)


def test_the_stored_tokens_of_an_earlier_attempt_are_read_again(step, tmp_path):
    """However they would be encoded now; but not where a row has changed."""
    recipe, tokenizer, rows = step
    before = step_rows(recipe, "sft", tokenizer, tmp_path, model_limit=256)
    written = (tmp_path / ROWS / "train" / TOKENS).stat().st_mtime_ns
    tokenizer.chat_template = "{{ strftime_now('%c') }}" + tokenizer.chat_template
    after = step_rows(recipe, "sft", tokenizer, tmp_path, model_limit=256)
    assert after.train.columns.digest == before.train.columns.digest
    assert (after.counts, after.mixture) == (before.counts, before.mixture)
    assert (tmp_path / ROWS / "train" / TOKENS).stat().st_mtime_ns == written
    rows.write_text(rows.read_text().replace("it is 7", "it is seven"))
    changed = step_rows(recipe, "sft", tokenizer, tmp_path, model_limit=256)
    assert changed.train.columns.digest != before.train.columns.digest


def test_the_same_prompts_are_held_out_on_every_day(step, tmp_path):
    recipe, tokenizer, _ = step
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') + '\n' }}" + tokenizer.chat_template
    held_out, texts = [], []
    for day in (1, 2):
        with pinned_time(datetime(2026, 1, day)):
            data = step_rows(recipe, "sft", tokenizer, tmp_path / str(day), model_limit=256)
        held_out.append([group.row for group in data.held_out])
        texts.append(tokenizer.decode(data.train[0].sequences[0].ids))
    assert held_out[0] == held_out[1] and held_out[0]
    assert [text[:12] for text in texts] == ["01 Jan 2026\n", "02 Jan 2026\n"]


@pytest.mark.parametrize(
    "file", [f"train/{TOKENS}", f"held_out/{KEYS}", "train/digest.json", "parts.json", "seal.json"]
)
@pytest.mark.parametrize("damage", ["flipped", "cut", "removed"])
def test_damaged_stored_tokens_are_made_again(step, tmp_path, file, damage):
    recipe, tokenizer, _ = step
    before = [one.ids.tolist() for one in sequences(step_rows(recipe, "sft", tokenizer, tmp_path, model_limit=256))]
    path = tmp_path / ROWS / file
    content = path.read_bytes()
    middle = len(content) // 2
    path.unlink()
    if damage != "removed":
        rest = bytes([content[middle] ^ 1]) + content[middle + 1 :] if damage == "flipped" else b""
        path.write_bytes(content[:middle] + rest)
    after = step_rows(recipe, "sft", tokenizer, tmp_path, model_limit=256)
    assert path.read_bytes() == content
    assert [one.ids.tolist() for one in sequences(after)] == before


def sequences(data):
    return [sequence for group in data.train for sequence in group.sequences]


def test_writing_that_breaks_off_leaves_nothing_that_is_taken_for_whole(step, tmp_path):
    recipe, tokenizer, rows = step
    work = tmp_path / "work"
    rows.write_text(rows.read_text() + '{"prompt": "and", "completion": 1')
    with pytest.raises(InputError, match="line 301: not valid JSON"):
        step_rows(recipe, "sft", tokenizer, work, model_limit=256)
    assert content(work) == []
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:300]))
    (work / f".{ROWS}.partial-0123abcd").mkdir()  # as a kill would leave it
    step_rows(recipe, "sft", tokenizer, work, model_limit=256)
    assert content(work) == [ROWS]
    remove_rows(work)
    assert content(work) == []


@pytest.mark.parametrize(("skip", "limit"), [(0, None), (5, None), (0, 3), (5, 3), (299, None)])
def test_one_record_at_a_time_is_the_same_as_all_at_once(step, skip, limit):
    recipe, _, _ = step
    source = recipe.source("rows").model_copy(update={"skip": skip, "limit": limit})
    found = streamed(source, kind=Demonstration, seed=0)
    first = next(found.records)
    assert found.statistics.num_rows <= skip + 2, "more was read than was asked for"
    at_once = streamed(source, kind=Demonstration, seed=0).read()
    assert [each.record for each in (first, *found.records)] == at_once.records
    assert at_once.num_rows == found.statistics.num_rows == len(at_once.records)
    texts = [record.messages[0].content for record in at_once.records]
    assert texts == [f"say {row}" for row in range(300)][skip : None if limit is None else skip + limit]


def test_nothing_behind_what_is_skipped_is_said(step):
    recipe, _, _ = step
    source = recipe.source("rows").model_copy(update={"skip": 300})
    with pytest.raises(InputError, match="skip is 300, and the source has no more rows"):
        list(streamed(source, kind=Demonstration, seed=0).records)


def test_every_prompt_that_is_not_asked_is_counted_by_why(tmp_path):
    rows = tmp_path / "prompts.jsonl"
    said = [f"say {row}" if row % 10 else "" for row in range(100)]
    rows.write_text(as_lines({"prompt": text} for text in said))
    asked = {}
    for split in ("train", "validation", "test"):
        constraints = ConstraintSettings(kinds=["punctuation:no_comma"], split=split)
        counts = Counter({"prompts": 3})
        asked[split] = prompts(
            SourceSettings(path=str(rows), on_error="skip", constraints=constraints), seed=0, counts=counts
        )
        assert counts.pop("prompts") == 3
        assert counts.pop("rows:dropped prompt is empty") == 10
        assert counts == {"prompts:not in constraints.split": 90 - len(asked[split])}
    assert sum(map(len, asked.values())) == 90
    everything = Counter()
    assert len(prompts(SourceSettings(path=str(rows), on_error="skip"), seed=0, counts=everything)) == 90
    assert everything == {"rows:dropped prompt is empty": 10}


def test_a_source_without_a_prompt_of_the_split_is_named(tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "say it"}\n')
    said = []
    for split in ("train", "validation", "test"):
        try:
            prompts(SourceSettings(path=str(rows), constraints=ConstraintSettings(split=split)), seed=0)
        except InputError as error:
            named = f"constraints.split: {rows}: none of its 1 prompts is in the split {split!r}"
            said.append(str(error) == named)
    assert said == [True, True], "a prompt is of one split of three"


def test_no_row_is_held_out_for_an_evaluation_and_trained_on_because_it_was_cut(step, tmp_path):
    """Prompts of many lengths, each twice: cut by step and evaluation as differently as may be, on one side for all."""
    recipe, tokenizer, rows = step
    asked = [f"{number} is a number that is not {'at all ' * (number % 30)}like {number}" for number in range(60)]
    lines = [{"prompt": text, "completion": said} for text in asked for said in ("so", "so be it, and " * 6)]
    rows.write_text(as_lines(lines))

    def sides(**limits):
        source = recipe.source("rows").model_copy(update={"overlong": "cut_prompt", **limits})
        cut = recipe.model_copy(update={"data": {**recipe.data, "rows": source}})
        data = step_rows(cut, "sft", tokenizer, tmp_path / "work", model_limit=256)
        sides = ({group.row - 20 for group in part if group.row >= 20} for part in (data.train, data.held_out))
        return source, *sides, data.counts

    _, trained, held_out, counts = sides()
    assert "cut:prompt" not in counts
    assert len(trained) + len(held_out) == 120
    assert all((row in trained) == (row + 1 in trained) for row in range(0, 120, 2)), "a prompt is on one side"
    for limits in ({"max_prompt_length": 24}, {"max_length": 80}, {"max_prompt_length": 16, "max_length": 60}):
        source, *cut, counts = sides(**limits)
        assert counts["cut:prompt"] > 20
        assert cut == [trained, held_out]
        groups, _ = likelihood_rows("rows", inputs_of(source), tokenizer, model_limit=256, best=True)
        assert {group.row for group in groups} == held_out


def of(*rewards, **known):
    """A group of as many responses as there are rewards, named by their number."""
    items = [{"content": f"answer {number}", "reward": reward} for number, reward in enumerate(rewards)]
    return {"prompt": "say it", "responses": items, **known}


IMITATED = {
    "liked and disliked answers": (
        [{"prompt": f"say {row}", "completion": f"it is {row}", "label": row % 3 > 0} for row in range(9)],
        [f"it is {row}" for row in range(9) if row % 3],
        {"dropped:not liked": 3},
    ),
    "one answer each": ([of(None), of(0.5), of(-2.0), of(0.0)], ["answer 0"] * 4, {}),
    "one answer that is ranked": (
        [{"prompt": "say it", "completions": [{"text": "a", "content": "b", "rank": 0}]}],
        ["b"],
        {"unused column:completions.text": 1},
    ),
    "answers that nobody has compared": (
        [of(None, None), of(0.5, 0.5), of(0.0, 0.0, 0.0), of(0.1, 0.3, 0.2)],
        ["answer 1"],
        {"dropped:no response is preferred": 3, "best of a comparison": 1},
    ),
    "answers of which one is named": (
        [of(None, None, chosen=1), of(0.5, 0.5, chosen=0), of(0.9, 0.1, chosen=1), of(0.0, chosen=0)],
        ["answer 1", "answer 0", "answer 1", "answer 0"],
        {"best of a comparison": 3},
    ),
    "answers below zero": ([of(-3.0, -1.0), of(-1.0, 0.0, -2.0)], ["answer 1"] * 2, {"best of a comparison": 2}),
    "a chosen answer": (
        [{"prompt": "say it", "chosen": "yes", "rejected": "no"}],
        ["yes"],
        {"best of a comparison": 1},
    ),
}


@pytest.mark.parametrize("case", IMITATED)
def test_only_answers_that_somebody_likes_are_imitated_and_the_others_counted(step, tmp_path, case):
    recipe, tokenizer, path = step
    rows, said, counted = IMITATED[case]
    path.write_text(as_lines(rows))
    data = alone(recipe, tokenizer, tmp_path / "work")
    trained = [tokenizer.decode(group.sequences[0].ids[group.sequences[0].loss_mask]) for group in data.train]
    assert [text.removesuffix("<|im_end|>") for text in trained] == said
    known = {"rows": len(rows), "records": len(rows), "trained": len(said), "held_out": 0}
    assert data.counts == {**known, **counted}


def alone(recipe, tokenizer, folder, name="sft", **settings):
    """What becomes of the file of rows as the step's only source, of which nothing is held out."""
    source = recipe.source("rows").model_copy(update={"held_out": 0.0, **settings})
    steps = {name: recipe.steps[name].model_copy(update={"data": "rows"})}
    recipe = recipe.model_copy(update={"data": {"rows": source}, "steps": {**recipe.steps, **steps}})
    return step_rows(recipe, name, tokenizer, folder, model_limit=256)


def test_rewards_that_stand_in_for_a_label_are_counted(step, tmp_path):
    recipe, tokenizer, path = step
    pairs = [{"prompt": f"say {row}", "chosen": "yes", "rejected": "no"} for row in range(10)]
    path.write_text(as_lines([*pairs, *({**pair, "chosen_score": 3, "rejected_score": 1} for pair in pairs[:4])]))
    data = alone(recipe, tokenizer, tmp_path, "prefer")
    assert data.counts["rewards 1 and 0 from the label"] == 10
    assert [group.rewards for group in data.train] == [(1.0, 0.0)] * 10 + [(3.0, 1.0)] * 4


def demonstration(row, said="so"):
    return {"prompt": f"say {row}", "completion": said}


RPO = PreferenceSettings(name="rpo_sq")


def test_a_row_is_named_by_its_file_and_its_line_whatever_was_passed_over(step, tmp_path):
    """Before it: another source, rows that are skipped, a row that is dropped, and a batch that is encoded at once."""
    recipe, tokenizer, path = step
    for name, on_error, good, bad, said in (
        ("sft", "skip", demonstration, demonstration(0, "on " * 300), "a sequence has "),
        ("prefer", "error", lambda row: of(row, 0.5), of(None, None), "the row has no rewards, and rpo_sq needs them"),
    ):
        rows = [good(row) for row in range(400)]
        rows[341] = bad
        if on_error == "skip":
            rows[20] = {**rows[20], "prompt": ""}
        path.write_text(as_lines(rows))
        shapes = {"overlong": "error", "skip": 5, "on_error": on_error}
        source = recipe.source("rows").model_copy(update=shapes)
        steps = {**recipe.steps, "prefer": recipe.steps["prefer"].model_copy(update={"loss": RPO})}
        asked = recipe.model_copy(update={"data": {**recipe.data, "rows": source}, "steps": steps})
        with pytest.raises(InputError, match=rf"^data\.rows\.path: {re.escape(str(path))}: row 342: {said}"):
            step_rows(asked, name, tokenizer, tmp_path / "work", model_limit=256)


STRICT = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception("no 'system' role") }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<|im_start|>' + m.role + '\n' + m.content.replace('gone', '') + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = [chat(("user", f"say {row}"), ("assistant", f"it is {row}")) for row in range(40)]
BAD = {  # what a row can be guilty of, found by the reader, the stage and the encoder -> the reason that is counted
    "an assistant message is empty": chat(("user", "a"), ("assistant", "")),
    "the row is a prompt without a response, but training needs demonstrations": chat(("user", "a")),
    "the chat template cannot render the dialogue: roles must alternate": chat(
        ("user", "a"), ("user", "b"), ("assistant", "c")
    ),
    "the chat template cannot render the dialogue: no": chat(("system", "a"), ("user", "b"), ("assistant", "c")),
    "the chat template alters an assistant message": chat(("user", "a"), ("assistant", "here and gone again")),
}


def test_a_row_is_skipped_and_counted_whatever_is_wrong_with_it(step, tmp_path):
    recipe, tokenizer, path = step
    tokenizer.chat_template = STRICT
    path.write_text(as_lines([*GOOD[:20], *BAD.values(), *BAD.values(), *GOOD[20:]]))
    source = recipe.source("rows").model_copy(update={"on_error": "skip"})
    data = alone(recipe, tokenizer, tmp_path / "skip", on_error="skip", held_out=source.held_out)
    assert len(data.train) + len(data.held_out) == len(GOOD)
    dropped = {name.removeprefix("dropped:"): n for name, n in data.counts.items() if name.startswith("dropped:")}
    assert dropped == dict.fromkeys(BAD, 2)
    groups, counts = likelihood_rows("rows", inputs_of(source), tokenizer, model_limit=256)
    assert (len(groups), counts["rows"]) == (len(data.held_out), 50)
    with pytest.raises(InputError, match=r"rows\.jsonl: row 21: "):
        alone(recipe, tokenizer, tmp_path / "error", on_error="error", held_out=source.held_out)


def test_the_number_of_distinct_reasons_is_bounded(step, tmp_path):
    recipe, tokenizer, path = step
    tokenizer.chat_template = STRICT.replace("'roles must alternate'", "'after ' + m.content")
    bad = [chat(("user", "a"), ("user", f"{row}"), ("assistant", "c")) for row in range(100)]
    path.write_text(as_lines([*GOOD, *bad]))
    counts = alone(recipe, tokenizer, tmp_path / "work", on_error="skip").counts
    dropped = {name: number for name, number in counts.items() if name.startswith("dropped:")}
    assert sum(dropped.values()) == 100
    assert len(dropped) <= 21 and dropped["dropped:other errors"] == 80


@pytest.mark.parametrize("identical", ["drop", "keep"])
def test_pairs_that_are_trained_on_as_the_same_tokens_are_dropped_and_counted(step, tmp_path, identical):
    """Equal as written, after the template has trimmed them, or where both are cut at the same token."""
    recipe, tokenizer, path = step
    trimming = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}"
    tokenizer.chat_template = trimming + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    tokenizer.chat_template += "{% endif %}"
    same = [("yes", "yes"), ("yes", " yes\n"), ("on and " * 90 + "far", "on and " * 90 + "near")]
    rows = [{"prompt": f"say {row}", "chosen": good, "rejected": bad} for row, (good, bad) in enumerate(same)]
    rows += [{"prompt": f"tell {row}", "chosen": f"it is {row}", "rejected": "no"} for row in range(20)]
    rows += [{**rows[-1], "prompt": f"ask {row}", "chosen_score": 1, "rejected_score": 2} for row in range(2)]
    path.write_text(as_lines(rows))
    shapes = {"identical": identical, "overlong": "cut_response", "max_length": 60}
    data = alone(recipe, tokenizer, tmp_path / "work", "prefer", **shapes)
    kept = identical == "keep"
    assert data.counts["identical responses" if kept else "dropped:identical responses"] == 3
    assert {group.row for group in data.train} == set(range(0 if kept else 3, 25))
    assert data.counts["a rejected response has a higher reward"] == 2


def test_a_row_of_the_wrong_kind_is_named_too(step, tmp_path):
    recipe, tokenizer, path = step
    path.write_text(as_lines([demonstration(0), demonstration(1)]))
    said = f"data.rows.path: {path}: row 1: the row is a demonstration, but training needs comparisons of responses"
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        step_rows(recipe, "prefer", tokenizer, tmp_path / "work", model_limit=256)
    words = {"words": recipe.source("words").model_copy(update={"max_length": 20, "overlong": "error"})}
    asked = recipe.model_copy(update={"data": {**recipe.data, **words}})
    with pytest.raises(InputError, match=r"^data\.\w+\.path: tasks:general: row 1: a sequence has "):
        step_rows(asked, "sft", tokenizer, tmp_path / "work", model_limit=256)


def test_a_preview_shows_no_row_that_the_model_is_too_short_for(step):
    recipe, _, path = step
    path.write_text(as_lines([demonstration(0, "on " * 300), demonstration(1), demonstration(2, "on " * 300)]))
    source = {"rows": recipe.source("rows").model_copy(update={"held_out": 0.0})}
    alone = {"sft": recipe.steps["sft"].model_copy(update={"data": "rows"})}
    asked = recipe.model_copy(update={"data": source, "steps": {**recipe.steps, **alone}})
    (shown,) = preview_rows(asked, "sft", number=3)
    assert "row 2: " in shown.plain


def test_columns_that_nobody_reads_are_told_once_for_the_source(step, tmp_path):
    recipe, tokenizer, path = step
    rows = [{**demonstration(row), "input": "of this" * (row % 2), "id": row, "note": None} for row in range(10)]
    path.write_text(as_lines(rows))
    data = alone(recipe, tokenizer, tmp_path / "work")
    known = {"rows": 10, "records": 10, "trained": 10, "held_out": 0}
    assert data.counts == {**known, "unused column:id": 10, "unused column:input": 5}
    said = describe(data.counts, data.format)
    assert said == "10 rows read as prompt_completion, 10 trained, 0 held out; unused columns: id, input"
    path.write_text(as_lines([{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_scor": 3, "rejected_score": 1}]))
    with pytest.raises(InputError, match="some responses of a comparison have a reward"):
        alone(recipe, tokenizer, tmp_path / "work", "prefer")
    path.write_text(as_lines([{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_scor": 3, "rejected_scor": 1}]))
    said = describe(alone(recipe, tokenizer, tmp_path / "work", "prefer").counts)
    assert "rewards 1 and 0 from the label 1; unused columns: chosen_scor, rejected_scor" in said


def test_rows_that_change_between_their_hash_and_their_reading_are_not_trained_on(step, tmp_path):
    recipe, tokenizer, path = step
    content = cache(content_of)
    recipe.pipeline(content)  # as a run does when it begins
    inputs = run_context(recipe, "sft", tmp_path, None, content).inputs
    request = RowRequest(recipe.steps["sft"], tokenizer, inputs, 256)
    assert len(stored_rows(request, tmp_path / "first").train) > 0
    before = path.read_text()
    path.write_text(before + as_lines([demonstration(301)]))
    with pytest.raises(RunError, match="rows.jsonl: changed after the run had begun and before the step had read it"):
        stored_rows(request, tmp_path / "second")
    assert not (tmp_path / "second" / ROWS).exists()
    path.write_text(before)
    assert len(stored_rows(request, tmp_path / "third").train) > 0


@pytest.mark.parametrize("name", ["limit", "skip"])
def test_a_number_of_rows_may_be_larger_than_a_machine_can_count(step, tmp_path, name):
    recipe, tokenizer, path = step
    path.write_text(as_lines([demonstration(0), demonstration(1)]))
    if name == "limit":
        assert alone(recipe, tokenizer, tmp_path / "work", limit=10**20).counts["trained"] == 2
    else:
        with pytest.raises(InputError, match="skip is 100000000000000000000, and the source has no more rows"):
            alone(recipe, tokenizer, tmp_path / "work", skip=10**20)
