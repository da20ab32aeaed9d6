"""The claims of simulators/tabletop.py and scripted.py, and of ript.Robosuite, from which they derive."""
import numpy as np
import pytest

from ript import Context, load_suite
from tests.conftest import TASKS


def test_the_cubes_have_the_colours_that_the_instructions_name(simulator):
    picture = simulator.reset(Context(0, TASKS[0], 1)).observation["agentview_image"].astype(int)
    red = (picture[..., 0] > 2 * picture[..., 1]) & (picture[..., 0] > 2 * picture[..., 2])
    green = (picture[..., 1] > 2 * picture[..., 0]) & (picture[..., 1] > 2 * picture[..., 2])
    assert red.sum() > 5 and green.sum() > 5


@pytest.mark.parametrize("task", [0, 1])
def test_success_is_the_named_cube_lifted_and_the_expert_lifts_it(simulator, task):
    demonstration = simulator.demonstrate(Context(task, TASKS[task], 1_000_000))
    bodies = simulator.env.cubeA_body_id, simulator.env.cubeB_body_id
    height = [simulator.env.sim.data.body_xpos[body][2] for body in bodies]
    assert demonstration.success and 15 < len(demonstration.actions) == len(demonstration.observations) <= 32
    assert height[task] > 0.84 > height[1 - task]  # metres; a cube's centre rests at 0.82 or 0.825


def test_any_number_is_a_seed(simulator):
    first, second = (simulator.reset(Context(0, TASKS[0], seed)).observation for seed in (5, 5 + 2 ** 32))
    assert (first["agentview_image"] == second["agentview_image"]).all()


def test_the_arm_of_the_tabletop_suite_is_worn(simulator):
    worn, hands = load_suite("tabletop")(64, True), []
    for arm in (simulator, worn):
        arm.reset(Context(0, TASKS[0], 3))
        hands.append(arm.step(np.zeros((8, 7))).observation["robot0_eef_pos"])
    worn.env.close()
    assert (hands[1] - hands[0])[:2].min() > 0.01 > abs((hands[1] - hands[0])[2])  # metres, in x and y


@pytest.fixture
def renders(simulator, monkeypatch):
    """What has been rendered since a reset."""
    simulator.reset(Context(1, TASKS[1], 1_000_000))
    seen, render = [], simulator.render
    monkeypatch.setattr(simulator, "render", lambda *settings: seen.append(settings) or render(*settings))
    return seen


def test_a_chunk_stops_where_it_succeeds_and_then_nothing_is_rendered(simulator, renders, monkeypatch):
    executed, step = [], simulator.control_step
    monkeypatch.setattr(simulator, "control_step", lambda action: executed.append(action) or step(action))
    monkeypatch.setattr(simulator, "success", lambda: len(executed) == 3)
    answer = simulator.step(np.zeros((8, 7)))
    assert (answer.num_executed, answer.success, answer.observation) == (3, True, None)
    assert len(executed) == 3 and not renders


def test_the_cameras_are_rendered_once_for_a_chunk(simulator, renders):
    answer = simulator.step(np.zeros((8, 7)))
    assert (answer.num_executed, answer.success, len(renders)) == (8, False, 2)
    assert answer.observation["agentview_image"].shape == (64, 64, 3)
