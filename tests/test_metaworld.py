"""Meta-World: tasks, resets, success, demonstrations, images."""

import numpy as np
import pytest
from metaworld.env_dict import ENV_CLS_MAP
from metaworld.policies import ENV_POLICY_MAP

import envs
from common import InputError
from envs import metaworld, opengl
from envs.files import DATASET_KEYS

DRAWER, PICK = "metaworld-drawer-open", "metaworld-pick-place"


def rollout(env, policy, seed, max_steps=200, sign=1.0):
    """Observations, rewards and infos of one episode of a scripted expert, up to and with its first success."""
    observations, rewards, infos = [env.reset(seed=seed)[0]], [], []
    while len(rewards) < max_steps and not (infos and infos[-1]["success"]):
        action = sign * np.clip(metaworld.expert_action(policy, observations[-1]), -1, 1).astype(np.float32)
        obs, reward, *_, info = env.step(action)
        observations.append(obs)
        rewards.append(reward)
        infos.append(info)
    return np.stack(observations), np.array(rewards), infos


def test_all_tasks_have_a_class_an_expert_and_an_instruction():
    tasks = {name.removesuffix("-v3") for name in ENV_CLS_MAP}
    assert len(metaworld.IDS) == 50 and set(metaworld.INSTRUCTIONS) == tasks
    assert {name.removesuffix("-v3") for name in ENV_POLICY_MAP} == tasks
    assert len(set(metaworld.INSTRUCTIONS.values())) == 50  # no two tasks are told the same
    assert metaworld.INSTRUCTIONS["drawer-open"] == "open the drawer"
    assert {envs.family_module(env_id) for env_id in metaworld.IDS} == {metaworld}


def test_all_tasks_give_demonstrations():
    for env_id in metaworld.IDS:
        episode = next(metaworld.demonstrations(env_id))
        length = len(episode["actions"])
        assert 1 <= length <= 200 and episode["observations"].shape == (length + 1, 39), env_id
        assert np.isfinite(episode["observations"]).all() and np.abs(episode["actions"]).max() <= 1, env_id
        assert np.ptp(episode["observations"][:, :3], axis=0).max() > 0.01, env_id  # the hand moves


def test_unknown_tasks_are_refused_with_near_misses():
    for call in (envs.dataset_file, envs.make):
        with pytest.raises(InputError, match=r"metaworld-drawer-opn: .* did you mean metaworld-drawer-open"):
            call("metaworld-drawer-opn")
    with pytest.raises(InputError, match=r"^--env-id metaworld-z+: none of metaworld's ids; expected an id like"):
        envs.make("metaworld-" + 30 * "z")


@pytest.mark.parametrize("env_id", [DRAWER, PICK, "metaworld-stick-pull"])
def test_spaces_and_observations(env_id):
    env = envs.make(env_id, sparse=True)
    assert env.observation_space.shape == (39,) and env.observation_space.dtype == np.float32
    assert env.action_space.shape == (4,) and (env.action_space.high == 1).all() and (env.action_space.low == -1).all()
    assert env.get_wrapper_attr("_max_episode_steps") == 200
    first, info = env.reset(seed=0)
    obs = env.step(np.array([1, 0, 0, 0], np.float32))[0]
    assert first.dtype == obs.dtype == np.float32 and info == {"success": False}
    simulation = env.unwrapped
    assert np.allclose(obs[:3], simulation.data.body("hand").xpos, atol=1e-6)
    assert np.array_equal(obs[18:36], first[:18])  # the step before
    for observation in (first, obs):  # the goal is there, not the zeros of Meta-World's default
        assert np.allclose(observation[36:], simulation._target_pos, atol=1e-6) and observation[36:].any()


