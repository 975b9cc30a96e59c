"""What envs.make does with any environment: its observations, its actions, its end, and what it refuses."""

import ctypes.util
import os
import subprocess
import sys

import countdown  # noqa: F401  registers Countdown-v0
import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT

import common
import envs
from common import InputError
from envs import opengl

NO_OSMESA = pytest.mark.skipif(bool(ctypes.util.find_library("OSMesa")), reason="libosmesa6 is there")
NEEDS_EGL = pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="needs libegl1")
DRAWN = ["kitchen-mixed-v0", "cube-single-noisy-singletask-task1-v0", "metaworld-door-open", "InvertedPendulum-v5"]
ONE_OF_EACH = ["pointmaze-umaze-play", "pointmaze-large-play", "antmaze-umaze-v2", "kitchen-mixed-v0"]
ONE_OF_EACH += ["metaworld-door-open", "cube-single-noisy-singletask-task1-v0", "minari:test/pendulum-v0"]
ONE_OF_EACH += ["minari:D4RL/antmaze/umaze-v1"]


def test_any_environment_is_flattened_and_rescaled():
    env = envs.make("Countdown-v0")
    obs, _ = env.reset(seed=0)
    assert env.observation_space.shape == (3,) and env.action_space.shape == (2,) and obs.dtype == np.float32
    assert obs[0] == 7  # a space made from a dict has its keys sorted
    env.step(np.array([-1.0, 1.0]))
    np.testing.assert_allclose(env.unwrapped.taken, [0, 4])
    env.step(np.array([0.5, 0.0]))
    np.testing.assert_allclose(env.unwrapped.taken, [7.5, 0])


def test_a_sparse_episode_ends_at_its_first_success():
    class Reach(gym.Env):
        observation_space, action_space = gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            self.t = 0
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.t += 1
            return np.zeros(1, np.float32), 0.0, False, self.t == 9, {"is_success": self.t == 4}

    gym.register("Reach-v0", entry_point=Reach)
    for sparse, length in ((True, 4), (False, 9)):
        env = envs.make("Reach-v0", sparse)
        (episode,) = common.run_episodes([env], lambda obs, keys: np.zeros((1, 1), np.float32), [0])
        assert len(episode["rewards"]) == length and episode["success"]
        assert episode["masks"].tolist() == [1.0] * (length - 1) + [0.0 if sparse else 1.0]


class Told(gym.Env):
    """Observes anything of its space, and answers each step with `outcome`: reward, terminated, info."""

    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, space=None, outcome=(0.0, False, {})):
        self.observation_space, self.outcome = space or gym.spaces.Box(-1, 1, (2,)), outcome

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        reward, terminated, info = self.outcome
        return self.reset()[0], reward, terminated, False, info


def make_told(monkeypatch, *told, **how):
    spec = gym.envs.registration.EnvSpec("Told-v0", lambda: Told(*told), max_episode_steps=9, disable_env_checker=True)
    monkeypatch.setitem(gym.registry, "Told-v0", spec)
    return envs.make("Told-v0", **how)


@pytest.mark.parametrize(
    ("reward", "terminated", "info", "success"),
    [
        (1.0, True, {}, True),
        (0.0, True, {}, False),  # an end that pays nothing is a failure
        (-1.0, True, {}, False),
        (1.0, False, {}, False),
        (0.0, True, {"is_success": True}, True),
        (1.0, True, {"is_success": False}, False),
        (1.0, True, {"success": False, "is_success": True}, False),
        (0.0, False, {"success": np.bool_(True)}, True),
    ],
)
def test_what_counts_as_success(reward, terminated, info, success, monkeypatch):
    env = make_told(monkeypatch, None, (reward, terminated, info))
    env.reset(seed=0)
    assert env.step(np.zeros(1, np.float32))[4]["success"] is success


def test_an_environment_that_never_reports_success_is_told_of_once(monkeypatch, capsys):
    common.warn_once.cache_clear()
    for info, times in (({}, 1), ({"task_success": True}, 1), ({"is_success": False}, 0), ({"success": False}, 0)):
        env = make_told(monkeypatch, None, (0.0, True, info))
        for _ in range(2):
            env.reset(seed=0)
            env.step(np.zeros(1, np.float32))
        assert capsys.readouterr().err.count("warning: --env-id Told-v0: its info has neither success") == times
        common.warn_once.cache_clear()


