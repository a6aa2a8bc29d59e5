"""Servers that `align` starts, with a stub in the place of vLLM: starts, faults and endings."""

import asyncio
import hashlib
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import stub_engine

from align.commands.interactive import chat as chat_module
from align.config import build
from align.distributed.processes import Processes
from align.distributed.progress import SilentProgress
from align.errors import InputError, RunError
from align.inference.engines import load_engine
from align.inference.managed import server as server_module
from align.inference.managed.kinds import KINDS, Adapters, ServedModel
from align.inference.managed.server import ManagedServer, free_port
from align.inference.managed.serving import LOG, Place, refresh_words, serving
from align.inference.managed.settings import SglangSettings, TransformersServeSettings, VllmSettings
from align.inference.managed.version import engine_version
from align.inference.openai_engine import OpenAIEngine
from align.inference.requests.classifier import ClassifierClient
from align.inference.settings import EngineSettings, SamplingSettings, ServerSettings
from align.records import Message, Prompt
from align.stages.responses.engines import engine_report

HERE = Path(__file__).parent
STUB = shlex.join([sys.executable, "-S", str(HERE / "stub_engine.py")])
PROMPTS = [Prompt((Message("user", f"question {number}"),)) for number in range(3)]
SAMPLING = SamplingSettings(num_responses=2)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def marked(mark):
    """The processes with the mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"STUB_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append((int(folder.name), (folder / "cmdline").read_bytes().decode().split("\0")[:4]))
    return found


def wait_until_gone(mark, seconds=120):
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.fixture
def mark():
    name = f"{os.getpid()}-{time.monotonic_ns()}"
    yield name
    assert wait_until_gone(name) == [], "a server outlives its run"


@pytest.fixture
def policy(tmp_path):
    """The folder of a policy, as far as the stub reads it."""
    folder = tmp_path / "my policy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def vllm(mark, fault="", **settings):
    env = {"STUB_MARK": mark, "STUB_FAULT": fault, "STUB_ANSWERS": "3"}
    return EngineSettings(vllm=VllmSettings(command=STUB, env=env, **settings))


def place(tmp_path):
    return Place(Processes(), tmp_path / "step", SilentProgress())


def samples(reachable, policy):
    engine = load_engine(str(policy), reachable, name="rpo-1")
    return sorted(engine.sample(PROMPTS, SAMPLING), key=lambda one: (one.key, one.number))


@pytest.mark.parametrize("fault", ["", "slow"])
def test_a_policy_is_sampled_from_a_server_of_its_own_that_then_ends(tmp_path, policy, mark, fault):
    found = []
    for _ in range(2):
        with serving(str(policy), vllm(mark, fault), name="rpo-1", place=place(tmp_path)) as reachable:
            assert len(marked(mark)) == 3  # the supervisor, the server and its worker
            found.append(samples(reachable, policy))
        assert marked(mark) == []
    assert [one.policy for one in found[0]] == ["rpo-1"] * 6
    assert len({one.text for one in found[0]}) == 6
    assert found[0] == found[1]
    commands = [line for line in (tmp_path / "step" / LOG).read_text().splitlines() if line.startswith("$ ")]
    assert len(commands) == 2
    assert f"serve {policy} --host 127.0.0.1 --port " in commands[0]
    assert "--generation-config vllm" in commands[0]


def test_two_policies_have_servers_of_different_names_and_weights(tmp_path, policy, mark):
    texts = []
    for weights in (b"weights", b"other"):
        (policy / "model.safetensors").write_bytes(weights)
        with serving(str(policy), vllm(mark), name="rpo-1", place=place(tmp_path)) as reachable:
            texts.append([one.text for one in samples(reachable, policy)])
            names = reachable.server.models
            assert re.fullmatch(r"rpo-1-[0-9a-f]{8}", names["rpo-1"])
    assert not set(texts[0]) & set(texts[1])


class TimeAfter:
    """In place of `time`: an hour passes once a file contains a text, and none before."""

    sleep = staticmethod(time.sleep)

    def __init__(self, path, text):
        self.path, self.text = path, text

    def monotonic(self):
        return 3600.0 if self.path.is_file() and self.text in self.path.read_text() else 0.0


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("crash", r"vLLM ended before it was ready: ValueError: no room for the KV cache; see .*engine\.log"),
        ("hang", r"vLLM was not ready after 3 s \(ready_s\), last output: INFO vLLM API server version 0\.33\.0; see"),
        ("wrong name", r"vLLM lists 'other' where 'rpo-1-[0-9a-f]{8}' was to be served; see .*engine\.log"),
    ],
)
def test_a_server_that_does_not_start_is_one_line_and_leaves_nothing(tmp_path, policy, mark, monkeypatch, fault, said):
    if fault == "hang":
        monkeypatch.setattr(server_module, "ANSWER_S", 0.3)
        monkeypatch.setattr(server_module, "time", TimeAfter(tmp_path / "step" / LOG, "API server version"))
    engine = vllm(mark, fault, ready_s=3.0 if fault == "hang" else 300.0)
    with (
        pytest.raises(RunError, match=said) as caught,
        serving(str(policy), engine, name="rpo-1", place=place(tmp_path)),
    ):
        pytest.fail("the block runs without a server")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def the_supervisor(mark):
    (found,) = [pid for pid, words in marked(mark) if any("supervisor" in word for word in words)]
    return found


@pytest.mark.parametrize("is_late", [False, True])
def test_a_server_that_ends_while_it_is_asked_is_one_line(tmp_path, policy, mark, monkeypatch, is_late):
    """Also where its supervisor notices the end only after the request has failed for the last time."""
    said = r"vLLM ended while it was asked: torch\.AcceleratorError: CUDA error: .*; see .*; finished samples are kept"
    found = []
    with (
        pytest.raises(RunError, match=said) as caught,
        serving(str(policy), vllm(mark, "crash later"), name="rpo-1", place=place(tmp_path)) as reachable,
    ):
        settings = reachable.server.model_copy(update={"retries": 1})
        asked = OpenAIEngine(str(policy), settings, name="rpo-1")
        if is_late:
            supervisor, health = the_supervisor(mark), ManagedServer._health
            os.kill(supervisor, signal.SIGSTOP)
            go_on = lambda server: (os.kill(supervisor, signal.SIGCONT), health(server))[1]  # noqa: E731
            monkeypatch.setattr(ManagedServer, "_health", go_on)
        found.extend(asked.sample(PROMPTS, SAMPLING))
    assert "\n" not in str(caught.value)
    assert len(found) <= 3


def test_a_server_that_ignores_sigterm_is_killed(tmp_path, policy, mark, monkeypatch):
    monkeypatch.setattr(server_module, "GRACE_S", 0.3)
    with serving(str(policy), vllm(mark, "stubborn"), name="rpo-1", place=place(tmp_path)):
        assert len(marked(mark)) == 3
    assert marked(mark) == []


def test_a_port_that_another_program_took_is_replaced(tmp_path, policy, mark, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = iter([taken.getsockname()[1]])
        monkeypatch.setattr(server_module, "free_port", lambda: next(ports, None) or free_port())
        monkeypatch.setattr(server_module, "ANSWER_S", 0.3)
        with serving(str(policy), vllm(mark), name="rpo-1", place=place(tmp_path)) as reachable:
            assert len(samples(reachable, policy)) == 6
    log = (tmp_path / "step" / LOG).read_text()
    assert log.count("\n$ ") == 1
    assert "Address already in use" in log


def test_an_error_or_interrupt_in_the_block_ends_the_server(tmp_path, policy, mark):
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), serving(str(policy), vllm(mark), name="rpo-1", place=place(tmp_path)):
            raise error
        assert marked(mark) == []


def test_a_server_ends_when_its_supervisor_is_killed(tmp_path, policy, mark):
    server = ManagedServer(vllm(mark).vllm, ServedModel(str(policy), "m"), tmp_path / "log")
    server.start()
    supervisor = the_supervisor(mark)
    (api_server,) = [pid for pid, words in marked(mark) if any("stub_engine" in word for word in words[:3])]
    os.kill(supervisor, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while any(pid == api_server for pid, _ in marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = marked(mark)
    for pid, _ in left:  # the worker, which a real engine ends itself
        os.kill(pid, signal.SIGKILL)
    assert api_server not in [pid for pid, _ in left]
    assert server.has_ended
    server.stop()


def killed_parents(tmp_path, policy, mark, numbers, seed):
    """Kill a program a moment after it was seen with so many processes, in a round of a start, requests and a stop."""
    moments = random.Random(seed)
    for index, number in enumerate(numbers):
        words = [sys.executable, str(HERE / "serving_parent.py"), STUB, str(policy), str(tmp_path / f"log-{index}")]
        with subprocess.Popen([*words, mark], stdout=subprocess.PIPE) as parent:
            assert parent.stdout.readline() == b"started\n"
            deadline = time.monotonic() + 300
            while len(marked(mark)) != number:
                assert time.monotonic() < deadline
            time.sleep(moments.uniform(0, 0.2))
            parent.kill()
        assert wait_until_gone(mark) == [], f"kill {index} leaves a server"


def test_no_server_outlives_a_killed_program(tmp_path, policy, mark):
    killed_parents(tmp_path, policy, mark, (3, 0, 2, 3), seed=0)


@pytest.mark.slow
def test_no_server_outlives_twelve_kills(tmp_path, policy, mark):
    killed_parents(tmp_path, policy, mark, (0, 1, 2, 3) * 3, seed=1)


def test_an_engine_outside_of_a_step_stops_with_close_also_in_a_running_event_loop(policy, mark):
    async def cell():
        with load_engine(str(policy), vllm(mark), name="rpo-1") as engine:
            assert len(list(engine.sample(PROMPTS, SAMPLING))) == 6
            assert engine.throughput.requests == 6
            assert marked(mark)

    asyncio.run(cell())


@pytest.mark.parametrize("ending", [KeyboardInterrupt, RunError])
def test_the_server_of_a_chat_stops_with_it_and_leaves_its_log_after_an_error(
    tmp_path, policy, mark, monkeypatch, capsys, ending
):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(chat_module, "open_model", lambda path: None)  # the stub reads no model
    lines = iter(["question"])

    def answer(prompt):
        assert marked(mark)
        if (line := next(lines, None)) is None:
            raise ending
        return line

    monkeypatch.setattr("builtins.input", answer)
    with pytest.raises(ending):
        chat_module.chat(str(policy), None, chat_module.ChatSettings(engine=vllm(mark)))
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert marked(mark) == []
    logs = [path.name for path in (tmp_path / "temporary").glob("*/*")]
    assert logs == ([LOG] if ending is RunError else []) and len(list((tmp_path / "temporary").iterdir())) == len(logs)


def test_the_server_does_not_see_what_a_launcher_set(tmp_path, policy, mark, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("KEPT", "yes")
    settings = vllm(mark, batch_invariant=True).vllm
    server = ManagedServer(settings, ServedModel(str(policy), "m"), tmp_path / "log")
    server.start()
    environments = [(Path(f"/proc/{pid}/environ")).read_bytes().decode().split("\0") for pid, _ in marked(mark)]
    server.stop()
    for environment in environments:
        assert not [each for each in environment if each.endswith("=7")]
        assert {"KEPT=yes", "VLLM_BATCH_INVARIANT=1"} <= set(environment)


def test_the_words_of_each_kind_are_those_of_its_program():
    """The options of vLLM 0.33.0, SGLang 0.5.23 and transformers 5.24."""
    model = ServedModel("/runs/a b", "n")
    given = VllmSettings(tensor_parallel=2, gpu_share=0.5, max_model_len=4096, args=["--dtype", "bfloat16"])
    assert KINDS["vllm"].arguments(given, model, 1234) == [
        *("serve", "/runs/a b", "--host", "127.0.0.1", "--port", "1234", "--tensor-parallel-size", "2"),
        *("--gpu-memory-utilization", "0.5", "--generation-config", "vllm", "--max-model-len", "4096"),
        *("--served-model-name", "n", "--dtype", "bfloat16"),
    ]
    adapted = KINDS["vllm"].arguments(VllmSettings(), model._replace(adapters=Adapters("/runs/lora", 24)), 1)
    assert adapted[adapted.index("--served-model-name") :] == [
        *("--served-model-name", "n-base", "--tokenizer", "/runs/lora", "--enable-lora", "--max-lora-rank", "32"),
        *("--lora-modules", json.dumps({"name": "n", "path": "/runs/lora"})),
    ]
    assert KINDS["sglang"].arguments(SglangSettings(batch_invariant=True, max_model_len=99), model, 5) == [
        *("serve", "--model-path", "/runs/a b", "--served-model-name", "n", "--host", "127.0.0.1", "--port", "5"),
        *("--tp-size", "1", "--mem-fraction-static", "0.9", "--sampling-defaults", "openai", "--context-length", "99"),
        "--enable-deterministic-inference",
    ]
    assert KINDS["transformers_serve"].arguments(TransformersServeSettings(), model, 5) == [
        *("serve", "/runs/a b", "--host", "127.0.0.1", "--port", "5"),
    ]


def program(folder, text):
    path = folder / "program"
    path.write_text(f"#!{sys.executable} -S\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        ("0.33.0", "0.33.0"),
        ("INFO 11-29 12:00:00 [__init__.py:216] platform cuda.\\n0.33.1rc2+cu130", "0.33.1rc2+cu130"),
        ("sglang version: 0.5.23\\ngit revision: abc1234", "0.5.23"),
    ],
)
def test_the_version_is_read_from_what_the_command_prints(tmp_path, printed, version):
    assert engine_version(VllmSettings(command=program(tmp_path, f"print('{printed}')"))) == version


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise SystemExit('no module named vllm')", "ends with status 1 and prints no version: no module named vllm"),
        ("print('hello')", "ends with status 0 and prints no version: hello"),
        ("import time; time.sleep(30)", "does not end within 0.5 s"),
    ],
)
def test_a_command_without_a_version_is_one_line(tmp_path, text, said):
    settings = VllmSettings(command=program(tmp_path, text), ready_s=0.5 if "sleep" in text else 300.0)
    with pytest.raises(InputError, match=said) as caught:
        engine_version(settings)
    assert caught.value.loc == ("command",)
    assert "\n" not in str(caught.value)


def test_a_missing_command_is_named_with_what_would_be_right():
    with pytest.raises(InputError, match=r"no command '/no/such/vllm' for vLLM: install it .* such as /opt/env/bin/vl"):
        engine_version(VllmSettings(command="/no/such/vllm serve"))


def test_the_command_of_transformers_is_found_beside_the_interpreter(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    import transformers  # noqa: PLC0415 - slow

    assert engine_version(TransformersServeSettings()) == transformers.__version__


def test_what_decides_a_sample_is_in_the_key_and_how_it_runs_is_not():
    plain = EngineSettings(vllm=VllmSettings())
    how = VllmSettings(command="/opt/vllm/bin/vllm", tensor_parallel=4, gpu_share=0.5, ready_s=9.0, concurrency=7)
    assert EngineSettings(vllm=how).cache_key() == plain.cache_key()
    for changed in ({"batch_invariant": True}, {"args": ["--dtype", "float32"]}, {"env": {"A": "b"}}):
        assert EngineSettings(vllm=VllmSettings(**changed)).cache_key() != plain.cache_key()
    assert EngineSettings(sglang=SglangSettings()).cache_key() != plain.cache_key()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"vllm": {"command": "  "}}, "name a command"),
        ({"vllm": {"gpu_share": 1.5}}, "gpu_share"),
        ({"transformers_serve": {"tensor_parallel": 2}}, "tensor_parallel: unknown key"),
        ({"vllm": {}, "server": {"base_url": "http://h/v1"}}, "give one engine, not vllm and server"),
        ({"server": {"base_url": "http://h/v1", "refresh": "reload"}}, r"\{folder\} is missing"),
    ],
)
def test_invalid_settings_are_rejected(values, said):
    with pytest.raises(InputError, match=said):
        build(EngineSettings, values, ("engine",))


def test_gguf_files_are_refused(tmp_path, mark):
    with (
        pytest.raises(InputError, match=r"vLLM serves folders and hub ids, and gguf:m\.gguf is a GGUF file"),
        serving("gguf:m.gguf", vllm(mark), name="m", place=place(tmp_path)),
    ):
        pytest.fail("served")


def test_a_server_is_refreshed_before_a_policy_is_sampled(tmp_path, policy):
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(repr(sys.argv[2:])); print('loaded')"
    command = shlex.join([sys.executable, "-S", "-c", code, str(tmp_path / "seen"), "{folder}", "{policy}"])
    engine = EngineSettings(server=ServerSettings(base_url="http://h/v1", refresh=command))
    with serving(str(policy), engine, name="rpo-1", place=place(tmp_path)) as reachable:
        assert reachable == engine
    assert (tmp_path / "seen").read_text() == repr([str(policy), "rpo-1"])
    assert refresh_words("a {folder}/x", "org/name", "p") == ["a", "org/name/x"]
    failing = EngineSettings(
        server=ServerSettings(base_url="http://h/v1", refresh="/bin/sh -c 'echo no; exit 3' {folder}")
    )
    with (
        pytest.raises(RunError, match=r"engine\.server\.refresh ended with status 3: no; see .*engine\.log"),
        serving(str(policy), failing, name="rpo-1", place=place(tmp_path)),
    ):
        pytest.fail("sampled")


TOKENS = [[[1, 2, 3], [1, 2]], [[4]], [[5, 6], [7, 8], [9]], *[[[number]] for number in range(10, 40)]]


@pytest.fixture
def rater(policy):
    """The folder of a reward model, as far as the stub reads it."""
    (policy / "config.json").write_text(json.dumps({"id2label": {"0": "good", "1": "long", "2": "odd"}}))
    return str(policy)


def asked_for_scores(rater, reachable, num_labels=3):
    return ClassifierClient(rater, reachable.server, name="rate", num_labels=num_labels)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_a_reward_model_is_asked_for_scores_without_activation(tmp_path, rater, mark, precision, dtype):
    with serving(rater, vllm(mark), name="rate", place=place(tmp_path), rates=precision) as reachable:
        found = list(asked_for_scores(rater, reachable).scores(TOKENS))
    weights = [hashlib.sha256(b"weights").hexdigest()]
    assert found == [[stub_engine.scores(weights, ids, 3) for ids in group] for group in TOKENS]
    assert min(value for group in found for values in group for value in values) < 0
    log = (tmp_path / "step" / LOG).read_text()
    assert f"--dtype {dtype}" in log
    assert "--generation-config" not in log


def test_a_group_that_is_too_long_for_the_server_has_no_scores(tmp_path, rater, mark):
    with serving(rater, vllm(mark, max_model_len=2), name="rate", place=place(tmp_path), rates="fp32") as reachable:
        found = list(asked_for_scores(rater, reachable).scores(TOKENS))
    assert [scores is None for scores in found] == [len(group[0]) > 2 for group in TOKENS]


def test_scores_of_another_number_of_labels_are_an_error(tmp_path, rater, mark):
    said = r"/classify returns \[3, 3\] scores for 2 responses, not 5 for each"
    with (
        pytest.raises(RunError, match=said),
        serving(rater, vllm(mark), name="rate", place=place(tmp_path), rates="fp32") as reachable,
    ):
        list(asked_for_scores(rater, reachable, num_labels=5).scores(TOKENS[:1]))


def test_a_server_that_ends_while_it_scores_is_one_line(tmp_path, rater, mark):
    found = []
    with (
        pytest.raises(RunError, match=r"vLLM ended while it was asked: torch\.AcceleratorError: CUDA error: "),
        serving(rater, vllm(mark, "crash later"), name="rate", place=place(tmp_path), rates="fp32") as reachable,
    ):
        found.extend(asked_for_scores(rater, reachable).scores(TOKENS))
    assert len(found) <= 3


@pytest.mark.parametrize(("number", "share"), [(1, 16), (3, 5), (40, 1)])
def test_the_processes_of_a_launch_share_the_simultaneous_requests(tmp_path, number, share):
    server = ServerSettings(base_url="http://127.0.0.1:9/v1", concurrency=16)
    place = Place(SimpleNamespace(world_size=number), tmp_path, SilentProgress())
    with serving("policy", EngineSettings(server=server), name="policy", place=place) as reachable:
        assert reachable.server == server.model_copy(update={"concurrency": share})


@pytest.mark.parametrize(("number", "repeatable"), [(1, True), (2, False)])
def test_a_server_that_answers_in_turn_repeats_its_samples_for_one_process_alone(number, repeatable):
    engine = EngineSettings(transformers_serve=TransformersServeSettings())
    assert engine_report(engine, {}, SimpleNamespace(world_size=number))["repeatable"] is repeatable
