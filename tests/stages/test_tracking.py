"""Trackers of a recipe: one tracked run for each training step, with its configuration, outside of its folder."""

from types import SimpleNamespace

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from small_runs import run

from align.errors import InputError, RunError
from align.train.tracking import MODULES, Tracking, flattened, installed_trackers, trackers


class FakeTracker:
    """Takes the place of wandb's tracker, which is not installed with the tests."""

    name, requires_logging_directory = "wandb", False
    made: list = []  # noqa: RUF012 - shared on purpose

    def __init__(self, project, **options):
        self.project, self.options, self.logged, self.finished = project, options, [], False
        FakeTracker.made.append(self)

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step, **_):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    FakeTracker.made.clear()
    monkeypatch.setattr("align.train.tracking.installed_trackers", lambda: ["wandb"])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", FakeTracker)
    return FakeTracker.made


def test_each_step_is_a_run_of_the_project_with_its_whole_typed_configuration(tmp_path, wandb):
    run(tmp_path, "tracking={trackers: [wandb], project: mine, entity: us, tags: [a, b]}", "seed=3")
    assert [each.options["name"] for each in wandb] == ["small/sft", "small/dpo"]
    sft, dpo = wandb
    assert (sft.project, sft.options["entity"], sft.options["tags"]) == ("mine", "us", ["a", "b"])
    assert sft.options["id"] != dpo.options["id"] and sft.options["resume"] == "allow"
    assert sft.config["train.learning_rate"] == 1e-3 and isinstance(sft.config["train.learning_rate"], float)
    assert sft.config["train.betas"] == [0.9, 0.98] and sft.config["seed"] == 3
    assert sft.config["policy_settings.chat_template"] is not None and sft.config["sources.shown.limit"] == 24
    assert dpo.config["loss.name"] == "dpo"
    assert [step for step, _ in sft.logged] == [1, 2, 3, 4, 5, 6] and "loss" in sft.logged[0][1]
    assert sft.finished and dpo.finished


def test_a_training_that_fails_ends_its_tracked_run(tmp_path, wandb):
    accelerator = SimpleNamespace(trackers=[])
    tracking = Tracking(run="small", step="sft", folder=tmp_path, config={})
    with pytest.raises(RunError), trackers(accelerator, ["wandb"], tracking, "hash"):
        assert not wandb[0].finished
        raise RunError("diverged")
    assert wandb[0].finished


def test_tensorboard_writes_outside_of_the_model_folder(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, "tracking={trackers: [tensorboard]}")
    root = tmp_path / "runs/small"
    for step, number in (("sft", 6), ("dpo", 3)):
        events = accumulator.EventAccumulator(str(root / "tracking/tensorboard" / step))
        events.Reload()
        assert [each.step for each in events.Scalars("loss")] == list(range(1, number + 1))
        assert not list((root / step).rglob("events.*"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tracking={trackers: [tensorbord]}", r"tracking\.trackers: no tracker called 'tensorbord' is installed"),
        ("tracking={trackers: [tensorboard], tags: [a]}", r"tracking\.tags: applies to wandb only"),
    ],
)
def test_wrong_tracking_is_refused_before_the_first_step(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, override)


def test_the_trackers_are_those_of_accelerate_and_the_installed_ones_are_found_without_importing_it():
    assert set(MODULES) == set(LOGGER_TYPE_TO_CLASS)
    assert set(installed_trackers()) == set(map(str, get_available_trackers()))


def test_flattened_values_keep_their_types():
    assert flattened({"a": {"b": 1, "c": None}, "d": {}}) == {"a.b": 1, "a.c": None, "d": {}}