def test_a_reward_is_one_number(monkeypatch):
    for reward in (np.array([0.5]), np.float32(0.5), 0.5):
        env = make_told(monkeypatch, None, (reward, False, {}))
        env.reset(seed=0)
        assert type(env.step(np.zeros(1, np.float32))[1]) is float
    env = make_told(monkeypatch, None, (np.zeros(2), False, {}))
    env.reset(seed=0)
    with pytest.raises(InputError, match=r"^--env-id Told-v0: its reward is \[0\. 0\.\]; expected one number$"):
        env.step(np.zeros(1, np.float32))


IMAGE, VECTOR = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), gym.spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(
    "space",
    [
        IMAGE,
        gym.spaces.Dict(camera=IMAGE, state=VECTOR),
        gym.spaces.Dict(robot=gym.spaces.Dict(camera=IMAGE)),
        gym.spaces.Tuple((VECTOR, IMAGE)),
        gym.spaces.Box(0, 255, (8, 8), np.uint8),  # grey
        gym.spaces.Box(0, 255, (4, 8, 8, 3), np.uint8),  # a stack
        gym.spaces.Box(0, 1, (3, 20, 20), np.float32),
    ],
)
def test_images_are_refused_where_vectors_are_read(space, monkeypatch):
    """They were flattened, and trained on as so many numbers."""
    with pytest.raises(InputError, match=r"--env-id Told-v0: observations with images, .*parl_openvla\.py$") as error:
        make_told(monkeypatch, space)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("space", [gym.spaces.Sequence(VECTOR), gym.spaces.Dict(a=gym.spaces.Sequence(VECTOR))])
def test_observations_of_any_length_are_refused(space, monkeypatch):
    with pytest.raises(InputError, match=r"--env-id Told-v0: observations .*Sequence.*; expected a fixed number of"):
        make_told(monkeypatch, space)


def test_matrices_and_bytes_are_no_images(monkeypatch):
    spaces = {"rotations": gym.spaces.Box(-1, 1, (7, 3, 3)), "bytes": gym.spaces.Box(0, 255, (5,), np.uint8)}
    space = gym.spaces.Dict(**spaces, pair=gym.spaces.Tuple((VECTOR, gym.spaces.Discrete(3))))
    assert make_told(monkeypatch, space).observation_space.shape == (63 + 5 + 2 + 3,)


def test_an_image_is_an_array_of_its_own(monkeypatch):
    """An environment may draw into one buffer again and again; also where the image has the policy's size."""
    for size in (8, 4):
        env = make_told(monkeypatch, gym.spaces.Dict(image=IMAGE), image_size=size)
        drawn = {"image": np.zeros((8, 8, 3), np.uint8)}
        env.unwrapped.reset = lambda drawn=drawn, **_: (drawn, {})
        first, _ = env.reset(seed=0)
        drawn["image"][:] = 255
        second = env.step(np.zeros(1, np.float32))[0]
        assert first.shape == second.shape == (size, size, 3) and first.max() == 0 and second.min() == 255


@pytest.mark.parametrize("env_id", ONE_OF_EACH[:-2])
def test_families_neither_change_an_action_nor_what_they_returned(env_id):
    """Those that make data here store both."""
    env, rng = envs.family_module(env_id).make(env_id), np.random.default_rng(0)
    returned = [env.reset(seed=0)[0]]
    before = [returned[0].copy()]
    for _ in range(3):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        sent = action.copy()
        returned.append(env.step(action)[0])
        before.append(returned[-1].copy())
        np.testing.assert_array_equal(action, sent)
    np.testing.assert_array_equal(returned, before)
    assert all((before[i] != before[i + 1]).any() for i in range(3))


