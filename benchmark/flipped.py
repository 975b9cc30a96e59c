"""The control experiment: the default run with the critic's sign flipped wherever actions are ranked, moved and chosen.

python benchmark/flipped.py --num-eval-episodes 100 --run-dir runs/flipped-0
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import parl_diffusion as parl

optimize_actions = parl.optimize_actions


def optimize_actions_downhill(critic, obs, candidates, args, dataset_actions=None):
    def negated(obs, actions):
        q, logits = critic(obs, actions)
        return -q, logits

    return optimize_actions(negated, obs, candidates, args, dataset_actions)


if __name__ == "__main__":
    parl.optimize_actions = optimize_actions_downhill
    common.main(parl.train, parl.Args, parl.PRESETS, __doc__)
