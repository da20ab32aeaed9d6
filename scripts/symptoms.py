"""Sentences for what often goes wrong in a run, from the numbers of its iterations.

ript.py prints each kind at most once, after the first iteration that shows it, and scripts/report.py shows
them again. docs/DETAILS.md has a real run behind each. The thresholds are the constants below.
"""
from collections.abc import Callable
from typing import NamedTuple

KEPT = 1 / 3  # the share of an iteration's groups that have signal: below it, few have
# Shares of action steps, as means over an update's optimiser steps: those whose gradient the clip cuts, and
# those whose ratio is outside the clip's range, whether it cuts there or not. In experiments/adapters.py the
# first updates of slow arms have 0.05 and 0.10 of these or more, those of fast ones 0.02 and 0.05 at most.
CLIP_FRAC = 0.04
OUTSIDE_CLIP = 0.08
APPROX_KL = 0.5  # nats per action step, as a mean over the optimiser steps
ACT_STD = 0.1  # of the log-ratio between act and log_prob; at 0.1, PPO's clip is a standard deviation away
AT_LOW = 0.99  # the share of action dimensions whose b is at its lower bound; a fitted head has 0.9 to 0.97
AT_HIGH = 0.5  # and at its upper bound
ABOVE_EVALUATION = 0.1  # by how much the success of rollouts is above that of the evaluation after them


class Symptom(NamedTuple):
    """Something that an iteration's row of metrics may show."""
    name: str
    shown_by: Callable[[dict], bool]
    sentence: str  # with the row's metrics in braces; groups is the number of an iteration's groups


def groups_of(row: dict) -> int:
    """How many groups an iteration has drawn, over all processes."""
    return row["kept"] + row["all_success"] + row["all_fail"]


def few_kept(row: dict) -> bool:
    """Whether few groups have signal."""
    return row["kept"] < KEPT * groups_of(row)


def all_fail(row: dict) -> bool:
    """Whether few groups have signal, mostly because all rollouts of the others fail."""
    return few_kept(row) and row["all_fail"] >= row["all_success"]


def all_success(row: dict) -> bool:
    """Whether few groups have signal, mostly because all rollouts of the others succeed."""
    return few_kept(row) and row["all_success"] > row["all_fail"]


def clipped(row: dict) -> bool:
    """Whether the clip holds back an update of several steps. At the first step of an update it cannot."""
    beyond = row.get("clip_frac", 0) > CLIP_FRAC or row.get("outside_clip", 0) > OUTSIDE_CLIP
    return row.get("updates", 0) > 1 and beyond


def far(row: dict) -> bool:
    """Whether the update goes far from the policy that drew the rollouts."""
    return row.get("approx_kl", 0) > APPROX_KL


def apart(row: dict) -> bool:
    """Whether act and log_prob are two functions."""
    return row.get("act_std", 0) > ACT_STD


def bounded(row: dict) -> bool:
    """Whether the bounds of b and not the scale head decide how much the policy explores."""
    return row.get("at_low", 0) > AT_LOW or row.get("at_high", 0) > AT_HIGH


def above_evaluation(row: dict) -> bool:
    """Whether noise finds what the mean has not learned."""
    return row["rollout_success"] > row.get("eval_success", 1) + ABOVE_EVALUATION


SYMPTOMS = (
    Symptom("all_fail", all_fail,
            "in {all_fail} of {groups} groups every rollout failed, and {kept} had signal. The start is too "
            "weak or the noise too large: more demonstrations or steps in stage 2, a smaller "
            "--scale_multiplier, or more --rollouts per group."),
    Symptom("all_success", all_success,
            "in {all_success} of {groups} groups every rollout succeeded, and {kept} had signal. Little is "
            "left to learn here; if the evaluation says otherwise, the noise is too small: a larger "
            "--scale_multiplier."),
    Symptom("clipped", clipped,
            "in {updates} optimiser steps {outside_clip:.0%} of the action steps were outside the clip's "
            "range, and it cut the gradient of {clip_frac:.0%}. Later steps can then take back what the "
            "first ones have won: fewer steps (a larger --minibatch, fewer --ppo_epochs), a larger "
            "--clip_coef or a smaller --lr (docs/RESULTS.md, the 7B's path)."),
    Symptom("far", far,
            "the policy moved by a KL of {approx_kl:.2g} per action step away from the one that drew the "
            "rollouts, which then say little about it: fewer --ppo_epochs, a smaller --lr or a smaller "
            "--clip_coef."),
    Symptom("apart", apart,
            "act and log_prob disagree by {act_std:.2g}, the standard deviation of the log-ratio. In "
            "bfloat16 that is rounding, and the update does not use it. In float32 actions are drawn from "
            "another density than they are scored with, so that ratios are wrong: compare the two methods."),
    Symptom("bounded", bounded,
            "b is at its lower bound in {at_low:.0%} of the action dimensions and at its upper one in "
            "{at_high:.0%}, so that the bounds and not the scale head set the noise: fit the head "
            "(scripts/sft.py), or change --scale_multiplier or the policy's scale_range."),
    Symptom("above_evaluation", above_evaluation,
            "{rollout_success:.0%} of the rollouts succeeded, but {eval_success:.0%} of the evaluation after "
            "them: the mean does not learn what the noise finds. More --iterations, a larger --lr, or, where "
            "the clip holds the steps back, fewer of them."))


def sentences(history: list[dict]) -> dict[str, tuple[int, str]]:
    """Of each symptom that a run shows, the first iteration that shows it, and the sentence.

    history: the rows of metrics.jsonl; rows without rollouts, as the first, show nothing.
    """
    found = {}
    for row in history:
        if row.get("rollouts"):
            for symptom in SYMPTOMS:
                if symptom.name not in found and symptom.shown_by(row):
                    more = dict(outside_clip=row.get("clip_frac"), groups=groups_of(row))
                    text = symptom.sentence.format(**more | row)
                    found[symptom.name] = row["iteration"], text
    return found


def print_new(history: list[dict]) -> None:
    """Print the sentences that the last row is the first one to call for."""
    for iteration, sentence in sentences(history).values():
        if iteration == history[-1]["iteration"]:
            print(f"note on iteration {iteration}: {sentence}", flush=True)
