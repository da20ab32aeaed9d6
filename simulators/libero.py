"""LIBERO's suites as ript.Libero has them, with a control step that is three to four times as fast.

ript.py uses this file where it lies beside it. It adds what surrounds LIBERO: the fast control step
(control_step.py), paths and OpenGL (environment.py), colours of collision meshes for small policies, and
LIBERO's demonstrations.
"""
import json
import re
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
            environment.check_meshes()
        super().make_env(task)
        if self.env is not before:
            self.paint()
            self.draw_plainly()

    def draw_plainly(self):
        """Where collision meshes are drawn, draw without multisampling, which takes most of the time."""
        if self.collision:
            self.env.sim.model._model.vis.quality.offsamples = 0
            context = self.env.sim._render_context_offscreen
            context.update_offscreen_size(512, 512)  # the buffer is made anew

    def render(self, camera: str, size: int, collision: bool) -> np.ndarray:
        """As in ript.Robosuite. Without multisampling each pixel is the mean of four of a larger picture."""
        if not self.collision:
            return super().render(camera, size, collision)
        large = super().render(camera, 2 * size, collision)
        return large.reshape(size, 2, size, 2, 3).mean((1, 3)).astype(np.uint8)

    def demo_file(self, folder: str, task: int) -> Path:
        """The file of a task among LIBERO's HDF5 demonstrations."""
        return Path(folder, f"{self.benchmark.tasks[task].name}_demo.hdf5")

    @cache
    def demo_init_states(self, folder: str, task: int) -> list[np.ndarray]:
        """The first simulator state of each of LIBERO's demonstrations of a task. Raises ript.UserError where
        the file is of another task, or where a state does not fit the task's scene."""
        path = self.demo_file(folder, task)
        with ript.reading(path):
            demos = demos_in(path)
            self.check_task(demos[0].parent.attrs, task)
            size = len(self.eval_init_states(task, 1)[0])
            for demo in demos:
                check_states(demo, size)
            return [demo["states"][0] for demo in demos]

    def check_task(self, attributes: dict, task: int):
        """Raise ValueError if a file of demonstrations says, by its BDDL file or its instruction, that it is
        another task's. One that says nothing, as those that others have filtered, is accepted."""
        asked = self.benchmark.tasks[task]
        bddl_file = Path(self.benchmark.get_task_bddl_file_path(task))
        language = re.search(r"\(:language ([^)]*)\)", bddl_file.read_text())  # it may differ from the name's
        names = {letters(text) for text in (asked.name, asked.language, language[1])}
        said = []
        if "bddl_file_name" in attributes:
            said.append(Path(str(attributes["bddl_file_name"])).stem)
        if "problem_info" in attributes:
            said.append("".join(json.loads(attributes["problem_info"])["language_instruction"]))
        found = set(map(letters, said))
        # Tasks of LIBERO-90 share instructions, so the name of another one counts more.
        others = {letters(other.name) for other in self.benchmark.tasks} - names
        if said and (found & others or not found & names):
            raise ValueError(f"it is of another task: {', '.join(said)}")

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
    if not len(data):
        raise ValueError("it has no demonstrations")
    return [data[name] for name in sorted(data, key=lambda name: int(name.split("_")[1]))]


def letters(text):
    """The letters and digits of a text, by which two spellings of a name or an instruction are compared."""
    return re.sub(r"[\W_]", "", text.lower())


def check_states(demo, size):
    """Raise ValueError unless the states of a demonstration are finite and have so many numbers each."""
    states = demo["states"]
    if states.ndim != 2 or len(states) == 0 or states.shape[1] != size:
        raise ValueError(f"states of {demo.name} are {states.shape}, and the task's have {size} numbers each")
    if not np.isfinite(states[:]).all():
        raise ValueError(f"states of {demo.name} are not finite")
