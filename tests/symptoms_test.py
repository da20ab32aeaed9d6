"""The claims of scripts/symptoms.py. Real runs that provoke each sentence: experiments/symptoms.py."""
import csv
import json

import pytest

from experiments import symptoms as provoked
from experiments.common import RESULTS
from scripts import symptoms
from tests.conftest import ROOT, config

HEALTHY = dict(iteration=1, rollouts=96, kept=8, all_success=2, all_fail=2, clip_frac=0.0, outside_clip=0.0,
               updates=1, approx_kl=0.0, act_std=1e-6, at_low=0.9, at_high=0.05, rollout_success=0.5,
               eval_success=0.5)
# Of each symptom: what shows it, and what does just not.
BOUNDARIES = dict(
    all_fail=(dict(kept=3, all_fail=7), dict(kept=4, all_fail=6)),
    all_success=(dict(kept=3, all_success=7), dict(kept=4, all_success=6)),
    clipped=(dict(updates=2, clip_frac=0.05), dict(updates=2, clip_frac=0.04)),
    far=(dict(approx_kl=0.51), dict(approx_kl=0.5)),
    apart=(dict(act_std=0.11), dict(act_std=0.1)),
    bounded=(dict(at_low=0.995), dict(at_low=0.99)),
    above_evaluation=(dict(rollout_success=0.61), dict(rollout_success=0.59)))
MORE = [("clipped", dict(updates=2, outside_clip=0.09), dict(updates=1, outside_clip=0.9, clip_frac=0.5)),
        ("bounded", dict(at_high=0.51), dict(at_high=0.5)),
        ("above_evaluation", dict(eval_success=0.3), dict(eval_success=0.45))]


def shown(*rows):
    return symptoms.sentences([HEALTHY | row for row in rows])


@pytest.mark.parametrize("name,shows,hides", [(name, *both) for name, both in BOUNDARIES.items()] + MORE)
def test_a_symptom_begins_at_its_threshold(name, shows, hides):
    assert BOUNDARIES.keys() == {symptom.name for symptom in symptoms.SYMPTOMS}
    assert list(shown(shows)) == [name] and not shown(hides)


def test_a_row_without_rollouts_or_an_update_shows_what_it_can():
    only_evaluated = dict(iteration=0, eval_success=0.1, gpu_gb=0.0)
    without_update = dict(iteration=1, rollouts=96, kept=0, all_success=0, all_fail=12, rollout_success=0.0)
    [(name, (iteration, sentence))] = symptoms.sentences([only_evaluated, without_update]).items()
    assert (name, iteration) == ("all_fail", 1)
    assert sentence.startswith("in 12 of 12 groups every rollout failed, and 0 had signal.")


def test_each_kind_is_said_once_after_the_iteration_that_shows_it_first(capsys):
    rows = [HEALTHY | dict(iteration=1), HEALTHY | dict(iteration=2, act_std=0.4),
            HEALTHY | dict(iteration=3, act_std=0.5, approx_kl=2.0)]
    for number in range(1, 4):
        symptoms.print_new(rows[:number])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("note on iteration 2: act and log_prob disagree by 0.4, ")
    assert len(lines) == 2 and lines[1].startswith("note on iteration 3: the policy moved by a KL of 2 ")


def test_a_run_says_it_and_so_does_its_report(finished):
    """The laptop's pretrained policy has a scale head that was never fitted."""
    out, printed = finished
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    notes = [f"note on iteration {number}: {sentence}"
             for number, sentence in symptoms.sentences(rows).values()]
    assert "b is at its lower bound in 100% of the action dimensions" in "".join(notes)
    assert [line for line in printed.splitlines() if line.startswith("note ")] == notes


def test_the_runs_that_provoke_each_symptom_are_accepted_and_have_done_so():
    assert list(provoked.PROVOKED_BY) == [symptom.name for symptom in symptoms.SYMPTOMS]
    for words in provoked.PROVOKED_BY.values():
        config(*words.split())
    with open(RESULTS / "symptoms/table.csv", newline="") as file:
        kept = list(csv.DictReader(file))
    details = " ".join((ROOT / "docs/DETAILS.md").read_text().split())
    for name, words in provoked.PROVOKED_BY.items():
        assert any(row["run"] == row["symptom"] == name and row["arguments"] == words for row in kept), name
        assert f"`python experiments/symptoms.py {name}`" in details