@pytest.mark.parametrize("env_id", [DRAWER, PICK])
def test_resets_depend_on_the_seed_alone(env_id):
    env, other = metaworld.make(env_id), metaworld.make(env_id)
    expert = ENV_POLICY_MAP[env_id.removeprefix("metaworld-") + "-v3"]()
    state = np.random.get_state()[1].copy()
    other.reset(seed=7)
    rollout(other, expert, seed=8, max_steps=60)  # the next reset starts from another simulation
    one, again = rollout(env, expert, seed=3, max_steps=60)[0], rollout(other, expert, seed=3, max_steps=60)[0]
    assert np.array_equal(one, again)
    assert np.array_equal(np.random.get_state()[1], state)
    second, _ = env.reset()
    assert not np.array_equal(second, one[0])  # without a seed: the next draw, not the same again
    starts = np.stack([env.reset(seed=seed)[0] for seed in range(5)])
    assert (np.ptp(starts[:, [4, 36]], axis=0) > 0.02).all()  # x of object and goal


@pytest.mark.parametrize("env_id", [DRAWER, PICK])
def test_experts_succeed_and_success_is_the_reward(env_id):
    env, expert = metaworld.make(env_id), ENV_POLICY_MAP[env_id.removeprefix("metaworld-") + "-v3"]()
    for seed in range(3):
        _, rewards, infos = rollout(env, expert, seed)
        assert infos[-1]["success"] is True and len(rewards) < 150
        assert (rewards[:-1] == 0).all() and rewards[-1] == 1
    _, rewards, infos = rollout(env, expert, 0, sign=-1.0)
    assert infos[-1]["success"] is False and (rewards == 0).all() and len(rewards) == 200


def test_success_ends_sparse_episodes_and_the_time_limit_the_others():
    policy, limits = ENV_POLICY_MAP["pick-place-v3"](), {}
    for sparse in (True, False):
        env = envs.make(PICK, sparse)
        obs, _ = env.reset(seed=0)
        ends = [False, False]
        for _ in range(100):
            action = np.clip(metaworld.expert_action(policy, obs), -1, 1).astype(np.float32)
            obs, reward, *ends, info = env.step(action)
            if info["success"]:
                break
        limits[sparse] = ends
        assert info["success"] and reward == 1
    assert limits == {True: [True, False], False: [False, False]}
    env.reset(seed=0)
    ends = [env.step(np.zeros(4, np.float32))[2:4] for _ in range(200)]
    assert ends[-1] == (False, True) and ends[-2] == (False, False)


def test_demonstrations_are_deterministic_and_half_succeed():
    """Noise that fell after a success would leave four fifths or more of them successful."""
    data, again, other = (
        metaworld.generate(DRAWER, 6000),
        metaworld.generate(DRAWER, 600),
        metaworld.generate(DRAWER, 9, 1),
    )
    assert all(np.array_equal(data[key][: len(again[key])], again[key]) for key in DATASET_KEYS)
    assert not np.array_equal(data["actions"][:9], other["actions"][:9])
    assert np.abs(data["actions"]).max() <= 1 and data["observations"].dtype == data["actions"].dtype == np.float32
    ends = np.flatnonzero(data["terminals"] | data["timeouts"])
    lengths = np.diff(np.concatenate([[-1], ends]))
    assert ends[-1] == len(data["rewards"]) - 1 and lengths.max() == 200
    assert 0.3 < data["terminals"][ends].mean() < 0.65
    assert np.array_equal(data["rewards"] == 1, data["terminals"])  # success is the end, and it alone pays
    assert (lengths[data["timeouts"][ends]] < 100).any()  # some stop early
    inside = np.setdiff1d(np.arange(len(data["rewards"])), ends)
    assert np.array_equal(data["observations"][inside + 1], data["next_observations"][inside])


