"""Which checkpoint is the best one."""

from types import SimpleNamespace

import pytest

from trivium.evals.results import Result, Results
from trivium.pretrain import validation
from trivium.pretrain.config import load
from trivium.pretrain.state import RunState


@pytest.fixture
def judged(monkeypatch, tmp_path):
    """A function: metrics of successive evaluations -> whether each was the best so far, and what was said."""

    def judge(best: str, *evaluations: dict) -> tuple[list[bool], list[str]]:
        said, state = [], RunState()
        config = load("demo", [f"run={tmp_path}", f"evals.best={best}"])
        engine = SimpleNamespace(
            module=SimpleNamespace(eval=lambda: None), accelerator=SimpleNamespace(is_main_process=False)
        )
        answers = iter(evaluations)
        monkeypatch.setattr(
            validation.harness, "evaluate", lambda *_: Results([Result("retrieval", metrics=next(answers))])
        )
        one = validation.Validation(config, engine, [], 0)
        return [one.run(state, SimpleNamespace(say=said.append)) for _ in evaluations], said

    return judge


def test_the_best_checkpoint_has_the_highest_metric(judged):
    assert judged("retrieval/a", {"a": 1.0}, {"a": 3.0}, {"a": 2.0}, {"a": 3.0})[0] == [True, True, False, False]


def test_of_several_metrics_the_mean_counts(judged):
    verdicts, said = judged("[retrieval/a, retrieval/b]", {"a": 15.0, "b": 50.0}, {"a": 0.0, "b": 100.0})
    assert verdicts == [True, True]
    assert "retrieval/a 15.0, retrieval/b 50.0" in said[0]


def test_a_metric_that_is_not_there_is_named_and_chooses_nothing(judged):
    verdicts, said = judged("[retrieval/a, retrieval/b]", {"a": 15.0})
    assert verdicts == [False] and "'retrieval/b'" in said[0]
