"""parl_gaussian, parl_diffusion and parl_transformer are byte-identical but for what is their policy's: four hunks.

python tests/parallel.py parl_diffusion    # copies everything else from this script into the other two
"""

import re
import sys
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARALLEL = ["parl_diffusion", "parl_gaussian", "parl_transformer"]
HUNKS = [
    r"(?<=\n)The policy here is .*?(?=\"\"\"\n)",  # the docstring's policy lines
    r"(?<=\n    # policy\n).*?(?=\n\n)",  # the policy flags, last in Args
    r"(?<== POLICY ={40}\n).*?(?=# =+ CRITIC =)",  # the POLICY section
    r"(?<=\n)        self\.policy = \w+Policy\(obs_dim, act_dim, args\)\.to\(device\)(?=\n)",  # what constructs it
]


def split(source):
    """A script's text as five parts that are shared and the four hunks between them. Raises ValueError."""
    shared, own, rest = [], [], source
    for hunk in HUNKS:
        found = re.findall(hunk, rest, re.S)
        if len(found) != 1:
            raise ValueError(f"{len(found)} places match {hunk}; expected 1")
        before, rest = rest.split(found[0], 1)
        shared, own = [*shared, before], [*own, found[0]]
    return [*shared, rest], own


def merged(shared, own):
    return shared[0] + "".join(hunk + part for hunk, part in zip(own, shared[1:], strict=True))


def first_difference(names, sources):
    """'' or the first line in which two parallel scripts differ outside of the four hunks."""
    numbered = []
    for source in sources:
        (shared, own), lines, number = split(source), [], 1
        for part, hunk in zip_longest(shared, own, fillvalue=""):
            lines += [(number + i, line) for i, line in enumerate(part.split("\n"))]
            number += part.count("\n") + hunk.count("\n")
        numbered.append(lines)
    for one, two in zip_longest(*numbered, fillvalue=(0, "nothing")):
        if one[1] != two[1]:
            places = zip(names, (one, two), strict=True)
            return "\n".join(f"{name}.py:{number}: {line}" for name, (number, line) in places)
    return ""


if __name__ == "__main__":
    (source,) = sys.argv[1:]
    shared, _ = split((ROOT / f"{source}.py").read_text())
    for name in set(PARALLEL) - {source}:
        path = ROOT / f"{name}.py"
        path.write_text(merged(shared, split(path.read_text())[1]))
