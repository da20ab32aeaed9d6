"""What rollouts save: making environments again, and the memory of pictures that nothing learns from."""
import asyncio
from types import SimpleNamespace

import ript
from ript_test import ToyPolicy, collected, simulators, sometimes  # noqa: F401, a fixture


def test_a_free_simulator_takes_an_episode_of_the_task_whose_environment_it_has():
    async def pairs(tasks_of_simulators, tasks_that_wait):
        pool = object.__new__(ript.Simulators)
        pool.idle = [SimpleNamespace(task=task, number=n) for n, task in enumerate(tasks_of_simulators)]
        turns = [asyncio.get_running_loop().create_future() for _ in tasks_that_wait]
        pool.waiting = dict(zip(turns, tasks_that_wait))
        pool.match()
        return [turn.result().number if turn.done() else None for turn in turns]

    # An episode's simulator, by number.
    assert asyncio.run(pairs([1, 0], [0, 1])) == [1, 0]
    assert asyncio.run(pairs([2, 1], [0, 1])) == [0, 1]
    assert asyncio.run(pairs([1], [0, 0, 1])) == [None, None, 0]
    assert asyncio.run(pairs([None, None], [3, 3, 3])) == [0, 1, None]


def test_rejected_groups_lose_their_pictures_at_once_and_kept_ones_have_them(
        simulators, monkeypatch):  # noqa: F811
    groups = []
    new_group = ript.new_group

    def recorded(*arguments):
        groups.append(new_group(*arguments))
        return groups[-1]

    monkeypatch.setattr(ript, "new_group", recorded)
    kept, _, _ = collected(simulators, sometimes, policy=ToyPolicy(), groups=4, max_rejected=16)
    kept_groups = {episode.group for episode in kept}
    assert len(kept_groups) == 4 < len(groups)
    for group in groups:
        for episode in group:
            has = ["observation" in chunk for chunk in episode.chunks]
            assert has and set(has) == {episode.group in kept_groups}
