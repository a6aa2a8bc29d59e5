"""No loader runs code that comes with a model."""

import ast
import io
import json
import shutil
from pathlib import Path

import pytest
from test_broken_models import gguf_file

import align
from align.errors import InputError
from align.inference.transformers_engine import TransformersEngine
from align.models.loading.config import load_config
from align.models.loading.tokenizer import load_tokenizer
from align.models.policy import load_policy, save_policy
from align.models.reward_model import load_rating, load_reward_model, save_reward_model, set_pad_token
from align.models.settings import LoraSettings, PolicySettings
from align.testing.tiny import tiny_policy

PACKAGE = Path(align.__file__).parent
LOADING = ("from_pretrained", "from_config")
# They read values only: there is no code that they could run
WITHOUT_CODE = {"PeftConfig", "GenerationConfig", "LoraConfig"}


def loading_calls():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADING:
                yield path, node


def test_every_loading_call_says_that_it_trusts_no_remote_code():
    seen = 0
    for path, call in loading_calls():
        if ast.unparse(call.func.value) in WITHOUT_CODE:
            continue
        seen += 1
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        spread = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None]
        if spread:  # the options are a dictionary of the same function
            assert '"trust_remote_code": False' in path.read_text(), f"{path}:{call.lineno}"
        else:
            said = options.get("trust_remote_code")
            assert isinstance(said, ast.Constant) and said.value is False, f"{path}:{call.lineno}"
    assert seen >= 10
    assert "trust_remote_code=True" not in "".join(path.read_text() for path in PACKAGE.rglob("*.py"))


AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoModelForSequenceClassification": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}


def poison(folder, mark):
    """Put code beside a model that marks that it ran, and let every configuration name it."""
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class EvilConfig(LlamaConfig): model_type = 'evil'\n"
        "class EvilModel(LlamaForCausalLM): config_class = EvilConfig\n"
        "class EvilTokenizer(PreTrainedTokenizerFast): pass\n"
    )
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        known = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        changes = {"auto_map": AUTO_MAP}
        if name == "tokenizer_config.json":
            changes["tokenizer_class"] = "EvilTokenizer"
        (folder / name).write_text(json.dumps(known | changes))


def as_unknown(folder):
    """Give the model an architecture that only its code knows."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "architectures": ["EvilModel"]}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return folders of a policy, adapters on it, a reward model, and a GGUF file."""
    folder = tmp_path_factory.mktemp("models")
    save_policy(*tiny_policy(), folder / "policy")
    settings = PolicySettings(path=str(folder / "policy"), lora=LoraSettings(rank=2, adapters="continued"))
    save_policy(*load_policy(settings), folder / "adapters", merge=False)
    reward, tokenizer = load_reward_model(PolicySettings(path=str(folder / "policy")))
    set_pad_token(reward, tokenizer, {1})
    save_reward_model(reward, tokenizer, folder / "reward")
    (folder / "gguf").mkdir()
    gguf_file(folder / "gguf" / "tiny.gguf", layers=2)
    return folder


LOADERS = {
    "policy": lambda path: load_policy(PolicySettings(path=path)),
    "policy with adapters": lambda path: load_policy(PolicySettings(path=path, lora=LoraSettings(rank=2))),
    "continued adapters": lambda path: load_policy(PolicySettings(path=path, lora=LoraSettings(adapters="continued"))),
    "reward model": lambda path: load_reward_model(PolicySettings(path=path)),
    "rating": load_rating,
    "configuration": load_config,
    "tokenizer": lambda path: load_tokenizer(PolicySettings(path=path)),
    "tokenizer of its own": lambda path: load_tokenizer(
        PolicySettings(from_config={"model_type": "llama"}, tokenizer=path)
    ),
    "engine": lambda path: TransformersEngine.load(path, name="it"),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", ["policy", "adapters", "reward", "gguf"])
@pytest.mark.parametrize("unknown", [False, True])
def test_no_loader_runs_code_beside_a_model(models, tmp_path, monkeypatch, kind, loader, unknown):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    shutil.copytree(models, tmp_path / "models")
    for folder in (tmp_path / "models").iterdir():
        poison(folder, tmp_path / "ran")
        if unknown:
            as_unknown(folder)
    path = str(tmp_path / "models" / kind)
    if kind == "gguf":
        path = f"gguf:{path}/tiny.gguf"
    if kind == "adapters":  # on the poisoned base
        file = tmp_path / "models" / "adapters" / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "models" / "policy")}))
    try:
        LOADERS[loader](path)
    except InputError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()
    assert not list(tmp_path.rglob("*.pyc")), "the code was not even imported"
