"""OpenGL, with which MuJoCo draws off screen: looked for when something is drawn, and loaded by nothing else.

$MUJOCO_GL names its kind: egl and osmesa need no display, glfw does. Where it names none, EGL is taken if it is there.
"""

import atexit
import contextlib
import ctypes.util
import functools
import importlib
import os
import warnings

from common import InputError
from envs.files import one_line

with contextlib.suppress(ImportError):  # comes with torch for CUDA; it crashes where Mesa was loaded first
    import triton  # noqa: F401

LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}  # kind: the library that it needs; glfw comes with its package
SIZE = 256  # pixels of the context


def named():
    """The kind of $MUJOCO_GL, "" where it names none."""
    return os.environ.get("MUJOCO_GL", "").lower().strip()


def is_there():
    """Whether MuJoCo can be imported with what $MUJOCO_GL names."""
    library = LIBRARIES.get(named())
    return named() in ("", "glfw") or bool(library and ctypes.util.find_library(library))


def choose():
    """Sets $MUJOCO_GL, where it names no kind, to the first that is there. $DISPLAY says little: it can be dead."""
    there = (kind for kind, library in LIBRARIES.items() if ctypes.util.find_library(library))
    os.environ["MUJOCO_GL"] = named() or next(there, "glfw")


@contextlib.contextmanager
def optional():
    """Within the block MuJoCo and dm_control, which load what $MUJOCO_GL names when they are imported, do without it
    where it is not there: most environments draw nothing."""
    before = os.environ.get("MUJOCO_GL")
    if before is not None:
        os.environ["MUJOCO_GL"] = named() if is_there() else "disable"
    try:
        yield
    finally:
        if before is not None:
            os.environ["MUJOCO_GL"] = before


def missing(reason):
    """The InputError where nothing can be drawn."""
    expected = "egl (the default; Debian's libegl1 and libgl1), osmesa (libosmesa6), or glfw with a display"
    return InputError(f"MUJOCO_GL={named()}: no OpenGL ({one_line(reason)}); expected {expected}")


@functools.cache
def context():
    """One off-screen context for every camera, of the kind that $MUJOCO_GL names; mujoco.Renderer's are of it as well.

    With one each, a camera that is deleted would take down the textures and buffers of the one in use.
    Raises InputError, naming the variable, where nothing can be drawn with it.
    """
    choose()
    if not is_there():
        raise missing("its library is not there" if named() in LIBRARIES else "there is no such kind")
    try:
        import mujoco

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if named() == "glfw" and not importlib.import_module("glfw").init():
                raise RuntimeError("glfw finds no display")
            kind = importlib.import_module(f"mujoco.{named()}").GLContext
            made = kind(SIZE, SIZE)
            made.make_current()
            mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100).free()
    except Exception as error:  # mujoco's, PyOpenGL's and glfw's have no class in common
        raise missing(error) from error
    mujoco.gl_context.GLContext = kind
    atexit.register(made.free)  # before EGL shuts down, or it complains
    return made
