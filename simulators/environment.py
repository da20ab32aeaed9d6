"""What OpenGL, robosuite and LIBERO need around them: paths, OpenGL's variables, and which GPU draws."""
import ctypes
import importlib.util
import json
import logging
import os
import sys
import tempfile
from importlib.metadata import distribution, version
from pathlib import Path

import ript


def prepare():
    """Set what MuJoCo and robosuite read when they are imported. An existing setting is kept."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    # Software OpenGL draws in the simulator's own thread. Others would take the cores of other simulators.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    # From 3.3.3 on pictures are darker, from 3.4.0 on one of LIBERO's stored states breaks.
    if version("mujoco") != "3.3.2":
        raise ImportError("MuJoCo must be 3.3.2: pip install mujoco==3.3.2")
    # robosuite and control_step.py keep compiled code beside their sources.
    sources = [Path(__file__).parent, place_of("robosuite")]
    if not all(os.access(folder, os.W_OK) for folder in sources):
        os.environ.setdefault("NUMBA_CACHE_DIR", str(private_folder() / "numba"))


def private_folder():
    """A temporary directory of this user's, for what cannot be written beside the packages."""
    return Path(tempfile.gettempdir()) / f"ript-{os.getuid()}"


def set_libero_paths():
    """Give LIBERO a config.yaml. Without one it prints or asks, and another installation's misleads it."""
    own = Path(os.environ.get("LIBERO_CONFIG_PATH", Path(sys.prefix) / ".libero"))
    root = place_of("libero") / "libero"
    if root.resolve() != Path(distribution("rlinf-libero").locate_file("libero/libero")).resolve():
        raise ImportError(f"{root} hides the libero of requirements.txt: take it out of PYTHONPATH")
    if not fits(own, root):
        own = private_folder() / "libero"
        paths = dict(benchmark_root=root, bddl_files=root / "bddl_files", init_states=root / "init_files",
                     datasets=root.parent / "datasets", assets=root / "assets")
        # Every JSON document is also YAML.
        text = json.dumps({name: str(path) for name, path in paths.items()}, indent=1)
        own.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = own / f"config.{os.getpid()}"
        temporary.write_text(text)
        os.replace(temporary, own / "config.yaml")
    os.environ["LIBERO_CONFIG_PATH"] = str(own)


def place_of(package):
    """The directory of a package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"{package} is missing: pip install -r requirements.txt")
    return Path(spec.submodule_search_locations[0])


def fits(folder, root):
    """Whether a directory has a config.yaml for the LIBERO in root, and LIBERO may put its lock beside it."""
    import yaml
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        known = [Path(config[name]) for name in ("bddl_files", "init_states", "assets", "datasets")]
        return (os.access(folder, os.W_OK) and Path(config["benchmark_root"]).resolve() == root.resolve()
                and all(path.is_dir() for path in known[:2]))
    except Exception:  # no file, no YAML, not all of the names
        return False


def init_worker():
    """What a simulator's process does before it makes its first environment."""
    # robosuite has remarks about its macros, and its destructors complain where a constructor has failed.
    logging.disable(logging.WARNING)
    sys.unraisablehook = lambda error: None
    choose_device()


def check_meshes():
    """Raise ript.UserError unless LIBERO's meshes are where its config.yaml says."""
    from libero.libero import get_libero_path
    found = Path(get_libero_path("assets")).is_dir()
    ript.require(found, "LIBERO's meshes are missing: run libero-download-assets")


def choose_device():
    """Choose the GPU that draws, in a simulator's process: its trainer's, or the first where there are fewer.

    robosuite takes CUDA_VISIBLE_DEVICES for numbers of EGL's devices, and fails where it has names. It is of
    no other use in this process.
    """
    rank = os.environ.get("LOCAL_RANK", "0")
    rank = int(rank) if rank.isdecimal() else 0  # ript.init_distributed complains
    visible = os.environ.pop("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    if os.environ.get("MUJOCO_GL") != "egl" or "MUJOCO_EGL_DEVICE_ID" in os.environ:
        return
    # Where it has numbers, EGL's devices are expected in the order of CUDA's.
    device = rank
    if all(name.isdigit() for name in visible) and rank < len(visible):
        device = int(visible[rank])
    if device < egl_devices():
        os.environ["MUJOCO_EGL_DEVICE_ID"] = str(device)


def egl_devices():
    """How many devices EGL has; 0 where it does not say."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        egl.eglGetProcAddress.restype = ctypes.c_void_p
        address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
        number = ctypes.c_int()
        kind = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
        query = kind(address)
        query(0, None, ctypes.byref(number))
        return number.value
    except (OSError, AttributeError):
        return 0
