"""Chat templates render as transformers renders them, at a pinned time, and within limits."""

import gc
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import trl
from toy_chat import CHATML, dialogue, pair, tokenizer_of
from transformers.utils.chat_template_utils import render_jinja_template

from align.data import chat_process
from align.data.chat_clock import BEGAN, began_at, pinned_time, template_time
from align.data.chat_encoder import ChatEncoder
from align.data.chat_process import TEMPLATES, TemplateProcess
from align.errors import InputError, LimitExceeded, RunError
from align.records import Comparison, Demonstration, Message, Response

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATS = [
    [
        {"role": "user", "content": "hi\n"},
        {"role": "assistant", "content": "<think>\na\n</think>\n\nyo"},
        {"role": "user", "content": " 月"},
        {"role": "assistant", "content": "z"},
    ],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
    [{"role": "user", "content": "hi"}],
]
SOURCES = {
    path.stem: path.read_text("utf-8") for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
}
KNOWN = ("llama3_2", "qwen3", "qwen3_training", "gemma3", "phi3", "deepseekv3", "gptoss", "cohere2", "smolvlm")


def by_transformers(source, chat, generation_prompt):
    """Return the text and the generation blocks, or the error's message."""
    asked = {"add_generation_prompt": generation_prompt, "return_assistant_tokens_mask": True}
    try:
        texts, blocks = render_jinja_template([chat], chat_template=source, **asked, **SPECIAL)
    except Exception as error:  # noqa: BLE001 - whatever a template raises
        return " ".join(str(error).split())
    return texts[0], [list(block) for block in blocks[0]]


def by_process(source, chat, generation_prompt):
    try:
        ((text, blocks),) = TEMPLATES.render(
            source, [{"messages": chat, "add_generation_prompt": generation_prompt}], SPECIAL
        )
    except InputError as error:
        return error.message.removeprefix("the chat template cannot render the dialogue: ")
    return text, blocks


@pytest.mark.parametrize(
    "name", [*KNOWN, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(SOURCES) - {*KNOWN}))]
)
def test_a_template_in_use_is_rendered_as_by_transformers(name):
    texts = [
        by_transformers(SOURCES[name], chat, generation_prompt) for chat in CHATS for generation_prompt in (True, False)
    ]
    assert texts == [
        by_process(SOURCES[name], chat, generation_prompt) for chat in CHATS for generation_prompt in (True, False)
    ]
    assert any(not isinstance(text, str) for text in texts)
    assert name != "qwen3_training" or any(text[1] for text in texts)


@pytest.mark.parametrize(
    "source",
    [
        "{{ {'b': 1, 'a': '<é>'} | tojson }}{{ [1] | tojson(indent=2) }}",
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% set n = namespace(found=1) %}{% set n.found = 2 %}{{ n.found }}{{ dict(a=1) }}{{ dict.fromkeys('ab') }}",
        "{{ tools is none }}{{ documents is none }}{{ bos_token }}{{ strftime_now is defined }}{{ no is defined }}",
        "{% set n = namespace(_x=1) %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "  {% if true %}\n  x\n  {% endif %}\n",
    ],
)
def test_functions_and_the_sandbox_are_those_of_transformers(source):
    expected, found = by_transformers(source, CHATS[1], True), by_process(source, CHATS[1], True)
    if isinstance(expected, str):
        assert isinstance(found, str) and ("underscore" in found or found == expected)
    else:
        assert found == expected


HOSTILE = {
    "more than 0.5 s": [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% set x = (i ~ ('a' * 99999)) | upper | length %}{% endfor %}",
        "{{ 7 ** (10 ** 8) > 1 }}",
    ],
    "more than 100,000 characters": [
        "{% for a in range(99999) %}{{ 'a' * 99 }}{% endfor %}",
        "{{ 'a' * 5000000 }}",
    ],
    "it needs too much memory": [
        "{{ 'a' * 10 ** 11 }}",
        "{{ '%099999999999d' % 1 }}",
        "{{ 'a' | center(10 ** 11) }}",
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set a %}{{ 'x' * 99999 }}{% endset %}{% set b = a | replace('x', a) | replace('x', a) %}",
    ],
}


@pytest.mark.parametrize(("words", "source"), [(words, one) for words, many in HOSTILE.items() for one in many])
def test_a_template_that_takes_too_much_is_stopped_and_the_next_one_renders(words, source, monkeypatch):
    monkeypatch.setattr(chat_process, "MAX_SECONDS", 0.5 if "0.5 s" in words else 5)
    monkeypatch.setattr(chat_process, "MAX_CHARACTERS", 100_000)
    monkeypatch.setattr(chat_process, "MAX_BYTES", 1 << 28)
    process = TemplateProcess()
    try:
        for _ in range(2):
            before = time.process_time()
            with pytest.raises(InputError, match=f"^the chat template cannot render the dialogue: .*{words}"):
                process.render(source, [{"messages": CHATS[2]}], {})
            assert time.process_time() - before < 1
            assert process.render("{{ messages[0].content }}", [{"messages": CHATS[2]}], {})[0].text == "hi"
    finally:
        process.close()


