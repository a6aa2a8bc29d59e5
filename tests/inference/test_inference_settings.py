"""Settings of engines: validation, defaults and cache keys."""

import subprocess
import sys

import pytest

from align.config import build, read_overrides
from align.errors import InputError
from align.inference.engines import ENGINES, load_engine
from align.inference.settings import EngineSettings

URL = "http://127.0.0.1:1/v1"


def settings(*overrides):
    return build(EngineSettings, read_overrides(overrides, EngineSettings().model_dump(mode="json")), ("engine",))


def test_settings_are_imported_without_torch():
    code = "import sys, align.inference.settings; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "align" in loaded
    assert not {"torch", "transformers", "httpx2", "numpy"} & set(loaded)


def test_every_engine_has_settings():
    assert set(ENGINES) == set(EngineSettings.model_fields)


def test_the_local_engine_is_the_default():
    assert settings().kind == settings("local.batch_size=3").kind == "local"
    assert settings(f"server.base_url={URL}").kind == "server"
    assert settings(f"server.base_url={URL}").chosen.base_url == URL


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((), ("local.batch_size=3",), True),
        ((), ("local.precision=bf16",), True),
        ((), ("local.precision=fp32",), False),
        ((f"server.base_url={URL}",), ("server.base_url=http://other/v1", "server.concurrency=2"), True),
        ((f"server.base_url={URL}",), (f"server.base_url={URL}", "server.body={top_k: 3}"), False),
        ((), (f"server.base_url={URL}",), False),
    ],
)
def test_the_cache_key_contains_only_settings_that_decide_a_sample(one, other, same):
    assert (settings(*one).cache_key() == settings(*other).cache_key()) == same


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("local.precisoin=fp32",), "engine.local.precisoin: unknown key; did you mean 'precision'"),
        (("local.precision=fp8",), "engine.local.precision: "),
        (("server.retries=2",), "engine.server.base_url: this key is required"),
        ((f"server.base_url={URL}", "server.body={seed: 3}"), "engine.server: body sets seed"),
        ((f"server.base_url={URL}", "local.precision=fp32"), "engine: give one engine, not local and server"),
        (("custom.name=nowhere:make",), "engine.custom.name: engine 'nowhere:make' cannot be imported"),
        (("custom.name=make",), "engine.custom.name: "),
        (("vlm.precision=fp32",), "engine.vlm: unknown key"),
    ],
)
def test_invalid_engine_settings_are_located(overrides, said):
    with pytest.raises(InputError) as refused:
        settings(*overrides)
    assert str(refused.value).startswith(said)


class Own:
    """An engine that keeps what it is made of."""

    def __init__(self, policy, settings, *, name):
        self.made_of, self.name = (policy, settings), name


def test_a_custom_engine_is_loaded_by_its_dotted_path():
    own = settings(f"custom.name={__name__}:Own", "custom.settings={size: 3}")
    for given, name in (({}, "policy"), ({"name": "sft"}, "sft")):
        engine = load_engine("policy", own, **given)
        assert engine.name == name and engine._engine.made_of == ("policy", {"size": 3})
