"""Recipes with servers of their own: a stub in the place of vLLM, and a real `transformers serve`."""

import hashlib
import importlib.util
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import stub_engine
import torch
from saved_models import NAMES, WEIGHTS, save_reward_and_policy
from small_runs import RECIPE, ROOT, run, written
from transformers import AutoModelForCausalLM

from align.commands.check import check
from align.commands.generate import GenerateSettings, generate
from align.commands.one_step import settings_of
from align.data.chat_encoder import ChatEncoder
from align.distributed.progress import SilentProgress
from align.errors import InputError, RunError
from align.inference.managed.kinds import Adapters, ServedModel
from align.inference.managed.served_model import remove_merged, served_model
from align.inference.managed.settings import TransformersServeSettings, VllmSettings
from align.inference.requests.model_names import name_at_server
from align.models.loading.tokenizer import load_tokenizer
from align.models.policy import load_policy
from align.models.settings import PolicySettings
from align.records import Comparison, Message, Response
from align.rewards.settings import JudgeSettings
from align.stages.responses.settings import judge_model, with_folders
from align.workflow.recipe.inputs import check_inputs
from align.workflow.recipe.load import load_recipe

STUB = Path(__file__).parents[1] / "inference" / "stub_engine.py"
COMMAND = shlex.join([sys.executable, "-S", str(STUB)])
IMPORT = RECIPE.partition("  dpo: {{stage")[0]
ROUNDS = (
    IMPORT
    + """  rpo:
    stage: preference
    data: shown
    rounds: 2
    on_policy: true
    loss: {{name: rpo_sq}}
    train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}
    generate:
      prompts: {{shown: 8}}
      sampling: {{num_responses: 3, max_new_tokens: 12}}
      engine: &engine {{vllm: {{command: COMMAND, env: {{STUB_MARK: PLACE}}}}}}
      judges:
        - {{name: llm, settings: {{model: org/judge, mode: rating, engine: *engine}}}}
""".replace("COMMAND", json.dumps(COMMAND))
)


@pytest.fixture
def text(tmp_path):
    """The recipe; no server of it may be left at the end of a test."""
    mark = f"{tmp_path.name}-{os.getpid()}"
    yield ROUNDS.replace("PLACE", mark)
    assert _left(mark) == []


def _left(mark):
    """The processes with the mark, once they have had time to end."""
    deadline = time.monotonic() + 120
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _marked(mark):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"STUB_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
    return found


def groups(folder, step):
    return (folder / "runs/small" / step / "groups.jsonl").read_text()


def test_rounds_and_their_judge_are_answered_by_a_server_for_each_policy(tmp_path, text):
    made, told = run(tmp_path, text=text)
    assert list(made) == ["base", "sft", "rpo-1-samples", "rpo-1", "rpo-2-samples", "rpo-2"]
    for step, policy in (("rpo-1-samples", "sft"), ("rpo-2-samples", "rpo-1")):
        folder = tmp_path / "runs/small" / step
        commands = [line for line in (folder / "engine.log").read_text().splitlines() if line.startswith("$ ")]
        served = [
            re.search(r" serve (\S+) .*--served-model-name (\S+)-[0-9a-f]{8}", line).groups() for line in commands
        ]
        assert served == [(str(tmp_path / "runs/small" / policy), policy), ("org/judge", "org/judge")]
        rows = [json.loads(line) for line in groups(tmp_path, step).splitlines()]
        assert {origin["policy"] for row in rows for origin in row["metadata"]["origins"]} == {policy}
        assert {response["reward"] for row in rows for response in row["responses"]} <= set(map(float, range(1, 11)))
    assert groups(tmp_path, "rpo-1-samples") != groups(tmp_path, "rpo-2-samples")
    engine = made["rpo-1-samples"]["engine"]
    assert (engine["kind"], engine["version"], engine["repeatable"]) == ("vllm", "0.33.0", False)
    assert engine["vllm"]["batch_invariant"] is False
    assert any("tokens_per_s" in step and "requests_per_s" in step for step in told.steps)


