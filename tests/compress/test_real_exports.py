"""A published model exported to Q8_0: agreement with the original, and what llama.cpp makes of the file."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from align.compress.gguf_export import export_policy
from align.compress.settings import GgufSettings
from align.data.token_groups import TokenGroup, TokenSequence
from align.distributed.processes import Processes
from align.evaluation.fidelity import divergences
from align.models.loading.pretrained import silence_transformers
from align.models.policy import load_policy, save_policy
from align.models.settings import PolicySettings

FETCH = Path(__file__).parents[2] / ".." / "shared" / "tools" / "smollm2.sh"
QUESTIONS = ("Why is the sky blue?", "Write a haiku about rain.", "What is 12 times 12?", "List three large rivers.")
MAX_NEW_TOKENS = 24


@pytest.mark.package
@pytest.mark.slow
def test_a_published_file_is_loaded_as_published_and_its_export_agrees_along_greedy_answers(tmp_path):
    """One test, because transformers takes up to 20 seconds to read a published GGUF file."""
    if not FETCH.is_file():
        pytest.skip(f"{FETCH} is not there: it fetches SmolLM2-135M-Instruct")
    silence_transformers()
    fetched = subprocess.run(["bash", FETCH], capture_output=True, text=True, timeout=900, check=False)
    if fetched.returncode != 0:
        pytest.skip(f"SmolLM2-135M-Instruct cannot be fetched: {fetched.stderr.strip()[-200:]}")
    source = fetched.stdout.strip()
    original, tokenizer = load_policy(PolicySettings(path=f"gguf:{source}"))
    assert sum(value.numel() for value in original.parameters()) == 134_515_008  # as published for SmolLM2-135M
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = original.hf(ids).logits
    assert tokenizer.decode(expected[0, -1].argmax()) == " Paris"

    save_policy(original, tokenizer, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, expected)
    (tmp_path / "exported").mkdir()
    export_policy(str(tmp_path / "saved"), tmp_path / "exported/smollm2-Q8_0.gguf", GgufSettings())
    copy, _ = load_policy(PolicySettings(path=str(tmp_path / "exported")))
    same, tokens = agreement(copy, original, tokenizer)
    print(f"{same:.0f} of {tokens} tokens agree")
    assert tokens > 60 and same / tokens >= 0.97


def agreement(copy, original, tokenizer):
    """How many tokens of the original's greedy answers are also the copy's first choice, and of how many."""
    groups = []
    for row, question in enumerate(QUESTIONS):
        message = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = original.hf.generate(**ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0].numpy().astype(np.int32)
        mask = np.arange(len(output)) >= ids["input_ids"].shape[1]
        groups.append(TokenGroup((TokenSequence(output, mask),), None, None, ({},), row, row))
    parts = divergences(copy, original, groups, precision="fp32", processes=Processes())
    return (sum(each["agreement"][at] for each in parts) for at in (0, 1))


@pytest.mark.package
@pytest.mark.slow
def test_llama_cpp_computes_the_policys_logits(tmp_path):
    """Needs `pip install llama-cpp-python`, which compiles llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it compiles llama.cpp")
    from exported import ARCHITECTURES, exported, saved  # noqa: PLC0415

    source = saved(tmp_path / "llama", ARCHITECTURES["llama"])
    file, _ = exported(source, "F16")
    policy, tokenizer = load_policy(PolicySettings(path=str(file.parent)))
    model = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False)
    text = "What color is the wolf?"
    ids = tokenizer.encode(text)
    assert model.tokenize(text.encode(), add_bos=False) == ids
    model.eval(ids)
    with torch.no_grad():
        expected = policy.hf(input_ids=torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(np.array(model.scores[: len(ids)]), expected, atol=0.05)