def test_a_template_that_takes_too_much_is_not_skipped_row_by_row():
    loop = "{% for a in range(99999) %}{{ 'a' * 999 }}{% endfor %}"
    encoder = ChatEncoder(tokenizer_of(CHATML + loop), on_error="skip")
    with pytest.raises(LimitExceeded, match=r"^row 1: the chat template cannot render .* more than 32,000,000 char"):
        list(encoder.encode_all([pair()] * 3))


def test_the_process_ends_with_its_owner_and_is_replaced_when_it_is_killed():
    process = TemplateProcess()
    first = process.render("{{ 1 }}", [{}], {})
    process._process.kill()
    process._process.wait()
    assert process.render("{{ 1 }}", [{}], {}) == first
    process.close()
    code = (
        "from align.data.chat_process import TEMPLATES; import os, signal; TEMPLATES.render('1', [{}], {});"
        "print(TEMPLATES._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    worker = Path(f"/proc/{int(ended.stdout)}")
    for _ in range(1000):
        if not worker.exists():
            break
        time.sleep(0.1)
    assert not worker.exists()


def test_a_process_that_cannot_be_started_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RunError, match="^the process that renders chat templates cannot be started: .*No such file"):
        TemplateProcess().render("{{ 1 }}", [{}], {})


def test_a_lower_limit_of_memory_is_kept():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29));"
        "from align.data.chat_process import TEMPLATES; print(TEMPLATES.render('{{ 1 }}', [{}], {})[0].text)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_a_forked_process_does_not_share_the_pipe():
    assert TEMPLATES.render("{{ 'a' }}", [{}], {})[0].text == "a"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, TEMPLATES.render("{{ 'b' }}", [{}], {})[0].text.encode())
        TEMPLATES.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 10) == b"b"
    assert TEMPLATES.render("{{ 'c' }}", [{}], {})[0].text == "c"


def test_a_pinned_time_is_what_a_template_writes(tmp_path):
    tokenizer = tokenizer_of("{{ strftime_now('%d %b %Y') + '\n' }}" + CHATML)
    encoder = ChatEncoder(tokenizer)
    with pinned_time(datetime(1999, 12, 31, 23, 59)):
        for sequence in encoder.encode(pair(), 0).sequences:
            assert tokenizer.decode(sequence.ids).startswith("31 Dec 1999\n<|im_start|>")
        assert tokenizer.decode(encoder.prompt_ids(dialogue("1"), 0)).startswith("31 Dec 1999\n<|im_start|>")
    assert abs((template_time() - datetime.now()).total_seconds()) < 60


def test_work_begins_when_its_first_attempt_did(tmp_path):
    first = began_at(tmp_path / "a")
    assert abs((first - datetime.now()).total_seconds()) < 60
    assert began_at(tmp_path / "a") == first
    assert os.listdir(tmp_path / "a") == [BEGAN]
    (tmp_path / "a" / BEGAN).write_text("2026-07-01T12:00:00")
    assert began_at(tmp_path / "a") == datetime(2026, 7, 1, 12)
    (tmp_path / "a" / BEGAN).write_text("noon")
    with pytest.raises(InputError, match="not a valid time"):
        began_at(tmp_path / "a")


def peak_memory():
    """Return the peak resident memory of this process, in bytes, since the last call."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


HUGE = "the moon is far " * 625_000  # 10 MB


@pytest.mark.parametrize(
    "record",
    [
        Demonstration(dialogue("1", HUGE)),
        Demonstration(dialogue(HUGE, "yes")),
        Comparison(dialogue("1"), (Response("yes"), Response(HUGE))),
        Comparison((Message("system", HUGE), Message("user", "1")), (Response("yes"), Response("no"))),
    ],
)
@pytest.mark.parametrize("max_length", [256, None])
def test_a_huge_row_is_overlong_before_it_is_tokenized(record, max_length):
    tokenizer = tokenizer_of(CHATML)
    before, began = peak_memory(), time.process_time()
    for overlong in ("drop", "cut_prompt", "cut_response"):
        encoder = ChatEncoder(tokenizer, overlong=overlong, max_length=max_length)
        assert encoder.encode(record, 0) is None
        assert encoder.counts == {"rows": 1, "dropped:overlong": 1}
    encoder = ChatEncoder(tokenizer, overlong="error", max_length=max_length)
    with pytest.raises(InputError, match=r"^row 1: a sequence has 10,000,\d{3} characters, and at most [14],000,000"):
        encoder.encode(record, 0)
    assert time.process_time() - began < 1
    assert peak_memory() - before < 1 << 27