@pytest.mark.slow
def test_rounds_that_are_killed_at_any_moment_leave_no_server_and_resume_to_the_same_groups(tmp_path, text):
    run(tmp_path / "whole", text=text)
    path = written(tmp_path / "killed", text)
    words = [sys.executable, "-m", "align", "run", str(path)]
    mark = re.search(r"STUB_MARK: ([\w-]+)", text)[1]
    killed, policy = random.choice((("rpo-1-samples", "sft"), ("rpo-2-samples", "rpo-1")))
    log = tmp_path / "killed/runs/small" / f"{killed}.partial" / "engine.log"  # there once the step's server starts
    environment = os.environ | {"STUB_HOLD": policy}  # so that the step cannot end before the kill
    nowhere = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen(words, cwd=ROOT, env=environment, **nowhere)
    while not log.exists():
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.5))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert _left(mark) == []
    _, told = run(tmp_path / "killed", text=text)
    assert f"{killed}: resumes where it was interrupted" in told.notes
    for step in ("rpo-1-samples", "rpo-2-samples"):
        assert groups(tmp_path / "whole", step) == groups(tmp_path / "killed", step)


def test_a_step_that_was_sampled_by_another_version_is_not_finished_by_this_one(tmp_path, text, monkeypatch):
    from align.stages.responses import engines  # noqa: PLC0415 - what is replaced

    class Stops(Exception):
        pass

    class Interrupts:
        def __getattr__(self, name):
            return lambda *args, **kwargs: None

        def advance(self, units, metrics=None):
            if metrics and "requests_per_s" in metrics:
                raise Stops

    with pytest.raises(Stops):
        run(tmp_path, text=text, told=Interrupts(), until="rpo-1-samples")
    monkeypatch.setattr(engines, "engine_version", lambda settings: "0.34.0")
    with pytest.raises(
        InputError, match=r'engine\.version "0\.33\.0", but this call has "0\.34\.0"; finish it unchanged'
    ):
        run(tmp_path, text=text, until="rpo-1-samples")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("forked_launches")
def test_the_processes_of_a_launch_share_the_first_ones_server(tmp_path, text):
    run(tmp_path / "one", text=text, until="rpo-1-samples")
    launched = "steps.rpo.generate.launch=launch/ddp-cpu-2.yaml"
    run(tmp_path / "two", launched, text=text, until="rpo-1-samples")
    log = (tmp_path / "two/runs/small/rpo-1-samples/engine.log").read_text()
    assert log.count("$ ") == 2  # for the policy, and for the judge
    assert groups(tmp_path / "one", "rpo-1-samples") == groups(tmp_path / "two", "rpo-1-samples")


def test_a_server_that_crashes_is_one_line_and_the_samples_so_far_are_kept(tmp_path, text):
    crash = "env: {{STUB_FAULT: crash later, STUB_ANSWERS: '5', "
    with pytest.raises(
        RunError, match=r"^vLLM ended while it was asked: torch\.AcceleratorError: CUDA error.*"
    ) as caught:
        run(tmp_path, text=text.replace("env: {{", crash), until="rpo-1-samples")
    assert "\n" not in str(caught.value)
    kept = (tmp_path / "runs/small/rpo-1-samples.partial/.groups.jsonl.samples").read_text()
    assert 1 < len(kept.splitlines()) <= 6
    made, told = run(tmp_path, text=text, until="rpo-1-samples")
    assert made["rpo-1-samples"]["report"]


def test_a_reward_model_of_the_recipe_rates_the_rounds_on_a_server(tmp_path, text):
    save_reward_and_policy(tmp_path)
    rater = tmp_path / "reward"
    judge = f"        - {{{{name: reward_model, settings: {{{{path: {rater}, engine: *engine}}}}}}}}\n"
    made, _ = run(tmp_path, text=text.partition("        - {{name: llm")[0] + judge, until="rpo-1-samples")
    assert made["rpo-1-samples"]["report"]
    log = (tmp_path / "runs/small/rpo-1-samples/engine.log").read_text()
    assert [" --runner pooling " in line for line in log.splitlines() if line.startswith("$ ")] == [False, True]
    encoder = ChatEncoder(load_tokenizer(PolicySettings(path=str(rater))))
    weights = [hashlib.sha256((rater / "model.safetensors").read_bytes()).hexdigest()]
    rated = 0
    for row in map(json.loads, groups(tmp_path, "rpo-1-samples").splitlines()):
        prompt = tuple(Message(one["role"], one["content"]) for one in row["prompt"])
        for response in row["responses"]:
            dialogue = Comparison(prompt, (Response(response["content"]),))
            ((sequence,),) = (group.sequences for group in encoder.encode_all([dialogue]))
            values = stub_engine.scores(weights, sequence.ids.tolist(), len(NAMES))
            assert response["attributes"] == dict(zip(NAMES, values, strict=True))
            assert response["reward"] == pytest.approx(values[0] * WEIGHTS[0] + values[1] * WEIGHTS[1])
            rated += 1
    assert rated >= 16


