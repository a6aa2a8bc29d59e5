"""The work of models that answer: each counts with its own size, and one on a server is unknown."""

from types import SimpleNamespace

from transformers import LlamaConfig

from align.accounting.flops import Work
from align.distributed.processes import Processes
from align.inference.samples import Throughput
from align.inference.settings import EngineSettings, ServerSettings
from align.stages.costs.measured import sampling_done
from align.stages.responses import engines

VOCABULARY = 100


def by_hand(width, tokens, pairs, sampled):
    """FLOPs of a Llama of one layer whose MLP is twice as wide."""
    weights = 4 * width**2 + 3 * 2 * width**2
    return 2 * weights * tokens + 4 * width * pairs + 2 * width * VOCABULARY * sampled


def test_policies_of_several_sizes_count_each_with_its_own(tmp_path):
    for name, width in {"small": 16, "large": 32}.items():
        LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=VOCABULARY,
        ).save_pretrained(tmp_path / name)
    speeds = {
        "small": Throughput(processed_tokens=10, attended_pairs=55, sampled_tokens=4),
        "large": Throughput(processed_tokens=3, attended_pairs=6, sampled_tokens=1),
    }
    done = sampling_done([(tmp_path / name, speed.work) for name, speed in speeds.items()], "bf16")
    assert done.flops[0] == by_hand(16, 10, 55, 4) + by_hand(32, 3, 6, 1)
    assert (done.weights, done.precision) == (10 * 32**2 + 2 * 32 * VOCABULARY, "bf16")


def test_the_flops_of_an_evaluation_on_a_server_are_unknown_and_those_of_given_responses_none(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "load_engine", lambda *of, name: SimpleNamespace(throughput=Throughput()))
    context = SimpleNamespace(inputs=SimpleNamespace(folders={}), processes=Processes(), folder=tmp_path, progress=None)
    asked, given = engines.PolicyEngines("served", context), engines.PolicyEngines(None, context)
    with asked:
        asked.engine(EngineSettings(server=ServerSettings(base_url="http://127.0.0.1:1/v1")))
    flops, why = asked.done(Processes(), Work(0, 0, 0)).flops
    assert flops is None and "server" in why
    assert given.done(Processes(), Work(0, 0, 0)).flops[0] == 0
