"""D4RL's antmaze-*-v2 and kitchen-*-v0: its own environment classes and files, without mujoco-py.

D4RL (Fu et al., 2020, https://arxiv.org/abs/2004.07219) asks for mujoco-py and the MuJoCo 2.1 binaries, but its ant
stands on gym's MujocoEnv and its kitchen on dm_control, and both run on the official `mujoco` bindings. Each stand-in
below says what it is for.
"""

import collections.abc
import contextlib
import io
import os
import re
import sys
import tempfile
import types
import warnings
from pathlib import Path

import gymnasium
import numpy as np

from envs import drawing_from, files, opengl


@contextlib.contextmanager
def quiet():
    """Nothing on stdout or stderr and no warnings: D4RL and the gym it needs greet, and warn of their own age."""
    text = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def stand_ins():
    """While D4RL is imported: a mujoco-py, of which it only asks the version; no pybullet, whose environments are not
    needed; no news of gym; and a folder that exists for its datasets, which it would make."""
    modules = {"mujoco_py": types.SimpleNamespace(get_version=lambda: "2.1"), "pybullet": None, "gym_notices": None}
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    folder = os.environ.get("D4RL_DATASET_DIR")
    sys.modules.update(modules)
    os.environ["D4RL_DATASET_DIR"] = tempfile.gettempdir()
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name)
        sys.modules.update(before)
        os.environ.pop("D4RL_DATASET_DIR")
        os.environ.update({"D4RL_DATASET_DIR": folder} if folder is not None else {})


with quiet(), stand_ins():
    import d4rl
    import d4rl.kitchen
    import d4rl.locomotion
    import dm_control.mujoco
    import gym
    import mujoco
    from d4rl.kitchen.adept_envs import mujoco_env as kitchen_env
    from d4rl.kitchen.adept_envs.franka.robot import franka_robot
    from d4rl.kitchen.adept_envs.simulation import sim_robot
    from d4rl.locomotion import ant, maze_env


gym.logger.set_level(gym.logger.ERROR)  # D4RL calls what gym 0.24 calls deprecated
maze_env.print = lambda *args: None  # the goal, at every reset
ant.AntEnv.sim = property(lambda self: self)  # mujoco-py has `data` on a simulation, gym with mujoco on the environment
kitchen_env.collections = collections.abc  # `collections.Mapping`, gone since Python 3.10
read_config = franka_robot.read_config_from_node  # numpy 2.4 sets no element to an array of size 1
franka_robot.read_config_from_node = lambda *args: value.item() if (value := read_config(*args)).size == 1 else value


class KitchenPhysics(dm_control.mujoco.Physics):
    """mujoco 3.2 and later refuse a top-level <default> with a name; inside another it means the same."""

    @classmethod
    def from_xml_path(cls, path):
        kettle = (Path(d4rl.kitchen.__file__).parent / "adept_models/kitchen/assets/kettle_asset.xml").read_text()
        kettle = kettle.replace('<default class="kettle">', '<default><default class="kettle">')
        kettle = kettle.replace("</mujocoinclude>", "</default></mujocoinclude>")
        model = mujoco.MjModel.from_xml_path(path, {"kettle_asset.xml": kettle.encode()})
        return cls.from_model(dm_control.mujoco.wrapper.MjModel(model))


sim_robot.module.get_dm_mujoco = lambda: types.SimpleNamespace(
    Physics=KitchenPhysics, wrapper=dm_control.mujoco.wrapper
)

HOW_TO_REPLACE = "delete it, and it is downloaded again"
IDS = tuple(name for name in d4rl.infos.DATASET_URLS if re.fullmatch(r"antmaze-.*-v2|kitchen-.*-v0", name))


# ======================================== ENVIRONMENTS ========================================


def make(env_id, render=False):
    """One of IDS as a gymnasium environment with D4RL's time limit (700 or 1000 steps of 0.1 s, 280 of 0.08 s).

    antmaze: an ant walks to a goal that is drawn around the goal cell at each reset and not observed.
      observation (29,): positions (15,), of them x and y in m first, and velocities (14,); action (8,): torques in
      [-1, 1]. Reward 1 and the end of the episode within 0.5 m of the goal, else 0.
    kitchen: a robot arm has four tasks, done in any order.
      observation (60,): noisy positions of arm (9,) and objects (21,), and the objects' goal (30,); action (9,): joint
      velocities in [-1, 1]. Reward: the number of tasks completed so far, 0 to 4; the episode ends at 4.

    render: has render() -> (480, 480, 3) uint8.
    """
    return gymnasium.wrappers.TimeLimit(D4RL(env_id, render), gym.spec(env_id).max_episode_steps)


