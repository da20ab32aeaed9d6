"""More of LIBERO for a machine without a GPU: the suites of some of evidence.py's experiments.

    python examples/evidence.py one_scene   two tasks in one scene: the instruction says which thing is meant
    python examples/evidence.py bowl        a task of LIBERO-Goal
"""
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
import ript
from examples.laptop import LiberoObject


class OneScene(ript.load_suite("libero_object")):
    """The scene of LIBERO-Object's task 0 with two goals, so that pictures do not say which one is meant."""
    THINGS = ("alphabet_soup_1", "salad_dressing_1")
    INSTRUCTIONS = ("pick up the alphabet soup and place it in the basket",
                    "pick up the salad dressing and place it in the basket")

    @classmethod
    def held_out(cls, task, number):
        """The stored states of the scene, for either goal."""
        return super().held_out(0, number)

    def build(self, task):
        """One scene serves both tasks. What the goal is about is no part of a state."""
        super().build(0)
        thing = self.THINGS[task]
        self.env.obj_of_interest = [thing, "basket_1"]
        self.env.parsed_problem["goal_state"] = [["in", thing, "basket_1_contain_region"]]


class Misled(OneScene):
    """The same, in which the policy is told to take the other thing."""
    INSTRUCTIONS = OneScene.INSTRUCTIONS[::-1]


class Goal(LiberoObject, ript.load_suite("libero_goal")):
    """LIBERO-Goal with LIBERO-Object's expert, which is made for none of its tasks.

    Task 6, "put the cream cheese in the bowl", it does in 12 of 20 attempts.
    """
