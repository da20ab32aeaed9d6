"""The claims of simulators/environment.py: which GPU draws, LIBERO's paths, MuJoCo's version, OpenGL."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulators import environment
from tests.conftest import launch


@pytest.mark.parametrize("settings,device", [
    (dict(LOCAL_RANK="1"), "1"),
    (dict(LOCAL_RANK="2"), None),  # there are two
    (dict(CUDA_VISIBLE_DEVICES="1"), "1"),
    (dict(CUDA_VISIBLE_DEVICES="GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", LOCAL_RANK="1"), "1"),
    (dict(MUJOCO_EGL_DEVICE_ID="7"), "7")])
def test_pictures_are_drawn_by_the_trainers_gpu_where_there_are_enough(monkeypatch, settings, device):
    monkeypatch.setattr(environment, "egl_devices", lambda: 2)
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.setenv(name, "")  # so that it is as before at the end, whatever is set meanwhile
        monkeypatch.delenv(name)
    for name, value in (dict(MUJOCO_GL="egl") | settings).items():
        monkeypatch.setenv(name, value)
    environment.choose_device()
    assert os.environ.get("MUJOCO_EGL_DEVICE_ID") == device
    # robosuite would take it for numbers of EGL's devices.
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize("found", [None, "[]", "assets: /elsewhere", "benchmark_root: {root}"])
def test_libero_gets_paths_that_fit_whatever_it_finds(monkeypatch, tmp_path, found):
    folder = tmp_path / "old"
    if found is not None:
        folder.mkdir()
        root = environment.place_of("libero") / "libero"
        (folder / "config.yaml").write_text(found.format(root=root))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(folder))
    monkeypatch.setattr(environment, "private_folder", lambda: tmp_path / "private")
    environment.set_libero_paths()
    program = "from libero.libero import get_libero_path; print(get_libero_path('bddl_files'))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and Path(done.stdout.strip()).is_dir() and done.stdout.count("\n") == 1


def test_another_libero_on_the_path_is_refused(tmp_path):
    (tmp_path / "libero/libero").mkdir(parents=True)
    for folder in ("libero", "libero/libero"):
        (tmp_path / folder / "__init__.py").write_text("input('where?')")
    done = launch("--suite", "libero_goal", "--eval", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "hides the libero of requirements.txt" in done.stderr
    assert done.stderr.count("\n") == 1


def test_another_mujoco_gets_one_sentence(monkeypatch):
    monkeypatch.setattr(environment, "version", lambda package: "3.4.0")
    with pytest.raises(ImportError, match="pip install mujoco==3.3.2"):
        environment.prepare()


def test_no_opengl_gets_one_sentence(tmp_path):
    done = launch("--workers", 1, "--out", tmp_path, MUJOCO_GL="egl", MUJOCO_EGL_DEVICE_ID="99")
    assert done.returncode == 2 and done.stderr.startswith("ript.py: the simulator does not start")
    assert done.stderr.count("\n") == 1