def test_dataset_is_made_once_and_loads(monkeypatch, capsys):
    monkeypatch.setattr(metaworld, "NUM_TRANSITIONS", 1500)
    path = metaworld.dataset_file(DRAWER)
    assert "demonstrations succeed" in capsys.readouterr().out
    written = path.stat().st_mtime_ns
    buffer = envs.load_dataset(DRAWER, None, 1.0, -1.0, 0.99, sparse=True)
    out = capsys.readouterr().out
    assert path.stat().st_mtime_ns == written and out.startswith(f"dataset {path}: ") and out.count("\n") == 1
    assert 1500 <= len(buffer) < 1700
    success = buffer.rewards == 0
    assert success.any() and np.array_equal(buffer.masks == 0, success)
    assert np.allclose(buffer.mc_returns[success], 0) and buffer.mc_returns.min() == pytest.approx(-100)
    last = np.flatnonzero(success)[0]
    assert buffer.mc_returns[last - 2] == pytest.approx(-1.99)


# ---------------------------------------------------------------- images


@pytest.fixture
def draws():
    try:
        opengl.context()
    except InputError as error:
        pytest.skip(str(error))


def test_images(draws):
    env = metaworld.Images(metaworld.make(PICK), 48)
    obs, _ = env.reset(seed=0)
    first = obs["image"].copy()
    assert env.observation_space.contains(obs) and first.shape == (48, 48, 3) and first.dtype == np.uint8
    assert np.array_equal(env.reset(seed=0)[0]["image"], first)
    assert not np.array_equal(env.reset(seed=1)[0]["image"], first)  # puck and goal moved
    top, bottom = first[2, -12].astype(int), first[-3, 24].astype(int)  # grey background above, a brown table below
    assert np.ptp(top) < 15 and bottom[0] > bottom[2] + 30
    red = (first[..., 0] > 2.0 * first[..., 2]) & (first[..., 0] > 100)
    assert red[:, :24].sum() > 3 * red[:, 24:].sum()  # the robot stands on the left
    env.reset(seed=0)
    for _ in range(10):
        obs, *_, info = env.step(np.array([0, 0, 1, 0], np.float32))
    assert not np.array_equal(obs["image"], first) and info["success"] is False
    rows = [np.argwhere((image.min(-1) > 200)[:, :30])[:, 0] for image in (first, obs["image"])]  # the white finger
    assert rows[1].mean() < rows[0].mean() - 1  # up is up


def test_cameras_do_not_disturb_each_other(draws):
    env = metaworld.make_images(PICK, 32)
    image = env.reset(seed=0)[0]["image"]
    other = metaworld.make_images(DRAWER, 64)
    other.reset(seed=0)
    assert np.array_equal(env.reset(seed=0)[0]["image"], image)
    del other
    assert np.array_equal(env.reset(seed=0)[0]["image"], image) and image.std() > 10
    video = env.render()
    assert video.shape == (256, 256, 3) and video.std() > 10
    assert np.array_equal(env.reset(seed=0)[0]["image"], image)


def test_demonstrations_with_images(draws):
    with_images = next(metaworld.demonstrations(PICK, image_size=16))
    again = next(metaworld.demonstrations(PICK, image_size=8))
    assert with_images["images"].shape == (len(with_images["actions"]) + 1, 16, 16, 3)
    assert all(np.array_equal(with_images[key], value) for key, value in again.items() if key != "images")
    assert not np.array_equal(with_images["images"][0], with_images["images"][-1])


def test_with_images_an_action_lasts_four_steps(draws):
    """Time limit, observations and success are those of four steps of the environment without images."""
    env, plain, expert = metaworld.make_images(DRAWER, 8), metaworld.make(DRAWER), ENV_POLICY_MAP["drawer-open-v3"]()
    obs, state, success = env.reset(seed=0)[0], plain.reset(seed=0)[0], False
    while not success:
        assert np.array_equal(obs["state"], state)
        action = np.clip(metaworld.expert_action(expert, state), -1, 1).astype(np.float32)
        obs, reward, *_, info = env.step(action)
        for _ in range(4):
            state, *_, plain_info = plain.step(action)
            if success := plain_info["success"]:
                break
        assert info["success"] == success and reward == success
    env.reset(seed=0)
    ends = [env.step(np.zeros(4, np.float32))[3] for _ in range(50)]
    assert ends[-1] and not any(ends[:-1])
