"""Settings of engines: one of several, typed, with a cache key that leaves out what decides no sample."""

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


def test_every_engine_has_its_settings():
    assert set(ENGINES) == set(EngineSettings.model_fields)


def test_the_model_runs_in_this_process_unless_another_engine_is_given():
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
def test_the_cache_key_changes_with_what_decides_a_sample_alone(one, other, same):
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
def test_wrong_settings_are_refused_where_they_are(overrides, said):
    with pytest.raises(InputError) as refused:
        settings(*overrides)
    assert str(refused.value).startswith(said)


def make(policy, settings, *, name):
    return policy, settings, name


def test_an_engine_of_ones_own_is_named_by_its_dotted_path():
    own = settings(f"custom.name={__name__}:make", "custom.settings={size: 3}")
    assert load_engine("policy", own) == ("policy", {"size": 3}, "policy")
    assert load_engine("policy", own, name="sft") == ("policy", {"size": 3}, "sft")
