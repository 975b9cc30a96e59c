"""OGBench's single-task environments and datasets (Park et al., 2025, https://arxiv.org/abs/2410.20092).

An id names scene, dataset and task, as in cube-single-play-singletask-task1-v0; without -taskN it is OGBench's default
task. Cubes, scenes and puzzles pay -(number of parts unsolved) per step, mazes -1; success pays 0 and ends the episode.
A state is judged before it is acted in: the reward of (s, a) is that of s, and success shows one step late, both in
OGBench's environments and in its relabelled data.

Datasets are OGBench's npz files, found in $OGBENCH_DATASET_DIR (~/.ogbench/data) or downloaded to it. With
--dataset-path made, for cubes and point mazes, smaller data of the same layout are made on first use, in minutes, with
OGBench's oracles. They are not OGBench's data: a quarter of the targets are the task's own (`TASK_SHARE`), so that few
episodes suffice.
"""

import atexit
import os
import re
import warnings

import gymnasium as gym
import numpy as np
import ogbench
from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
from ogbench.relabel_utils import relabel_dataset
from ogbench.utils import DATASET_URL

from common import InputError, bar
from envs import drawing_from, files, opengl

DATASET_KINDS = {
    "pointmaze": ("navigate", "stitch"),
    "antmaze": ("navigate", "stitch", "explore"),
    "humanoidmaze": ("navigate", "stitch"),
    "antsoccer": ("navigate", "stitch"),
    "cube": ("play", "noisy"),
    "scene": ("play", "noisy"),
    "puzzle": ("play", "noisy"),
}
IDS = tuple(
    environment.replace("-singletask", f"-{kind}-singletask")
    for environment in gym.registry
    if "-singletask" in environment
    for kind in DATASET_KINDS.get(environment.split("-")[0], ())  # none for visual-*: images, not states
)

HOW_TO_REPLACE = "delete it, and it is downloaded again"
NOTE_ON_MADE = "the data were made here and are not OGBench's: results do not compare with those on its own"

EPISODE_STEPS = 1000  # of made data, as in OGBench's
MADE_EPISODES = {r"cube-\w+-(play|noisy)-.*": 200, r"pointmaze-(medium|large|giant)-navigate-.*": 100}
TASK_SHARE = 0.25  # of the targets in made data are the task's own, the others random


def parts(env_id):
    """cube-single-play-singletask-task1-v0 -> ("cube-single", "play", "-task1")."""
    return re.fullmatch(r"(.+)-(\w+)-singletask(.*)-v0", env_id).groups()


# ======================================== ENVIRONMENTS ========================================


class SingleTask(gym.Wrapper):
    """Makes an episode of OGBench's follow from its seed: OGBench draws from numpy's global generator (mazes) and from
    an unseeded action space (all others, for steps before the goal is observed; here those actions are zero)."""

    def __init__(self, env):
        super().__init__(env)
        self.generator = np.random.RandomState()

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.generator = np.random.RandomState(seed)
        inner = self.unwrapped
        inner.step = lambda action: type(inner).step(inner, np.zeros_like(action))
        try:
            with drawing_from(self.generator):
                return self.env.reset(seed=seed, options=options)
        finally:
            del inner.step

    def step(self, action):
        with drawing_from(self.generator):
            obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, float(reward), bool(terminated), truncated, {**info, "success": bool(info["success"])}


def make(env_id, render=False):
    """The environment env_id with OGBench's time limit.

    Raises InputError for render without OpenGL.
    """
    scene, _, task = parts(env_id)
    env = SingleTask(make_ogbench(f"{scene}-singletask{task}-v0", width=224, height=224))
    if render:
        opengl.context()
        env.reset(seed=0)
        inner, is_arm = env.unwrapped, scene.startswith(("cube", "scene", "puzzle"))
        model = inner._model if is_arm else inner.model
        model.vis.quality.offsamples, model.light_castshadow[:], model.mat_reflectance[:] = 0, 0, 0  # slow in software
        env.render()
        renderer = inner._renderer if is_arm else inner.custom_renderer
        atexit.register(renderer.close)  # OpenGL is gone when the interpreter collects it
    return env


