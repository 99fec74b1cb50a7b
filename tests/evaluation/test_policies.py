"""The policies in `policies/` score what their cards say."""

from pathlib import Path

import pytest

from mtrl.analysis.logs import read_final
from mtrl.evaluation.saved import evaluate_file
from mtrl.policy.file import open_policy

ROOT = Path(__file__).parents[2]
POLICY = ROOT / "policies/mt10.safetensors"
RUN = ROOT / "results/surgery/mt10_pcgrad_seed_0"


def card():
    with open_policy(POLICY) as (_, header):
        return header.evaluation


@pytest.mark.parametrize(
    "tasks", [["drawer-close-v3"], pytest.param(None, marks=pytest.mark.slow, id="all")]
)
def test_an_evaluation_repeats_the_card(tasks):
    """On any processor, whose rounding may move a return a little."""
    expected = [row for row in card().tasks if tasks is None or row.task in tasks]
    result, _ = evaluate_file(POLICY, tasks=tuple(tasks) if tasks else None)
    assert result.tasks == tuple(row.task for row in expected)
    solved, returns = (result.first_success > 0).mean(1), result.returns.mean(1)
    assert solved == pytest.approx([row.success_rate for row in expected], abs=0.04)
    assert returns == pytest.approx([row.return_mean for row in expected], rel=0.05)


def test_the_card_is_of_the_recorded_run():
    final = read_final(RUN)
    assert final is not None and card().mean_success_rate == final["mean_success_rate"]