def test_a_reward_model_on_an_engine_that_cannot_rate_is_refused_by_check(tmp_path, text):
    served = "{{name: reward_model, settings: {{path: org/rater, engine: {{transformers_serve: {{}}}}}}}}"
    said = (
        r"small\.yaml:\d+: steps\.rpo\.generate\.judges\.0\.settings\.engine\.transformers_serve: transformers serve "
    )
    with pytest.raises(InputError, match=said):
        loaded(tmp_path, text.partition("        - {{name: llm")[0] + f"        - {served}\n")


@pytest.mark.parametrize(("judge", "key"), [("llm", "model"), ("reward_model", "path")])
def test_a_judge_that_a_step_made_has_the_name_that_the_server_gives_it(judge, key):
    server = {"base_url": "http://h:1/v1", "models": {"made": "there", "other": "elsewhere"}}
    settings = {key: "step:made", "engine": {"server": server}}
    (found,) = with_folders(
        [JudgeSettings(name=judge, settings=settings)], SimpleNamespace(folders={"made": Path("/runs/made")})
    )
    model = judge_model(found)
    assert name_at_server(model.path, model.path, model.engine.server, ["elsewhere", "there"]) == "there"


def loaded(folder, text, *overrides):
    return load_recipe(written(folder, text), overrides)


def plain(more=""):
    """The recipe with a server that runs already, and a rule as judge."""
    engine = f"      engine: {{{{server: {{{{base_url: 'http://h:1/v1'{more}}}}}}}}}\n"
    return f"{ROUNDS.partition('      engine: ')[0]}{engine}      judges: [{{{{name: verifier}}}}]\n"


def test_a_plain_server_for_several_policies_is_refused_before_anything_runs(tmp_path):
    said = (
        r"small\.yaml:\d+: steps\.rpo\.generate\.engine\.server: this server is to sample 2 policies \(rpo-1, sft\), "
        r"and nothing says how it follows them: let align start a server for each \(engine: \{vllm: \{\}\}\), or give"
    )
    with pytest.raises(InputError, match=said):
        loaded(tmp_path, plain())
    loaded(tmp_path, plain(), "steps.rpo.rounds=1")


@pytest.mark.parametrize(
    "more",
    [
        ", models: {{sft: one, rpo-1: two}}",
        ", refresh: 'reload {{folder}}'",
        ", refresh: 'r {{folder}}', models: {{sft: m, rpo-1: m}}",
    ],
)
def test_a_server_that_says_how_it_follows_the_policies_is_accepted(tmp_path, more):
    assert len(loaded(tmp_path, plain(more)).steps) == 6


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (", models: {{sft: one}}", r"this server is to sample 2 policies .* such as \{rpo-1: NAME\}"),
        (", models: {{sft: one, rpo-1: one}}", "rpo-1 and sft are both 'one' there; different policies need different"),
        (", models: {{sft: one, rpo: two}}", "nothing called 'rpo' is sampled; did you mean 'rpo-1'"),
    ],
)
def test_a_server_whose_names_do_not_tell_the_policies_apart_is_refused(tmp_path, more, said):
    with pytest.raises(InputError, match=said):
        loaded(tmp_path, plain(more))


def test_the_command_of_a_managed_engine_is_looked_for_before_anything_runs(tmp_path, text):
    path = written(tmp_path, text.replace(json.dumps(COMMAND), "/no/such/vllm"))
    recipe = load_recipe(path, ())
    with pytest.raises(InputError) as caught:
        check_inputs(recipe, path)
    lines = str(caught.value).splitlines()
    assert any("steps.rpo.generate.engine.vllm.command: no command '/no/such/vllm' for vLLM" in line for line in lines)
    assert any("generate.judges.0.settings.engine.vllm.command" in line for line in lines)


