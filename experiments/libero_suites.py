"""More of LIBERO for a machine without a GPU: the suites of some of experiments/ablations.py.

    python experiments/ablations.py one_scene          two tasks in one scene: only the instruction says which
    python experiments/ablations.py bowl --seeds 0     a task of LIBERO-Goal
"""
from simulators.libero_experts import LiberoObject

class OneScene(LiberoObject):
    """The scene of LIBERO-Object's task 0 with two goals, so that pictures do not say which one is meant."""
    NAME = "libero_object"
    THINGS = ("alphabet_soup_1", "salad_dressing_1")
    INSTRUCTIONS = ("pick up the alphabet soup and place it in the basket",
                    "pick up the salad dressing and place it in the basket")

    def eval_init_states(self, task, number):
        """The stored states of the scene, for either goal."""
        return super().eval_init_states(0, number)

    def make_env(self, task):
        """One scene serves both tasks. What the goal is about is no part of a state."""
        super().make_env(0)
        thing = self.THINGS[task]
        self.env.obj_of_interest = [thing, "basket_1"]
        self.env.parsed_problem["goal_state"] = [["in", thing, "basket_1_contain_region"]]

class OneSceneMisled(OneScene):
    """The same, in which the policy is told to take the other thing."""
    INSTRUCTIONS = OneScene.INSTRUCTIONS[::-1]

class Goal(LiberoObject):
    """LIBERO-Goal with LIBERO-Object's expert, which is made for none of its tasks.

    Task 6, "put the cream cheese in the bowl", it does in 12 of 20 attempts.
    """
    NAME = "libero_goal"
