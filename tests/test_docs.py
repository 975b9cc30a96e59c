"""README.md, CONTRIBUTING.md and docs/: what they link, name and list is in the repository, and the reverse."""

import contextlib
import dataclasses
import importlib
import operator
import re
from functools import cache

import pytest
from conftest import ROOT, SCRIPTS

import common

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("envs/*.py")]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.fixture(params=PAGES, ids=NAMES)
def page(request):
    return request.param


@cache
def prose(page):
    """A page without its blocks of code and of mathematics."""
    return re.sub(r"^(```|\$\$).*?^\1$", "", page.read_text(), flags=re.M | re.S)


def links(page):
    """(file, anchor) of each relative link and image."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if not re.match(r"\w+:", target):
            name, _, anchor = target.partition("#")
            yield (page.parent / name).resolve() if name else page, anchor


def anchors(page):
    """What GitHub makes of a page's headings: lower case, punctuation dropped, a space a hyphen."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def code(page):
    """The inline code of a page, a string each."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def missing_links(page):
    for file, anchor in links(page):
        if not file.exists() or ROOT not in file.parents:
            yield f"{file} does not exist"
        elif anchor and anchor not in anchors(file):
            yield f"{file} has no heading #{anchor}"


def test_no_link_is_dead(page):
    assert list(missing_links(page)) == []


def test_a_dead_link_is_found(tmp_path):
    """The check itself: a missing file, a missing heading; not what stands in code, nor another site."""
    page = tmp_path / "page.md"
    page.write_text(
        "# One: `two`, three\n[`a`](#one-two-three) [b](#four) [c](gone.md) [d](https://x.org/#y) `[e](f)`\n"
        "```\n[g](h.md)\n# four\n```\n"
    )
    assert sorted(anchors(page)) == ["one-two-three"]
    assert list(links(page)) == [(page, "one-two-three"), (page, "four"), (tmp_path / "gone.md", "")]


def test_every_page_table_and_plot_is_reachable_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        if (file := waiting.pop()) not in reached:
            reached.add(file)
            waiting += [target for target, _ in links(file)] if file.suffix == ".md" else []
    made = [*ROOT.glob("benchmark/*.md"), *ROOT.glob("benchmark/*.png")]
    assert sorted(str(file.relative_to(ROOT)) for file in {*PAGES, *made} - reached) == []


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def test_the_readme_has_the_commands_of_ci():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in ("pip install -r requirements.txt", "python -m pytest"):
        assert command in readme and command in ci.replace(" --quiet", ""), command


def test_every_column_is_explained():
    """In a table's first cell, and no column is explained that there is none of."""
    first_cells = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    explained = [name for cell in first_cells for name in re.findall(r"`([a-z_]+/[a-z_0-9]+)`", cell)]
    explained += [name for name in common.COLUMNS if any(cell == f"`{name}`" for cell in first_cells)]
    assert [name for name in common.COLUMNS if name not in explained] == []
    assert [name for name in explained if name not in common.COLUMNS] == []


def test_every_difference_is_listed():
    """Each NOTE(differs) tag of the code, one line each, stands word for word in docs/algorithm.md, and no other."""
    text = (ROOT / "docs" / "algorithm.md").read_text()
    notes = {note for path in SOURCES for note in re.findall(r"NOTE\(differs\): (.*)", path.read_text())}
    listed = re.findall(r"^- (.*)$", text[text.index("## Where this differs") :], re.M)
    assert len(notes) > 10 and sorted(listed) == sorted(notes)


@cache
def words():
    """Every word of the code."""
    return {word for path in SOURCES for word in re.findall(r"\w+", path.read_text())}


def is_function(name):
    """Has a script "ascend", "DiffusionPolicy.loss" or "common.mc_returns"?"""
    for script in SCRIPTS:
        with contextlib.suppress(AttributeError):
            return callable(operator.attrgetter(name)(importlib.import_module(script)))
    return False


def test_every_function_of_the_algorithm_exists():
    """Functions are written `name()`, of which sample() and loss() are each policy's."""
    named = set(re.findall(r"`([\w.]+)\(\)`", prose(ROOT / "docs" / "algorithm.md"))) - {"sample", "loss"}
    assert {"rerank", "ascend", "optimize_actions", "choose", "act", "critic_loss", "hl_gauss"} <= named
    assert [name for name in sorted(named) if not is_function(name)] == []
    assert not is_function("no_such_function") and not is_function("DiffusionPolicy.no_such")


def test_every_name_in_code_exists(page):
    """A name of the code (`sample_cache_gb`, `SampleStore`) that was changed there is changed here."""
    names = [name for name in code(page) if re.fullmatch(r"[A-Za-z]\w*_\w+|[A-Z]\w*[a-z]\w*", name)]
    assert [name for name in names if name not in words()] == []


def test_every_flag_exists(page):
    known = {"help", "index-url", "no-deps", "nproc-per-node", "max-restarts", "check"}  # of tyro, pip, torchrun, ruff
    known |= {"repeats", "growth", "start", "seeds", "sweep", "out"}  # of programs in benchmark/
    known |= {"gres", "cpus-per-task", "mem", "time", "signal", "array", "requeue", "output", "open-mode"}  # of sbatch
    for script in SCRIPTS:
        known |= {field.name.replace("_", "-") for field in dataclasses.fields(importlib.import_module(script).Args)}
    given = set(re.findall(r"(?<![\w-])--([a-z][a-z-]*)", page.read_text()))
    assert sorted(flag for flag in given if flag not in known and flag.removeprefix("no-") not in known) == []


def test_every_file_that_is_named_exists(page):
    """Files of the repository, wherever they are named; NAMES in capitals stand for any."""
    named = re.findall(
        r"(?<![\w/.-])((?:benchmark|tests|envs|docs|parl_|common)[a-z_0-9/]*\.(?:py|md|txt|sh|csv))", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()] == []


def test_mathematics_is_what_github_renders(page):
    """Markdown comes first: it takes \\{ for {, a _ that follows no letter for emphasis, a | for a table's border."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)
    blocks = re.findall(r"^\$\$\n(.*?)\n\$\$$", text, re.M | re.S)
    assert text.count("$$") == 2 * len(blocks) and all("\n\n" not in block for block in blocks)
    rest = re.sub(r"^\$\$\n.*?\n\$\$$", "", text, flags=re.M | re.S)
    inline = re.findall(r"(?<![\w$])\$(?! )([^$\n]+?)(?<! )\$(?![\w$])", rest)
    assert rest.count("$") == 2 * len(inline), "a $ that opens or closes nothing"
    for formula in [*blocks, *inline]:
        assert not re.search(r"\\[^A-Za-z]|[^A-Za-z]_|[*<>|~#]|\]\(", formula), formula
        assert formula.count("{") == formula.count("}"), formula
        assert len(re.findall(r"\\left\b", formula)) == len(re.findall(r"\\right\b", formula)), formula