def make_ogbench(name, **options):
    """OGBench's own environment `name`, without its warnings and without the file that a maze leaves behind."""
    warnings.filterwarnings("ignore", ".*DISPLAY environment variable is missing|.*Failed to open display")
    warnings.filterwarnings("ignore", ".*precision lowered by casting")
    with opengl.optional():
        env = gym.make(name, disable_env_checker=True, **options)
    if model_file := getattr(env.unwrapped, "fullpath", None):
        os.remove(model_file)
    return env


# ======================================== DATASETS ========================================


def dataset_file(env_id):
    """OGBench's npz file of env_id, in $OGBENCH_DATASET_DIR or ~/.ogbench/data, or else downloaded to it. Raises
    InputError where the download fails, saying which file to put where."""
    scene, kind, _ = parts(env_id)
    folder = os.environ.get("OGBENCH_DATASET_DIR") or "~/.ogbench/data"
    otherwise = "; or --dataset-path made, for data made here that are not OGBench's" if made_episodes(env_id) else ""
    return files.find_or_download(env_id, f"{DATASET_URL}/{scene}-{kind}-v0.npz", [folder], otherwise)


def made_episodes(env_id):
    """The number of episodes in the data that can be made here for env_id; None where they cannot."""
    return next((number for pattern, number in MADE_EPISODES.items() if re.fullmatch(pattern, env_id)), None)


def made_file(env_id):
    """Data for env_id in OGBench's layout that are made here on first use, in $PARL_CACHE (~/.cache/parl). Raises
    InputError where they cannot be."""
    num_episodes = made_episodes(env_id)
    if not num_episodes:
        expected = "expected a cube, or pointmaze-medium, -large or -giant with -navigate"
        raise InputError(f"--dataset-path made: no data can be made here for --env-id {env_id}; {expected}")
    file_name = f"{env_id}-made-{num_episodes}-v1.npz"
    return files.cached_file(file_name, lambda: make_dataset(env_id, num_episodes, EPISODE_STEPS))


def read_dataset(env_id, path):
    """The arrays of envs/files.py from OGBench's npz file `path`, relabelled by OGBench to env_id's task.

    An episode is terminal where OGBench's mask is 0, at success; OGBench's own terminals are its time limits. A state
    that follows a success is another episode. Raises InputError for a file that is not OGBench's, with the first bad
    index.
    """
    try:
        with np.load(path) as file:
            check_rows({key: file[key] for key in ("observations", "actions", "terminals", "qpos")}, path)
        data = ogbench.load_dataset(path, add_info=True)
        relabel_dataset(env_id, make(env_id), data)
    except InputError:  # of check_rows
        raise
    except (*files.UNREADABLE, IndexError) as error:
        reason = f"cannot be read as OGBench's ({files.one_line(error)})"
        expected = "expected its npz with observations, actions, terminals and qpos"
        raise InputError(f"dataset {path}: {reason}; {expected}") from error
    success = data["masks"] == 0
    kept = {key: data[key] for key in ("observations", "actions", "rewards", "next_observations")}
    return kept | {"terminals": success, "timeouts": data["terminals"].astype(bool) & ~success}


def check_rows(arrays, path):
    """Raises InputError unless the arrays of OGBench's file `path` have a row each for every state, of finite numbers,
    and an episode ends with the last. Here the index is that of the file: OGBench drops the last row of an episode."""
    for key, array in arrays.items():
        files.check_numbers(array, f"dataset {path}: {key}")
        if array.shape[:1] != arrays["observations"].shape[:1]:
            raise InputError(f"dataset {path}: {key} has shape {array.shape}; expected a row for each of observations")
    actions = arrays["actions"]
    files.refuse_rows(f"dataset {path}: actions", actions, np.abs(actions) > 1.002, "expected within [-1, 1]")
    if not arrays["terminals"].size or not arrays["terminals"][-1]:
        raise InputError(f"dataset {path}: terminals does not end with a 1; expected whole episodes")