def test_check_shows_the_version_and_whether_samples_are_repeated(tmp_path, text, capsys):
    path = written(tmp_path, text)
    for overrides, repeats in (
        ((), "engine           vLLM 0.33.0, other samples after a resume"),
        (("steps.rpo.generate.engine.vllm.batch_invariant=true",), "vLLM 0.33.0, the same samples after a resume"),
    ):
        check(path, overrides)
        assert repeats in capsys.readouterr().out


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """The folder of a step that keeps its adapters, on the model of another step."""
    folder = tmp_path_factory.mktemp("adapted")
    run(folder, text=IMPORT.partition("  sft: ")[0])
    base = folder / "runs/small/base"
    text = (
        "run: lora\nruns: {runs}\npolicy:\n"
        f"  path: {base}\n"
        "  lora: {{rank: 3, alpha: 6, adapters: continued}}\n"
        'data: {{shown: {{path: "tasks:general", limit: 12}}}}\n'
        "steps:\n  sft: {{stage: sft, data: shown, train: {{learning_rate: 1.0e-1, prompts_per_step: 4}}}}\n"
    )
    run(folder, text=text)
    return base, folder / "runs/lora/sft"


def test_adapters_are_served_on_their_base_where_the_engine_takes_them(adapted, tmp_path):
    base, folder = adapted
    model = served_model(str(folder), "sft", VllmSettings(), tmp_path)
    assert model == ServedModel(str(base), "sft", Adapters(str(folder), 3))
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_merged_into_a_copy_where_it_does_not(adapted, tmp_path):
    _, folder = adapted
    model = served_model(str(folder), "sft", TransformersServeSettings(), tmp_path)
    assert model.adapters is None
    merged = AutoModelForCausalLM.from_pretrained(model.path)
    policy, _ = load_policy(PolicySettings(path=str(folder)))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, policy.hf(ids).logits, rtol=0, atol=1e-5)
    remove_merged(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 1}},
        {"bias": "all"},
        {"r": 1024},
    ],
)
def test_adapters_that_vllm_would_refuse_or_scale_wrongly_are_merged(adapted, tmp_path, monkeypatch, change):
    from align.inference.managed import served_model as module  # noqa: PLC0415 - what is replaced

    monkeypatch.setattr(module, "_merged", lambda path, target: target)
    config = module.load_adapter_config(str(adapted[1]))
    for name, value in change.items():
        setattr(config, name, value)
    monkeypatch.setattr(module, "load_adapter_config", lambda path: config)
    assert served_model(str(adapted[1]), "sft", VllmSettings(), tmp_path).adapters is None


def test_adapters_on_a_base_in_four_bits_are_refused(adapted, tmp_path, monkeypatch):
    from align.inference.managed import served_model as module  # noqa: PLC0415 - what is replaced

    monkeypatch.setattr(module, "base_quantization", lambda path: "nf4")
    with pytest.raises(InputError, match="trained on a base in 4 bits, which vLLM would serve unquantized"):
        served_model(str(adapted[1]), "sft", VllmSettings(), tmp_path)


def test_a_step_of_adapters_is_sampled_without_merging(adapted, tmp_path, text):
    base, folder = adapted
    settings = settings_of(GenerateSettings, [], [f"engine.vllm.command={COMMAND}", "sampling.num_responses=2"])
    out, progress = tmp_path / "out.jsonl", SilentProgress()
    made = generate([str(folder)], "tasks:general", out, settings=settings, limit=3, progress=progress)
    assert made["tokens_per_s"][str(folder)] > 0
    log = (tmp_path / ".out.jsonl.work/engine.log").read_text()
    assert f"serve {base} " in log
    assert "--enable-lora --max-lora-rank 8" in log


TWO_POLICIES = (
    IMPORT
    + """  answers:
    stage: generate
    policies: [base, sft]
    data: shown
    prompts: {{shown: 6}}
    sampling: {{num_responses: 1, temperature: 0.0, max_new_tokens: 12}}
    engine: ENGINE
    judges: [{{name: "small_runs:longer"}}]
"""
)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "openai")),
    reason="transformers serve needs fastapi, uvicorn and openai",
)
def test_greedy_samples_through_transformers_serve_have_the_groups_of_the_local_engine(tmp_path):
    local = TWO_POLICIES.replace("ENGINE", "{{local: {{precision: fp32}}}}")
    served = TWO_POLICIES.replace("ENGINE", "{{transformers_serve: {{ready_s: 300.0}}}}")
    run(tmp_path / "local", text=local)
    made, _ = run(tmp_path / "served", text=served)
    by_engine = [
        [
            (row["prompt"], [(one["content"], one["reward"]) for one in row["responses"]])
            for row in map(json.loads, groups(tmp_path / name, "answers").splitlines())
        ]
        for name in ("local", "served")
    ]
    assert by_engine[0] == by_engine[1]
    assert len(by_engine[0]) >= 2
    assert made["answers"]["engine"]["repeatable"] is True
