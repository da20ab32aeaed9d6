"""Variants of the laptop's suites, for experiments/ablations.py: other goals, other words, other arms.

    python ript.py --eval --suite experiments/tabletop_suites.py:Blind    the laptop's policy, blind
"""
from dataclasses import replace

import numpy as np

from policies.tiny import Tiny
from simulators.tabletop import Tabletop, TabletopPretrain

class HeadOnly(Tiny):
    """The laptop's policy, whose stage 2 trains the action head alone: it sees as it has learned to."""
    sft_modules = ("action_head",)

class HandOver(TabletopPretrain):
    """A goal that pretraining did not have (the paper's section 5.4): lift the cube, take it 6 cm forward."""
    INSTRUCTIONS = ("hand me the red cube", "hand me the green cube")
    HORIZON = 36
    # The tabletop's checkpoint is for another goal, so --checkpoint must name one.
    TINY = Tabletop.PRESET["tiny"] | dict(checkpoint="", iterations=15, eval_every=5)
    PRESET = {"tiny": TINY, f"{__file__}:HeadOnly": TINY | dict(max_rejected=24, lr=6e-4)}
    IMITATION = {"tiny": Tabletop.IMITATION["tiny"] | dict(sft_steps=60, sft_lr=1.5e-4),
                 f"{__file__}:HeadOnly": Tabletop.IMITATION["tiny"] | dict(sft_steps=45, sft_lr=2e-4)}

    def reset(self, context):
        """Reset as the tabletop does, and keep where the cube is."""
        answer = super().reset(context)
        self.start = self.cube()[0]
        return answer

    def success(self):
        """The reward: the cube is lifted, and 6 cm further from the robot than it was."""
        return super().success() and bool(self.cube()[0] > self.start + 0.06)

    def expert(self, closing):
        """The next action (7,): as in lifting, but the hand moves forward while it goes up."""
        if closing >= 6:
            return self.toward(self.env._eef_xpos + [0.1, 0, 0], 1, 1)
        return super().expert(closing)

class Move(HandOver):
    """The same goal in other words, by which the pretrained policy still finds and lifts the cube."""
    INSTRUCTIONS = ("move the red cube", "move the green cube")
    IMITATION = {model: preset | dict(sft_steps=37) for model, preset in HandOver.IMITATION.items()}

class ToldHandOver(TabletopPretrain):
    """What pretraining was about, lifting, in HandOver's words."""
    INSTRUCTIONS = HandOver.INSTRUCTIONS

class ToldMove(TabletopPretrain):
    """What pretraining was about, lifting, in Move's words."""
    INSTRUCTIONS = Move.INSTRUCTIONS

class Misled(Tabletop):
    """The tabletop, in which the policy is told to lift the other cube."""
    INSTRUCTIONS = Tabletop.INSTRUCTIONS[::-1]

class Blind(Tabletop):
    """The tabletop, in which the cameras see grey."""
    def render(self, camera, size, collision):
        return np.full((size, size, 3), 128, np.uint8)

class Fresh(Tabletop):
    """The tabletop with other held-out contexts, seeds 150 to 249."""
    def reset(self, context):
        return super().reset(replace(context, seed=context.seed + 150))

# ----------------------------------------------------------------------- the tabletop with another worn arm
def slip(x, y):
    """What a worn arm adds to every action (7,): along x and y, in units of the largest command."""
    return x, y, 0, 0, 0, 0, 0

class NoSlip(Tabletop):
    SLIP = slip(0, 0)

class Slip7(Tabletop):
    SLIP = slip(0.07, 0.07)

class Slip10(Tabletop):
    SLIP = slip(0.1, 0.1)

class Slip14(Tabletop):
    """The laptop's own."""
    SLIP = slip(0.14, 0.14)

class Slip20(Tabletop):
    SLIP = slip(0.2, 0.2)

class SlipForwardRight(Tabletop):
    SLIP = slip(0.14, -0.14)

class SlipBackLeft(Tabletop):
    SLIP = slip(-0.14, 0.14)

class SlipBackRight(Tabletop):
    SLIP = slip(-0.14, -0.14)

OFFSETS = NoSlip, Slip7, Slip10, Slip14, Slip20, SlipForwardRight, SlipBackLeft, SlipBackRight
