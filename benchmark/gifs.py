"""An episode of the clone and one after PA-RL, side by side from the same start: benchmark/NAME.gif.

python benchmark/gifs.py drawer runs/gif_drawer    # a whole run with --capture-video
"""

import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image

HERE = Path(__file__).parent
HEIGHT, MOST_FRAMES, COLOURS = 200, 60, 128


def last(folders):
    """That of the evaluation after the most steps."""
    return max(folders, key=lambda folder: int(folder.name.split("-")[1]))


def frames_of(folder, episode):
    """Frames (L, H, W, 3) of an episode of an evaluation, which --capture-video left in folder."""
    return imageio.imread(sorted(folder.glob("episode-*.mp4"))[episode])


def side_by_side(before, after):
    """Pictures of both at the same times; the shorter episode stays at its last frame."""
    length = max(len(before), len(after))
    for time in range(0, length, -(-length // MOST_FRAMES)):
        pair = [frames[min(time, len(frames) - 1)] for frames in (before, after)]
        picture = Image.fromarray(np.concatenate(pair, 1))
        yield picture.resize((picture.width * HEIGHT // picture.height, HEIGHT)).quantize(
            COLOURS, Image.Quantize.FASTOCTREE
        )


def main(name, run, episode=0):
    before, after = (last(Path(run).glob(f"videos/{phase}-*")) for phase in ("bc", "o[nf]*line"))
    first, *others = side_by_side(frames_of(before, int(episode)), frames_of(after, int(episode)))
    first.save(HERE / f"{name}.gif", save_all=True, append_images=others, duration=80, loop=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