class Strict(gym.Env):
    """Asserts that an action is within its bounds, asymmetric ones."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(np.float32([0.12610678, -3.3]), np.float32([1.1117857, 0.7]))

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return np.zeros(1, np.float32), 0.0, False, False, {}


gym.register("TestStrict-v0", entry_point=f"{__name__}:Strict", max_episode_steps=9)


def test_no_action_is_beyond_its_bounds_by_a_rounding_error():
    env = envs.make("TestStrict-v0")
    env.reset(seed=0)
    for action in (np.full(2, -1, np.float32), np.full(2, 1, np.float32)):
        env.step(action)


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(0, 10, (2,), np.int32),
        gym.spaces.Box(np.float32([-1, 0.5]), np.float32([1, 0.5])),
        gym.spaces.Box(-1, np.inf, (2,)),
        gym.spaces.Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (2,)),  # whose width overflows
        gym.spaces.Box(-1, 1, (2, 2)),
        gym.spaces.Box(np.linspace(-2, -1, 40, dtype=np.float32), np.inf, (40,)),  # several lines when printed
        gym.spaces.Discrete(3),
    ],
)
def test_action_spaces_that_cannot_be_rescaled(space, monkeypatch):
    monkeypatch.setitem(gym.registry, "Odd-v0", gym.envs.registration.EnvSpec("Odd-v0", entry_point=lambda: env))
    env = gym.Env()
    env.action_space, env.observation_space = space, gym.spaces.Box(-1, 1, (3,))
    with pytest.raises(InputError, match=r"--env-id Odd-v0: its action space is .*; expected a bounded Box") as error:
        envs.make("Odd-v0")
    assert "\n" not in str(error.value)


def test_gymnasium_robotics_does_without_mujoco_py():
    env = envs.make("gymnasium_robotics:FetchReach-v4", sparse=True)
    assert env.observation_space.shape == (16,) and env.reset(seed=0)[0].shape == (16,)
    assert env.step(np.zeros(4, np.float32))[4]["success"] is False


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "envs.minari", raising=False)
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(InputError, match=r"^--env-id minari:reach: .*; expected pip install minari$"):
        envs.make("minari:reach")
    assert "pointmaze-umaze-play" in envs.known_ids()
    monkeypatch.setitem(envs.MODULES, "minari", "absent")
    with pytest.raises(InputError, match=r"^--env-id minari:reach: .*; expected envs/absent\.py$"):
        envs.make("minari:reach")


def test_every_family_has_a_module():
    families = {common.family(env_id): env_id for env_id in ONE_OF_EACH}
    assert set(families) == set(common.FAMILIES.values()) == set(envs.MODULES)
    for env_id in ONE_OF_EACH:
        module = envs.family_module(env_id)
        assert all(hasattr(module, name) for name in ("IDS", "make", "dataset_file"))
        assert env_id in module.IDS or env_id.startswith("minari:")
    assert envs.family_module("Pendulum-v1") is None


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("Hopper-v2", "; expected its current version, Hopper-v5$"),
        ("Humanoid-v3", "; expected its current version, Humanoid-v5$"),
        ("gymnasium_robotics:FetchReach-v1", "; expected its current version, gymnasium_robotics:FetchReach-v4$"),
        ("Pendulum-v0", "use `Pendulum-v1` instead; did you mean Pendulum-v1"),
        ("Hopper-v9", r"; did you mean Hopper-v5\?$"),  # not its retired versions as well
        ("phys2d/Pendulum-v0", "No module named 'jax'; expected an installed module"),
        ("no_such_module:Robot-v0", "No module named 'no_such_module'.*; expected an installed module"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is out of date")
def test_ids_that_gymnasium_cannot_make(env_id, message):
    """The id that is meant, or the package that is missing."""
    with pytest.raises(InputError, match=rf"^--env-id {env_id}: .*{message}") as error:
        envs.make(env_id)
    assert "\n" not in str(error.value)


def test_ids_of_gymnasium_robotics_come_with_its_name():
    """Where nothing has imported it yet, gymnasium knows none of them."""
    error = envs.not_made("HandReach-v3", gym.error.NameNotFound("Environment `HandReach` doesn't exist."))
    assert "`HandReach` doesn't exist; did you mean gymnasium_robotics:HandReach-v3" in str(error)


@pytest.mark.parametrize("env_id", ["CarRacing-v3", "BipedalWalker-v3", "LunarLanderContinuous-v3"])
def test_a_package_that_gymnasium_needs_is_named(env_id, monkeypatch):
    monkeypatch.setitem(sys.modules, "Box2D", None)
    for module in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(InputError, match=rf"^--env-id {env_id}: Box2D .*pip install .*; expected that package$"):
        envs.make(env_id)


def test_a_package_for_drawing_is_named_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    envs.make("Pendulum-v1")
    with pytest.raises(InputError, match=r"^--env-id Pendulum-v1: pygame is not installed.*; expected that package$"):
        envs.make("Pendulum-v1", render=True)


def test_a_robot_is_not_moved_when_it_is_made(monkeypatch):
    """Drawing is tried in gymnasium's own simulators alone."""

    class Robot(Told):
        metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

        def __init__(self, render_mode=None):
            super().__init__()
            self.render_mode = render_mode

        def reset(self, **_):
            raise AssertionError

    monkeypatch.setitem(gym.registry, "Robot-v0", gym.envs.registration.EnvSpec("Robot-v0", Robot))
    assert envs.make("Robot-v0", render=True).unwrapped.render_mode == "rgb_array"


