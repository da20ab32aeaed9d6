"""Suites of LIBERO with scripted experts, so that small policies need no demonstrations from files."""
import numpy as np

from simulators.libero import FastLibero
from simulators.scripted import TINY, TINY_IMITATION, Scripted


class LiberoObject(Scripted, FastLibero):
    """LIBERO-Object: an expert for ten things to be put into a basket."""
    NAME = "libero_object"
    # For all ten tasks at once. A single one takes 600 steps of SFT, and 16 groups in four iterations.
    PRESET = dict(tiny=TINY | dict(checkpoint="runs/libero_object_sft", iterations=12, eval_every=6,
                                   groups=40, max_rejected=40, minibatch=320, lr=1e-4, adam_beta1=0.9,
                                   scale_multiplier=0.5))
    # Few demonstrations, well learned, make a start that fails often and seldom always: four of each task.
    IMITATION = dict(tiny=TINY_IMITATION | dict(demos_per_task=4, sft_steps=1000))

    def expert(self, closing: int) -> np.ndarray:
        """The next action (7,): above the thing, down, close, up, to the basket, open."""
        model = self.env.sim.model
        data = self.env.sim.data
        hand = self.env._eef_xpos
        numbers = self.env.obj_body_id  # by name; a place in the basket, also of interest, has none
        bodies = [numbers[name] for name in self.env.obj_of_interest if name in numbers]
        thing, basket = data.body_xpos[bodies]
        boxes = np.flatnonzero((model.geom_bodyid == bodies[0]) & (model.geom_group == 0))
        tops = data.geom_xpos[boxes, 2] + (np.abs(data.geom_xmat[boxes, 6:]) * model.geom_size[boxes]).sum(-1)
        low = max(thing[2] + 0.004, tops.max() - 0.028)  # the palm is 3 cm above the fingertips' middle
        height = basket[2] + 0.3  # metres, as all here
        to_basket = np.abs(basket[:2] - hand[:2]).max()
        to_thing = np.abs(thing[:2] - hand[:2]).max()
        if to_basket < 0.03 or closing >= 8:
            way = basket if hand[2] > height - 0.04 else hand
            return self.toward(way, height, -1 if to_basket < 0.03 else 1)
        if closing or to_thing < 0.012 and hand[2] < low + 0.012:
            return self.toward(hand, low, 1)
        return self.toward(thing, low if to_thing < 0.02 else tops.max() + 0.1, -1)


class LiberoSpatial(Scripted, FastLibero):
    """LIBERO-Spatial: an expert for a bowl to be put on a plate, wherever it stands."""
    NAME = "libero_spatial"
    PRESET = dict(tiny=LiberoObject.PRESET["tiny"] | dict(checkpoint="runs/libero_spatial_sft"))
    IMITATION = dict(tiny=TINY_IMITATION | dict(demos_per_task=10, sft_steps=2000))
    RIM = 0.045, 0.035  # where the hand grips: beside the bowl's middle and above it, metres
    CLOSING = 14  # steps until the fingers have the thin rim between them
    CARRYING = 0.4  # at full speed a hand moves by 10 cm in the eight steps in which a policy sees nothing
    AFTER = 8  # it opens in the last three steps before its success, which are too few to learn from

    def expert(self, closing: int) -> np.ndarray:
        """The next action (7,): above the rim, down, close, up, to the plate, down, open. In the drawer of
        task 4 there is room for a finger only at the sides, and so the hand turns."""
        data = self.env.sim.data
        hand = self.env._eef_xpos
        things = self.env.obj_of_interest
        bowl, plate = (data.body_xpos[self.env.obj_body_id[name]] for name in things)
        drawer = ["in", things[0], "wooden_cabinet_1_top_region"] in self.env.parsed_problem["initial_state"]
        side = data.get_body_xmat("wooden_cabinet_1_main")[:, 0] if drawer else np.array([0, 1, 0])
        rim = bowl + self.RIM[0] * side + [0, 0, self.RIM[1]]
        away = np.abs(rim - hand)
        above = rim[2] + 0.1
        if self.placed(bowl, plate):
            action = self.toward(hand, hand[2], -1)
        elif closing >= self.CLOSING and away.max() < 0.05:  # or else the bowl has slipped away
            action = self.carry(hand, bowl, plate, drawer)
        elif 0 < closing < self.CLOSING or away.max() < 0.012:
            action = self.toward(rim, rim[2], 1)
        elif away[:2].max() > 0.04 and hand[2] < above - 0.04:
            action = self.toward(hand, above + 0.02, -1)  # over what stands in the way
        else:
            action = self.toward(rim, rim[2] if away[:2].max() < 0.02 else above, -1)
        if drawer:
            fingers = data.site_xmat[self.env.robots[0].eef_site_id].reshape(3, 3)[:, 0]  # they part along it
            action[5] = np.clip(4 * np.cross(fingers, side)[2], -1, 1)
        return action

    def placed(self, bowl, plate):
        """Is the bowl where the hand is to open?"""
        return np.abs(bowl[:2] - plate[:2]).max() < 0.025 and bowl[2] < plate[2] + 0.05

    def carry(self, hand, bowl, plate, drawer):
        """The next action with the bowl in the hand."""
        off = np.abs(bowl[:2] - plate[:2]).max()
        goal = plate + hand - bowl  # the hand's place when the bowl is on the plate
        if off < 0.02:
            return self.toward(goal, hand[2] - 0.06, 1)
        clear = 0.24 if drawer and off > 0.2 else 0.09  # of what is around the bowl, above the plate
        if off > 0.04 and bowl[2] < plate[2] + clear:
            return self.toward(hand, hand[2] + 0.1, 1)
        height = plate[2] + 0.12 + self.RIM[1]
        return self.toward(goal, max(height, hand[2]) if off > 0.1 else height, 1, self.CARRYING)
