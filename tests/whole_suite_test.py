"""experiments/whole_suite.py: what it records of each task, how it draws tasks, and its control."""
import json
import re
from pathlib import Path

import numpy as np
import pytest

import ript
from experiments import common, whole_suite
from ript import Context, Episode
from tests.conftest import config, demo_config
from simulators.libero_experts import LiberoObject


def group_of(task, *successes):
    """The episodes of a context."""
    return [Episode(Context(task, "", 0), success=success) for success in successes]


def test_rows_say_of_each_task_its_groups_and_its_evaluation(monkeypatch, tmp_path):
    groups = [group_of(0, True, False), group_of(0, True, True), group_of(3, False, False)]
    found = whole_suite.numbers_by_task(groups)
    assert found == dict(groups_0=2, kept_0=1, success_0=0.75, groups_3=1, kept_3=0, success_3=0)
    cfg = config("--suite", "libero_object", "--out", tmp_path)
    outcomes = {"libero_object 0 0": 1, "libero_object 0 1": 0, "libero_object 10 0": 1,
                "libero_object 2 0": 0}

    def evaluate(policy, simulators, contexts, cfg, name):
        found = dict(settings={}, policy="", outcomes=outcomes)
        Path(cfg.out, f"evaluation_{name}.json").write_text(json.dumps(found))
        return 0.5

    saved = []
    monkeypatch.setattr(ript, "evaluate", evaluate)
    monkeypatch.setattr(ript, "save_run", lambda out, policy, optimizer, state: saved.extend(state.history))
    monkeypatch.setattr(ript, "rollout_stats", lambda groups: dict(kept=1))
    whole_suite.add_tasks()
    state = ript.TrainState(history=[ript.rollout_stats(groups)])
    assert ript.evaluate(None, None, [], cfg, "SFT") == 0.5
    ript.save_run(tmp_path, None, None, state)
    assert saved[0].pop("seconds_evaluation") > 0
    assert saved == [found | dict(kept=1, eval_0=0.5, eval_2=0, eval_10=1)]
    state.history = [{}]  # an iteration without an evaluation
    ript.save_run(tmp_path, None, None, state)
    assert saved[1:] == [{}]


def test_tasks_with_signal_are_drawn_more_often_and_none_is_left_out(monkeypatch):
    # In place of rollouts, the contexts that they would have.
    monkeypatch.setattr(ript, "collect", lambda policy, simulators, context_of, state, cfg: context_of)
    cfg = config("--suite", "libero_object")
    usual = ript.training_context
    whole_suite.draw_by_signal()
    state = ript.TrainState(history=[dict(iteration=0, eval_success=0.1)])

    def shares():
        contexts = [ript.collect(None, None, usual, state, cfg)(number) for number in range(400)]
        assert contexts == [ript.collect(None, None, usual, state, cfg)(number) for number in range(400)]
        assert [context.seed for context in contexts] == [usual(number, cfg).seed for number in range(400)]
        texts = ript.tasks_of(cfg)
        assert all(context.instruction == texts[context.task] for context in contexts)
        return np.bincount([context.task for context in contexts], minlength=10) / 400

    assert (abs(shares() - 0.1) < 0.05).all()
    row = {f"groups_{task}": 8 for task in range(10)}
    row |= {f"kept_{task}": 8 * (task == 4) for task in range(10)}
    state.history.append(row)
    found = shares()
    assert found[4] > 0.4 and (found > 0).all()


def test_the_control_asks_for_a_thing_that_lies_in_the_same_scene():
    misled, suite = whole_suite.ObjectMisled(), LiberoObject()
    for task, text in enumerate(suite.INSTRUCTIONS):
        scene = Path(suite.benchmark.get_task_bddl_file_path(task)).read_text()
        thing, = re.findall("pick up the (.*) and place it", misled.INSTRUCTIONS[task])
        assert misled.INSTRUCTIONS[task] != text
        assert re.search(rf"\(On {thing.replace(' ', '_')}_1 floor_other_object_region", scene)
    misled = whole_suite.SpatialMisled()

    def place_of(bowl, task):
        scene = Path(misled.benchmark.get_task_bddl_file_path(task)).read_text()
        return re.search(rf"\(O?I?n (akita_black_bowl_{bowl}) (\S+)\)", scene)[2]

    for task, other in enumerate(misled.OTHER):
        assert misled.INSTRUCTIONS[task] == misled.benchmark.tasks[other].language
        assert place_of(2, task) == place_of(1, other)