class D4RL(gymnasium.Env):
    """D4RL's environment behind gymnasium's interface; see `make`.

    NOTE(differs): kitchen pays the tasks completed so far at every step (D4RL's class: 1 when a task completes).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}  # noqa: RUF012

    def __init__(self, env_id, render):
        self.render_mode = "rgb_array" if render else None
        self.env_id, self.is_maze = env_id, env_id.startswith("antmaze")
        self.generator = np.random.RandomState()
        spec = gym.spec(env_id)
        with drawing_from(self.generator), quiet(), tempfile.NamedTemporaryFile(suffix=".xml") as file:
            # D4RL writes its maze to a file that it neither closes nor deletes
            maze_env.tempfile = types.SimpleNamespace(mkstemp=lambda **kwargs: (file.fileno(), file.name))
            self.env = gym.envs.registration.load(spec.entry_point)(**spec.kwargs)
        self.inner = getattr(self.env, "wrapped_env", self.env)  # the ant is wrapped: its actions are rescaled
        obs_shape, act_shape = self.env.observation_space.shape, self.env.action_space.shape
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, obs_shape, np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, act_shape, np.float32)
        self.renderer = self.make_renderer() if render else None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.generator = np.random.RandomState(np.random.MT19937(seed))
            self.inner.np_random, _ = gym.utils.seeding.np_random(int(seed))
        with drawing_from(self.generator):
            obs = self.env.reset()
        return obs.astype(np.float32), {"success": False}

    def step(self, action):
        obs, reward, terminated, _ = self.env.step(np.asarray(action, np.float64))
        if not self.is_maze:
            reward = len(self.inner.TASK_ELEMENTS) - len(self.inner.tasks_to_complete)
        success = reward >= d4rl.infos.REF_MAX_SCORE[self.env_id]
        return obs.astype(np.float32), float(reward), bool(terminated), False, {"success": success}

    def normalized_score(self, rewards):
        """Percent of D4RL's reference score, of one episode's rewards (L,): 100 at the goal, 25 for each task of the
        kitchen. The last reward is the score, in either."""
        return 100 * d4rl.get_normalized_score(self.env_id, float(rewards[-1]))

    def make_renderer(self):
        model, self.camera = self.inner.model, mujoco.MjvCamera()
        if self.is_maze:  # all of it from above
            walls = model.geom_pos[(model.geom_bodyid == 0) & (model.geom_type == mujoco.mjtGeom.mjGEOM_BOX)]
            self.camera.lookat, self.camera.azimuth, self.camera.elevation = (walls.min(0) + walls.max(0)) / 2, 90, -90
            self.camera.distance = 1.35 * np.ptp(walls, axis=0).max()
        else:  # D4RL's own view
            self.camera.lookat, self.camera.azimuth, self.camera.elevation = (-0.2, 0.5, 2.0), 70, -35
            self.camera.distance = 2.2
        opengl.context()
        renderer = mujoco.Renderer(getattr(model, "ptr", model), 480, 480)  # dm_control's, or gym's
        for slow in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[slow] = False
        return renderer

    def render(self):
        """(480, 480, 3) uint8, the goal of a maze as a green disc."""
        data, scene = self.inner.data, self.renderer.scene
        self.renderer.update_scene(getattr(data, "ptr", data), self.camera)
        if self.is_maze:
            disc, size, colour = mujoco.mjtGeom.mjGEOM_CYLINDER, (0.5, 0.5, 0.02), (0.1, 0.8, 0.1, 1)
            goal = np.array([*self.inner.target_goal, 0.02])
            mujoco.mjv_initGeom(scene.geoms[scene.ngeom], disc, size, goal, np.eye(3).ravel(), colour)
            scene.ngeom += 1
        return self.renderer.render()

    def close(self):
        if self.renderer:
            self.renderer.close()


# ======================================== DATASETS ========================================


def dataset_file(env_id):
    """D4RL's HDF5 file of env_id, in $D4RL_DATASET_DIR or ~/.d4rl/datasets, or else downloaded to the first of them.
    Raises InputError where the download fails, saying which file to put where."""
    folders = [os.environ.get("D4RL_DATASET_DIR"), "~/.d4rl/datasets"]
    return files.find_or_download(env_id, d4rl.infos.DATASET_URLS[env_id], filter(None, folders))


def read_dataset(env_id, path):
    """The arrays of D4RL's file (or of another in its layout): observations (N, O), actions (N, A), rewards, terminals,
    timeouts (N,). It has no next_observations: the last row of an episode that did not end in success is dropped later.

    Kitchen's files pay the number of tasks that are complete at a row, at every row, and mark the end of a
    demonstration as terminal whether or not it completed all four.
    NOTE(differs): kitchen ends where the reward is first 4, and what follows is dropped (released: one-step episodes).
    NOTE(differs): a kitchen demonstration that ends incomplete is cut there (released: it runs into the next one).
    """
    if env_id.startswith("antmaze"):
        return files.read_dataset(path)
    data = files.read_dataset(path, optional=("timeouts", "next_observations"))
    data.setdefault("timeouts", np.zeros_like(data["terminals"]))
    data.pop("next_observations", None)  # so that rows after the first with reward 4 are dropped
    vectors = {key: data[key] for key in ("rewards", "terminals", "timeouts")}
    for key, vector in vectors.items():
        files.check_numbers(vector, f"dataset {path}: {key}")
    size = data["rewards"].size
    if size and {vector.shape for vector in vectors.values()} == {(size,)}:
        data["terminals"], data["timeouts"] = kitchen_ends(*vectors.values())
    return data  # where their shapes differ the caller says so


def kitchen_ends(rewards, terminals, timeouts):
    """terminals, timeouts (N,) bool from those of the file: terminal is the first row of a demonstration with reward 4.
    Each row after it is a timeout, an episode of one row whose next observation is not known, which is dropped."""
    last = terminals.astype(bool) | timeouts.astype(bool)
    demonstration = np.concatenate([[0], np.cumsum(last)[:-1]])
    solved = np.flatnonzero(rewards >= 4)
    first = np.full(demonstration[-1] + 1, len(rewards))
    np.minimum.at(first, demonstration[solved], solved)
    rows = np.arange(len(rewards))
    return rows == first[demonstration], last | (rows > first[demonstration])