# ---------------------------------------------------------------- OpenGL


@pytest.mark.parametrize(
    ("there", "set_to", "chosen"),
    [
        (("EGL", "OSMesa"), None, "egl"),
        (("EGL", "OSMesa"), "", "egl"),
        (("EGL", "OSMesa"), " OSMesa ", "osmesa"),  # as MuJoCo reads it
        (("OSMesa",), None, "osmesa"),
        ((), None, "glfw"),
        ((), "egl", "egl"),
    ],
)
def test_which_opengl_is_chosen(there, set_to, chosen, monkeypatch):
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: name if name in there else None)
    monkeypatch.setenv("MUJOCO_GL", set_to or "")
    monkeypatch.delenv("MUJOCO_GL") if set_to is None else None
    with opengl.optional():  # for imports: as it is named if that is there, and put back afterwards
        inside = os.environ.get("MUJOCO_GL")
    assert inside == (set_to if not set_to else chosen if there else "disable")
    assert os.environ.get("MUJOCO_GL") == set_to
    opengl.choose()
    assert os.environ["MUJOCO_GL"] == chosen


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        pytest.param("osmesa", "its library is not there", marks=NO_OSMESA),
        ("glfw", "glfw finds no display"),
        ("nonsense", "there is no such kind"),
        ("disable", "there is no such kind"),
    ],
)
def test_opengl_that_is_not_there_is_one_line_that_names_the_variable(kind, reason, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", kind)
    monkeypatch.setenv("DISPLAY", ":77")
    with pytest.raises(InputError) as error:
        opengl.context.__wrapped__()  # not the one that is cached
    expected = "expected egl (the default; Debian's libegl1 and libgl1), osmesa (libosmesa6), or glfw with a display"
    assert str(error.value) == f"MUJOCO_GL={kind}: no OpenGL ({reason}); {expected}"


def run_with(code, **variables):
    """stdout of Python code in a process of its own, as OpenGL is loaded once, in which of DISPLAY and MUJOCO_GL only
    `variables` are set; it says nothing on stderr."""
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MUJOCO_GL")}
    command = [sys.executable, "-c", f"import envs, common\n{code}"]
    result = subprocess.run(command, env=environment | variables, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize(
    "variables",
    [pytest.param({"MUJOCO_GL": "osmesa"}, marks=NO_OSMESA), {"MUJOCO_GL": "nonsense", "DISPLAY": ":77"}],
)
def test_what_draws_nothing_needs_no_opengl(variables):
    """PointMaze draws without it. Of the others an error says what is missing where something is to be drawn."""
    code = f"""
env = envs.make("pointmaze-umaze-play", render=True)
env.reset(seed=0)
assert env.render().std() > 20
for env_id in {DRAWN}:
    envs.make(env_id).reset(seed=0)
for env_id, how in [*((env_id, dict(render=True)) for env_id in {DRAWN}), ("metaworld-door-open", dict(image_size=16))]:
    try:
        envs.make(env_id, **how)
    except common.InputError as error:
        print(error)
"""
    lines = run_with(code, **variables).splitlines()
    assert len(lines) == 5 and all(line.startswith(f"MUJOCO_GL={variables['MUJOCO_GL']}: no OpenGL") for line in lines)


@NEEDS_EGL
@pytest.mark.parametrize("variables", [{"DISPLAY": "", "MUJOCO_GL": ""}, {"DISPLAY": ":77"}])
def test_egl_draws_without_a_display(variables):
    """Also after MuJoCo was imported for an environment that is not drawn."""
    code = f"""
for env_id in {DRAWN}:
    envs.make(env_id)
    env = envs.make(env_id, render=True)
    env.reset(seed=0)
    assert env.render().std() > 10, env_id
    env.close()
image = envs.make("metaworld-door-open", image_size=16).reset(seed=0)[0]
assert image.shape == (16, 16, 3) and image.std() > 10
"""
    run_with(code, **variables)
