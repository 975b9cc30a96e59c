"""Meta-World (Yu et al., 2019): 50 tabletop tasks of one robot arm, `metaworld-{task}`, with sparse success rewards.

observation (39,): position of the hand in m, opening of the gripper in [0, 1], position and quaternion of up to two
objects (18 numbers, absent ones 0), the same one step earlier, position of the goal in m. action (4,) in [-1, 1]:
motion of the hand's target in cm per step of 12.5 ms, force of the gripper. Demonstrations are made here, by noisy
scripted experts; camera images come from `make_images` and `demonstrations`.
"""

import warnings

import gymnasium as gym
import mujoco
import numpy as np
from metaworld.env_dict import ENV_CLS_MAP
from metaworld.policies import ENV_POLICY_MAP

from common import bar
from envs import files, opengl

INSTRUCTIONS = {  # task: what a language-conditioned policy is told
    "assembly": "put the ring onto the peg",
    "basketball": "put the basketball into the hoop",
    "bin-picking": "move the block from one bin to the other",
    "box-close": "put the lid on the box",
    "button-press": "push the button in",
    "button-press-topdown": "press the button down",
    "button-press-topdown-wall": "press the button behind the wall down",
    "button-press-wall": "reach over the wall and push the button in",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "close the faucet",
    "faucet-open": "open the faucet",
    "hammer": "hammer the nail into the wall",
    "hand-insert": "push the hand into the hole",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle on the side down",
    "handle-pull": "pull the handle up",
    "handle-pull-side": "pull the handle on the side up",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "insert the peg into the hole on the side",
    "peg-unplug-side": "pull the plug out of the socket",
    "pick-out-of-hole": "pick the puck out of the hole",
    "pick-place": "pick up the puck and hold it at the goal",
    "pick-place-wall": "pick up the puck and hold it at the goal behind the wall",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-back": "slide the plate out of the cabinet",
    "plate-slide-back-side": "slide the plate sideways out of the cabinet",
    "plate-slide-side": "slide the plate sideways into the cabinet",
    "push": "push the puck to the goal",
    "push-back": "pull the puck back to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach": "reach the goal",
    "reach-wall": "reach the goal behind the wall",
    "shelf-place": "put the puck onto the shelf",
    "soccer": "push the ball into the net",
    "stick-pull": "pull the box with the stick",
    "stick-push": "push the box with the stick",
    "sweep": "sweep the puck off the table",
    "sweep-into": "sweep the puck into the hole",
    "window-close": "close the window",
    "window-open": "open the window",
}
IDS = tuple(f"metaworld-{task}" for task in INSTRUCTIONS)

TIME_LIMIT = 200  # steps; Meta-World's is 500, but its experts, when they succeed, do so within about 160
NUM_TRANSITIONS = 40_000  # of the dataset
IMAGE_REPEAT = 4  # with images an action lasts so many steps: an image and a large policy are slow
NUM_IMAGE_TRANSITIONS = 1200  # of the dataset with images
CAMERA = "corner4"  # above the table's corner, facing the robot
VIDEO_SIZE = 256  # pixels


def task_of(env_id):
    return env_id.removeprefix("metaworld-")


# ======================================== ENVIRONMENT ========================================


class MetaWorld(gym.Wrapper):
    """A task whose objects and goal are drawn anew at every reset, and are observed. Reward 1 at success, else 0; it
    does not end there. info["success"] is a bool. `instruction`: what to do, in words. repeat: steps per action."""

    def __init__(self, task, repeat=1):
        env = ENV_CLS_MAP[f"{task}-v3"]()
        env._set_task_called, env.seeded_rand_vec = True, True  # positions come from env.np_random, not a list of tasks
        env._partially_observable = False  # the goal is observed,
        del env.sawyer_observation_space  # so the bounds cached without it must go
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float32)
        self.instruction, self.repeat, self.camera = INSTRUCTIONS[task], repeat, None

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.env.np_random = np.random.default_rng(seed)
        self.env._freeze_rand_vec = False
        self.env.reset_model()  # draws the positions
        self.env._freeze_rand_vec = True
        obs, _ = self.env.reset()  # a pass reads positions that only the one before has set
        return obs.astype(np.float32), {"success": False}

    def step(self, action):
        for _ in range(self.repeat):
            obs, _, _, _, info = self.env.step(action)
            if success := bool(info["success"]):
                break
        return obs.astype(np.float32), float(success), False, False, {**info, "success": success}

    def render(self):
        """The scene, (VIDEO_SIZE, VIDEO_SIZE, 3) uint8. Raises InputError where OpenGL is missing."""
        self.camera = self.camera or Camera(self.env.model, self.env.data, VIDEO_SIZE)
        return self.camera.image()


class Camera:
    """Images of a simulation, drawn off screen. Raises InputError where OpenGL is missing.

    Shadows, reflections and multi-sampling are off: with them drawing takes ten times as long without a GPU.
    """

    def __init__(self, model, data, size):
        self.model, self.data = model, data
        model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        opengl.context().make_current()
        self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        self.scene, self.options = mujoco.MjvScene(model, 1000), mujoco.MjvOption()
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.scene.flags[flag] = 0
        self.view, self.perturbation = mujoco.MjvCamera(), mujoco.MjvPerturb()
        self.view.type, self.view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera(CAMERA).id
        self.pixels, self.viewport = np.zeros((size, size, 3), np.uint8), mujoco.MjrRect(0, 0, size, size)

    def image(self):
        """The scene as it is now, (size, size, 3) uint8, the top row first."""
        opengl.context().make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        scene = (self.model, self.data, self.options, self.perturbation, self.view, mujoco.mjtCatBit.mjCAT_ALL)
        mujoco.mjv_updateScene(*scene, self.scene)
        mujoco.mjr_render(self.viewport, self.scene, self.context)
        mujoco.mjr_readPixels(self.pixels, None, self.viewport, self.context)
        return self.pixels[:, ::-1].copy()  # OpenGL's first row is the bottom one; but the camera hangs upside down


