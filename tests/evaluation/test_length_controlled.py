"""AlpacaEval's length-controlled win rate, by its own package, without its files of the Hub."""

import numpy as np
import pytest

from align.errors import InputError
from align.evaluation.pairs.length_controlled import NUM_INSTRUCTIONS, length_controlled_win_rate
from align.evaluation.pairs.table import JudgedGame, pairs_of

SLOPE, DIFFICULTY = 1.5, 0.8  # of the planted annotator: for the longer response, and for an instruction's difficulty


def logistic(values):
    return 1 / (1 + np.exp(-values))


def planted(quality, *, seed=0):
    """Return pairs of an annotator with a known preference for length, and the instructions' difficulties."""
    draw = np.random.default_rng(seed)
    difficulty = draw.normal(size=NUM_INSTRUCTIONS)
    ours, base = draw.integers(100, 2000, size=(2, NUM_INSTRUCTIONS))
    length = np.tanh((base - ours) / (base - ours).std(ddof=1))
    chance = logistic(quality - SLOPE * length + DIFFICULTY * difficulty)
    known = {"order": "", "judge": "annotator", "model": "ours", "baseline": "base"}
    games = [
        JudgedGame(
            id=str(n), prompt=f"Question {n}", a="a" * ours[n], b="b" * base[n], verdict=float(chance[n]), **known
        )
        for n in range(NUM_INSTRUCTIONS)
    ]
    return pairs_of(games), difficulty


def test_anything_but_the_805_instructions_is_an_error():
    pairs, _ = planted(0.0)
    with pytest.raises(InputError, match="804 rows with 804 instructions; .* needs the 805 of AlpacaEval"):
        length_controlled_win_rate(pairs[1:])
    with pytest.raises(InputError, match="805 rows with 804 instructions"):
        length_controlled_win_rate([*pairs[1:], pairs[1]])


@pytest.mark.filterwarnings("default")  # of the package and of scikit-learn
def test_the_packages_rate_is_the_planted_one_at_equal_length(tmp_path, monkeypatch):
    glm = pytest.importorskip("alpaca_eval.metrics.glm_winrate", exc_type=ImportError)
    pairs, difficulty = planted(-0.7)
    gamed = tmp_path / "df_gamed.csv"  # two versions of the baseline, a longer and a shorter one
    rows = ["model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for model, length in (("verbose", -0.8), ("concise", 0.8)):
        rows += [
            f"{model},{n},{logistic(-SLOPE * np.tanh(length))},{length},{each},False"
            for n, each in enumerate(difficulty)
        ]
    gamed.write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(glm, "hf_hub_download", lambda **_: str(gamed))
    found = length_controlled_win_rate(pairs)
    truth = logistic(-0.7 + DIFFICULTY * difficulty).mean()
    assert found.value == pytest.approx(truth, abs=0.01)
    assert (found.n, found.low < found.value < found.high) == (805, True)


@pytest.mark.filterwarnings("default")
def test_without_its_file_the_package_is_an_error(monkeypatch):
    glm = pytest.importorskip("alpaca_eval.metrics.glm_winrate", exc_type=ImportError)

    def offline(**_):
        raise OSError("no network")

    monkeypatch.setattr(glm, "hf_hub_download", offline)
    with pytest.raises(
        InputError, match="df_gamed.csv of the dataset tatsu-lab/alpaca_eval cannot be read: no network"
    ):
        length_controlled_win_rate(planted(0.0)[0])
