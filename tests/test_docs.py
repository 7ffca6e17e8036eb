"""docs/ says what is so: its listings are files, and those files run."""

import re
from pathlib import Path
from typing import Final

import pytest
from support import Sandbox, until

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "design.md"]
GUIDE: Final = ROOT / "docs/writing-workers.md"
WRITING: Final = ROOT / "docs/examples/writing"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_listings_are_files(page: Path) -> None:
    """Each listing of Python code names the file that it is a copy of."""
    text = page.read_text()
    listings = re.findall(r"<!-- (\S+) -->\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(listings) == text.count("```python")
    for file, listing in listings:
        assert listing == (ROOT / file).read_text(), file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Each link is to a file of the repository."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        assert (page.parent / link).exists(), link


def example(sandbox: Sandbox, kind: str, attribute: str) -> None:
    sandbox.distribution(
        kind,
        {f"writing_{kind}": (WRITING / f"{kind}.py").read_text()},
        {"bghost.kinds": {kind: f"writing_{kind}:{attribute}"}},
    )


def test_the_poller(sandbox: Sandbox) -> None:
    """It lists, is told of another directory by a reload, and recovers from one that is not there."""
    (sandbox.root / "seven.7").touch()
    example(sandbox, "poller", "Poller")
    config = '[kind.poller]\nnaptime = 0.05\ndirectory = "{}"\n'
    sandbox.config(config.format("/nowhere"))
    host = sandbox.start_host("run", "poller")
    host.wait_line("CalledProcessError.*nowhere")
    sandbox.config(config.format(sandbox.root))
    assert sandbox.bghost("reload").code == 0
    host.wait_line(r"\[poller\] the longest name has \d+ characters")
    assert host.row("poller")["errors"] >= 1
    assert sandbox.bghost("stop", "poller").code == 0
    assert host.wait() == 0


def test_the_loop_of_ones_own(sandbox: Sandbox) -> None:
    """It has three rounds, one of which fails, and is done."""
    example(sandbox, "own_loop", "OwnLoop")
    result = sandbox.bghost("run", "own_loop")
    assert result.code == 0
    rounds = re.findall(r"\[own_loop\] (round .*)", result.stderr)
    assert rounds == ["round 1, woken by []", "round 2, woken by ['timeout']", "round 3, woken by ['timeout']"]


def test_the_fetcher(sandbox: Sandbox) -> None:
    """It takes what its task produces, and is done."""
    example(sandbox, "fetcher", "Fetcher")
    result = sandbox.bghost("run", "fetcher")
    assert result.code == 0
    assert re.findall(r"\[fetcher\] (fetched .*)", result.stderr) == ["fetched 0", "fetched 1", "fetched 2"]


def test_the_pool(sandbox: Sandbox) -> None:
    """The dispatcher keeps its consumers running, and is told of the one that dies."""
    sandbox.distribution(
        "pools",
        {"writing_pools": (WRITING / "pools.py").read_text()},
        {"bghost.kinds": {"dispatcher": "writing_pools:Dispatcher", "consumer": "writing_pools:Consumer"}},
    )
    host = sandbox.start_host("run", "dispatcher")
    host.wait_line(r"\[dispatcher\] queue 1 is ready, \d+ done")
    (expected,) = re.findall(r"\$ bghost dump --pools\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    stays = [line for line in expected.splitlines() if line.startswith(("  lock", "  0: ", "  2: "))]

    def shown() -> list[str]:
        """As the guide has it; queue 2 dies again and again."""
        text = re.sub(r"\d+(?= times)", "N", re.sub(r"\d+s ago", "TIME ago", sandbox.bghost("dump", "--pools").stdout))
        return [line for line in re.sub(r"pid \d+", "pid PID", text).splitlines() if line in expected.splitlines()]

    until(lambda: set(stays) <= set(shown()))
    assert len(stays) == 3
    host.wait_line(r"the consumer of queue 2 died after 2 units: SystemExit: queue 2 cannot be consumed")
    assert sandbox.bghost("shutdown").code == 0
    assert host.wait() == 0


def test_the_async_pool(sandbox: Sandbox) -> None:
    """The group of the tens takes two; both come to their end, and their data is there."""
    sandbox.distribution(
        "pools",
        {"writing_pools": (WRITING / "pools_async.py").read_text()},
        {
            "bghost.kinds": {
                "dispatcher": "writing_pools:AsyncDispatcher",
                "quick_consumer": "writing_pools:QuickConsumer",
            }
        },
    )
    result = sandbox.bghost("run", "dispatcher")
    assert result.code == 0, result.stderr
    assert "group 0 of pool quick has 2 entries, as many as it may" in result.stderr
    assert re.findall(r"\[dispatcher\] (queue .*)", result.stderr) == ["queue 1: 5 done", "queue 2: 5 done"]


def test_the_queue(sandbox: Sandbox) -> None:
    """All that the producer sends comes to the summer, whichever of them is there first."""
    sandbox.distribution(
        "queues",
        {"writing_queues": (WRITING / "queues.py").read_text()},
        {"bghost.kinds": {"producer": "writing_queues:Producer", "summer": "writing_queues:Summer"}},
    )
    result = sandbox.bghost("run", "producer", "summer")
    assert result.code == 0, result.stderr
    assert "the sum is 49995000" in result.stderr


def test_the_table_answers_each_difference() -> None:
    """The guide answers one by one what the proposal for helpers lists as different."""
    text = (ROOT / "docs/writing-workers.md").read_text()
    for difference in (
        "error recovery",
        "application name",
        "signal handlers",
        "interrupts",
        "main loop",
        "config reload",
        "stats",
        "life cycle",
    ):
        assert f"| **{difference}** |" in text
