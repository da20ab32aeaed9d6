"""LIBERO's suites as ript.Libero has them, with a control step that is three to four times as fast.

ript.py uses this file where it lies beside it. It adds what surrounds LIBERO: the fast control step
(control_step.py), paths and OpenGL (environment.py), colours of collision meshes for small policies, and
LIBERO's demonstrations.
"""
from functools import cache
from pathlib import Path

import numpy as np

import ript
from simulators import environment
from simulators.control_step import FastStep
from simulators.scripted import TINY, TINY_IMITATION, Painted

environment.prepare()
environment.set_libero_paths()


class FastLibero(FastStep, Painted, ript.Libero):
    """A suite of LIBERO, by its name."""
    PRESET = dict(tiny=TINY)
    IMITATION = dict(tiny=TINY_IMITATION)
    drawn_scene = None  # task and seed of the scene that get_observation_at has drawn last

    def make_env(self, task: int):
        """As in ript.Libero, with colours for what is new."""
        before = self.env
        if before is None:
            environment.init_worker()
        super().make_env(task)
        if self.env is not before:
            self.paint()

    def demo_file(self, folder: str, task: int) -> Path:
        """The file of a task among LIBERO's HDF5 demonstrations."""
        return Path(folder, f"{self.benchmark.tasks[task].name}_demo.hdf5")

    @cache
    def demo_init_states(self, folder: str, task: int) -> list[np.ndarray]:
        """The first simulator state of each of LIBERO's demonstrations of a task."""
        path = self.demo_file(folder, task)
        with ript.reading(path):
            return [demo["states"][0] for demo in demos_in(path)]

    def get_observation_at(self, context: ript.Context) -> dict:
        """The raw observation of context.state, a state that a demonstration went through."""
        scene = context.task, context.seed
        if scene != self.drawn_scene:
            # A reset places the fixtures, which are no part of a state.
            self.reset(context)
            self.drawn_scene = scene
        self.env.sim.set_state_from_flattened(context.state)
        self.env.sim.forward()
        return self.get_observation()


def demos_in(path):
    """The demonstrations in one of LIBERO's HDF5 files, by their numbers. The file stays open."""
    import h5py
    data = h5py.File(path)["data"]
    return [data[name] for name in sorted(data, key=lambda name: int(name.split("_")[1]))]
