"""A published model exported to Q8_0: agreement with the original, and what llama.cpp makes of the file."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from align.compress.gguf_export import export_policy
from align.compress.settings import GgufSettings
from align.data.token_groups import TokenGroup, TokenSequence
from align.distributed.processes import Processes
from align.evaluation.fidelity import divergences
from align.models.loading.pretrained import silence_transformers
from align.models.policy import load_policy
from align.models.settings import PolicySettings

FETCH = Path(__file__).parents[2] / ".." / "shared" / "tools" / "smollm2.sh"
QUESTIONS = ("Why is the sky blue?", "Write a haiku about rain.", "What is 12 times 12?", "List three large rivers.")
MAX_NEW_TOKENS = 24


@pytest.mark.package
@pytest.mark.slow
def test_q8_0_agrees_with_smollm2_along_its_greedy_answers(tmp_path):
    if not FETCH.is_file():
        pytest.skip(f"{FETCH} is not there: it fetches SmolLM2-135M-Instruct")
    silence_transformers()
    source = subprocess.run(["bash", FETCH], capture_output=True, text=True, timeout=300, check=True).stdout.strip()
    export_policy(f"gguf:{source}", tmp_path / "smollm2-Q8_0.gguf", GgufSettings())
    (original, tokenizer), (copy, _) = (
        load_policy(PolicySettings(path=path)) for path in (f"gguf:{source}", str(tmp_path))
    )
    groups = []
    for row, question in enumerate(QUESTIONS):
        message = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = original.hf.generate(**ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0].numpy().astype(np.int32)
        mask = np.arange(len(output)) >= ids["input_ids"].shape[1]
        groups.append(TokenGroup((TokenSequence(output, mask),), None, None, ({},), row, row))
    parts = divergences(copy, original, groups, precision="fp32", processes=Processes())
    same, tokens = (sum(each["agreement"][at] for each in parts) for at in (0, 1))
    print(f"{same:.0f} of {tokens} tokens agree")
    assert tokens > 60 and same / tokens >= 0.97


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