class Images(gym.Wrapper):
    """Observations {"image": (size, size, 3) uint8, "state": (O,) float32} of a MetaWorld environment."""

    def __init__(self, env, size):
        super().__init__(env)
        self.image_camera = Camera(env.unwrapped.model, env.unwrapped.data, size)
        image_space = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict({"image": image_space, "state": env.observation_space})

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return {"image": self.image_camera.image(), "state": obs}, info

    def step(self, action):
        obs, *others = self.env.step(action)
        return {"image": self.image_camera.image(), "state": obs}, *others


def make(env_id, render=False, repeat=1):
    """The environment `env_id`, with its time limit of 200 steps. render: fail now if it cannot draw. repeat: steps
    that an action lasts.

    Raises InputError for render without OpenGL.
    """
    env = MetaWorld(task_of(env_id), repeat)
    if render:
        opengl.context()
    return gym.wrappers.TimeLimit(env, TIME_LIMIT // repeat)


def make_images(env_id, size):
    """As `make`, with observations {"image": (size, size, 3) uint8, "state": (39,) float32} and actions that last
    IMAGE_REPEAT steps."""
    return Images(make(env_id, repeat=IMAGE_REPEAT), size)


# ======================================== DEMONSTRATIONS ========================================


def demonstrations(env_id, seed=0, image_size=0):
    """Episodes of the scripted expert of `env_id`, without end and the same for the same seed.

    Gaussian noise on its actions rises by a tenth after a success and falls after a failure, so that in every task
    about half of the episodes succeed (with images, harder to clone, two thirds); an episode's scale is half to one and
    a half times that. Every fifth or so stops early, after 20 to 100 steps.

    Yields dicts of observations (L + 1, 39) float32, actions (L, 4) float32, rewards (L,) and masks (L,) float32,
    success (bool: it ends the episode), and with an image_size images (L + 1, image_size, image_size, 3) uint8; there
    an action lasts IMAGE_REPEAT steps.
    """
    task = task_of(env_id)
    env, expert = make_images(env_id, image_size) if image_size else make(env_id), ENV_POLICY_MAP[f"{task}-v3"]()
    rng, noise = np.random.default_rng(seed), 0.5
    while True:
        scale, stops_early = noise * rng.uniform(0.5, 1.5), rng.random() < 0.2
        max_length = (int(rng.integers(20, 100)) if stops_early else TIME_LIMIT) // (IMAGE_REPEAT if image_size else 1)
        observations, actions, success = [env.reset(seed=int(rng.integers(2**31)))[0]], [], False
        while not success and len(actions) < max_length:
            state = observations[-1]["state"] if image_size else observations[-1]
            action = expert_action(expert, state) + scale * rng.standard_normal(4)
            actions.append(np.clip(action, -1, 1).astype(np.float32))
            obs, _, _, _, info = env.step(actions[-1])
            observations.append(obs)
            success = info["success"]
        if not stops_early:
            noise *= 1.1 if success else 1 / (1.25 if image_size else 1.1)
        episode = {"actions": np.stack(actions), "success": success}
        if image_size:
            episode["images"] = np.stack([obs["image"] for obs in observations])
            observations = [obs["state"] for obs in observations]
        episode["observations"], episode["rewards"] = np.stack(observations), np.zeros(len(actions), np.float32)
        episode["rewards"][-1] = success
        yield episode | {"masks": 1 - episode["rewards"]}


def expert_action(expert, obs):
    """obs (39,) -> action (4,) of a scripted expert, not clipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its actions are out of bounds
        return expert.get_action(obs)


def generate(env_id, num_transitions, seed=0, image_size=0):
    """Demonstrations of at least num_transitions steps as the arrays of a dataset file; with an image_size their
    observations are images."""
    data = {name: [] for name in files.DATASET_KEYS}
    num_steps, successes = 0, []
    with bar(f"making {env_id} data", "steps", num_transitions) as progress:
        for episode in demonstrations(env_id, seed, image_size):
            ends = np.arange(len(episode["actions"])) == len(episode["actions"]) - 1
            observations = episode["images" if image_size else "observations"]
            data["observations"].append(observations[:-1])
            data["next_observations"].append(observations[1:])
            data["actions"].append(episode["actions"])
            data["rewards"].append(episode["rewards"])
            data["terminals"].append(ends & episode["success"])
            data["timeouts"].append(ends & (not episode["success"]))
            successes.append(episode["success"])
            num_steps += len(ends)
            progress.update(len(ends))
            if num_steps >= num_transitions:
                break
    print(f"{env_id}: {np.mean(successes):.0%} of {len(successes)} demonstrations succeed")
    return {name: np.concatenate(values) for name, values in data.items()}


def dataset_file(env_id, image_size=0):
    """The demonstrations of `env_id` in $PARL_CACHE (~/.cache/parl), made on first use in about a minute."""
    if image_size:
        name = f"{env_id}-{NUM_IMAGE_TRANSITIONS}-{image_size}px-v1.npz"
        return files.cached_file(name, lambda: generate(env_id, NUM_IMAGE_TRANSITIONS, image_size=image_size))
    return files.cached_file(f"{env_id}-{NUM_TRANSITIONS}-v1.npz", lambda: generate(env_id, NUM_TRANSITIONS))