@pytest.mark.parametrize("obeyed", (whole_suite.ObjectObeyed, whole_suite.SpatialObeyed))
def test_where_a_policy_is_told_another_thing_that_thing_can_be_the_goal(obeyed):
    suite = obeyed(image_size=16, collision=True)
    context = Context(0, suite.INSTRUCTIONS[0], 3)
    suite.reset(context)
    goal, = suite.env.parsed_problem["goal_state"]
    assert suite.told(0) in goal and suite.env.obj_of_interest[0] == suite.told(0)
    assert suite.demonstrate(context).success
    usual = suite.benchmark.tasks[0].language
    scene = Path(suite.benchmark.get_task_bddl_file_path(0)).read_text()
    (relation, thing, place), = re.findall(r"\(:goal\s+\(And \((\w+) (\w+) (\w+)\)\)", scene)
    assert thing != suite.told(0) and suite.INSTRUCTIONS[0] != usual
    suite.env.parsed_problem["goal_state"] = [[relation.lower(), thing, place]]
    assert not suite.success()


def test_the_presets_of_both_suites_are_what_was_chosen():
    for suite in whole_suite.SUITES:
        assert config("--suite", suite) == config("--suite", suite, *whole_suite.STAGE_3.split())
        start = whole_suite.STARTS[whole_suite.CHOSEN[suite]].split()
        assert demo_config("--suite", suite) == demo_config("--suite", suite, *start)


def test_every_arm_is_one_of_ript_and_development_has_other_scenes(monkeypatch):
    for _, settings in whole_suite.ARMS.values():
        cfg = config("--suite", "libero_object", *whole_suite.STAGE_3.split(), *settings.split())
        assert (cfg.groups, cfg.scale_multiplier, cfg.eval_contexts, cfg.image_size) == (40, 0.5, 50, 64)
    development = "--suite", f"{whole_suite.__file__}:ObjectDevelopment", "--eval_contexts", 10
    for settings in whole_suite.SETTINGS.values():
        cfg = config(*development, *whole_suite.STAGE_3.split(), *settings.split())
        assert (cfg.scale_multiplier, cfg.image_size, cfg.anneal) == (0.5, 64, False)
    cfg = config(*development)
    contexts = ript.evaluation_contexts(cfg)
    assert len(contexts) == 100 and all(context.state is None for context in contexts)
    seen = []
    monkeypatch.setattr(LiberoObject, "reset", lambda self, context: seen.append(context.seed))
    whole_suite.ObjectDevelopment(image_size=16).reset(contexts[3])
    assert seen == [500_003]
    sentence = "invalid choice|an arm is one of even, plain, signal, adapters"
    for words in ("nothing", "train nothing"):
        with pytest.raises(ript.UserError, match=sentence):
            whole_suite.main(words.split())


def test_the_table_has_every_task_and_the_figure_a_panel_for_each(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(whole_suite, "KEPT", tmp_path)
    contexts = [dict(task=number // 4, SFT=int(number % 4 < 2), RIPT=int(number % 4 < 3))
                for number in range(40)]
    common.write_csv(tmp_path / "evaluation_a.csv", contexts)
    start = dict(iteration=0, seconds_evaluation=4)
    end = dict(iteration=1, rollouts=320, seconds_rollouts=9, seconds_evaluation=3)
    for task in range(10):
        start[f"eval_{task}"] = 0.5
        end[f"eval_{task}"] = 0.75
        if task != 8:  # of which no context was drawn
            end |= {f"groups_{task}": 4, f"kept_{task}": 1, f"success_{task}": 0.5}
    common.write_csv(tmp_path / "metrics_a.csv", [start, end])
    whole_suite.table(["a"])
    *_, without, last, of_all, seconds = capsys.readouterr().out.splitlines()
    assert without.startswith("| a | 8 | 2/4") and without.endswith("| 1, 0, 1 | 0 |  |")
    assert last.startswith("| a | 9 | 2/4") and "| 3/4" in last
    assert last.endswith("| 1, 0, 1 | 4 | 25% |")
    assert "| all | 20/40" in of_all and "| 10, 0, 0.002 | 36 | 25% |" in of_all
    assert seconds == "rollouts 320, seconds_rollouts 9, seconds_update 0, seconds_evaluation 7"
    whole_suite.figure(tmp_path / "tasks.png", "libero_object", dict(a="seed 0"))
    assert (tmp_path / "tasks.png").stat().st_size > 20_000
    whole_suite.signal_figure(tmp_path / "signal.png", "libero_object", dict(a="seed 0"))
    assert (tmp_path / "signal.png").stat().st_size > 10_000


def test_a_suites_figure_is_of_its_own_seeds(monkeypatch):
    seeds, drawn = [], []
    monkeypatch.setattr(whole_suite, "learned", lambda suite, arm, seed: seeds.append(seed))
    monkeypatch.setattr(whole_suite, "table", lambda names: None)
    monkeypatch.setattr(whole_suite, "figure", lambda path, suite, runs: drawn.append((path.name, [*runs])))
    for words in ("run", "run --seeds 3", "run --suite libero_spatial"):
        whole_suite.main(words.split())
    assert seeds == [0, 1, 3, 0]
    assert drawn == [("libero_object.png", ["libero_object_even_0", "libero_object_even_1"]),
                     ("libero_spatial.png", ["libero_spatial_even_0"])]