def make_dataset(env_id, num_episodes, episode_steps, seed=0):
    """Episodes of an oracle that pursues one target after another, the same for the same seed.

    Returns arrays in OGBench's layout: observations (N, O), actions (N, A), terminals (N,), qpos (N, nq), an episode
    being episode_steps + 1 rows: its last one has the last state, and an action that is not used.
    """
    scene, kind, _ = parts(env_id)
    rng, task = np.random.default_rng(seed), make(env_id)
    task.reset(seed=seed)
    options = {"mode": "data_collection", "visualize_info": False} if scene.startswith("cube") else {}
    env = make_ogbench(f"{scene}-v0", terminate_at_goal=False, **options).unwrapped
    pursue = cube_oracle if scene.startswith("cube") else maze_oracle
    act = pursue(env, task.unwrapped, kind, rng)
    rows, total = [], num_episodes * episode_steps
    with (
        drawing_from(np.random.RandomState(seed)),  # for OGBench's oracles
        bar(f"making {env_id} data", "steps", total) as progress,
    ):
        for _ in range(num_episodes):
            obs, info = env.reset(seed=int(rng.integers(2**31)))
            for step in range(episode_steps + 1):
                action = np.clip(act(obs, info, step == 0), -1, 1)
                next_obs, _, _, _, info = env.step(action)
                rows.append((obs, action, step == episode_steps, info["prev_qpos"]))
                obs = next_obs
            progress.update(episode_steps)
    columns = zip(("observations", "actions", "terminals", "qpos"), zip(*rows, strict=True), strict=True)
    return {name: np.stack(values).astype(np.float32) for name, values in columns}


def cube_oracle(env, task, kind, rng):
    """Returns act(obs, info, first) -> action (5,): picks up one cube after another and puts it at its target.

    "play": OGBench's oracle that plans; "noisy": its Markov one, with noise on top whose scale is drawn per target.
    """
    oracle = CubePlanOracle(env=env) if kind == "play" else CubeMarkovOracle(env=env)
    goals = task.cur_task_info["goal_xyzs"]  # (cubes, 3)
    share = TASK_SHARE ** (1 / len(goals))  # one goal after another for all cubes, as often as one goal for one cube
    noise_scale = np.zeros(5)

    def set_target():
        _, info = env.set_new_target(p_stack=0.25)
        positions = np.stack([info[f"privileged/block_{i}_pos"] for i in range(len(goals))])
        unsolved = np.flatnonzero(np.linalg.norm(positions - goals, axis=1) > 0.04)
        if len(unsolved) == 0 or rng.random() > share:
            return info
        env._target_block = block = int(unsolved[np.argmin(goals[unsolved, 2])])  # stacks are built from below
        mocap = env._cube_target_mocap_ids[block]
        env._data.mocap_pos[mocap], env._data.mocap_quat[mocap] = goals[block], (1, 0, 0, 0)
        return env.get_reset_info()

    def act(obs, info, first):
        if first or oracle.done:
            oracle.reset(obs, info := set_target())
            noise_scale[:] = (kind == "noisy") * rng.uniform(0, 0.1) * np.array([1, 1, 1, 3, 10])
        return oracle.select_action(obs, info) + noise_scale * rng.standard_normal(5)

    return act


def maze_oracle(env, task, _kind, rng):
    """Returns act(obs, info, first) -> action (2,): drives between free cells along OGBench's shortest paths."""
    cells = [np.array(env.ij_to_xy(cell)) for cell in np.argwhere(env.maze_map == 0)]
    goal = np.zeros(2)

    def act(obs, info, first):
        if first or np.linalg.norm(goal - obs) < 0.5:
            goal[:] = task.cur_goal_xy if rng.random() < TASK_SHARE else cells[rng.integers(len(cells))]
        subgoal, _ = env.get_oracle_subgoal(obs, goal)
        return (subgoal - obs) / max(np.linalg.norm(subgoal - obs), 1e-6) + 0.5 * rng.standard_normal(2)

    return act
