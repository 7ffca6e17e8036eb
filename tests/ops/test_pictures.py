"""The pictures of docs/ show what ``bghost ps`` and ``bghost top`` do. BGHOST_PICTURES=1 has this make them anew."""

import html
import io
import os
import re
import time
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text
from support import Host, StartHost, until

from bghost.commands.top import HISTORY, Top

PICTURES: Final = Path(__file__).resolve().parents[2] / "docs/pictures"
WIDTH: Final = 124

COUNTER: Final = """
    import random
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            with worker.activity("update counted set n = n + 1"):
                worker.wait(random.uniform(0.001, 0.02))
            return random.choice([0.005, 0.01, 0.05, 0.3])
"""
MAIL: Final = """
    import bghost

    class Kind:
        @bghost.hookimpl
        def bghost_tick(self, worker):
            raise bghost.GiveUp("no route to the relay")
"""
CONFIG: Final = """
    [[worker]]
    kind = "counter"
    count = 3
    [[worker]]
    kind = "exec"
    name = "web"
    args.command = ["sleep", "1000"]
    [[worker]]
    kind = "mail"
    [[worker]]
    kind = "exec"
    name = "import"
    restart_after = "1m"
    args.command = ["false"]
    [[worker]]
    kind = "exec"
    name = "report"
    args.command = ["true"]
"""


def picture(title: str, shown: Text) -> str:
    """A terminal that shows it, as SVG; nothing in it is fetched from elsewhere."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(shown, no_wrap=True, crop=True)
    svg = console.export_svg(title=title, unique_id=title.replace(" ", "-"))
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)


def texts(svg: str) -> list[str]:
    """The lines that a picture shows."""
    lines: dict[float, str] = {}
    for y, text in re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>(.*?)</text>', svg):
        lines[float(y)] = lines.get(float(y), "") + html.unescape(text).replace("\xa0", " ")
    return [line.rstrip() for _, line in sorted(lines.items())]


def pictures(host: Host) -> dict[str, str]:
    """By name."""
    asked = HISTORY if os.environ.get("BGHOST_PICTURES") else 1
    top = Top(host.client, ())
    for _ in range(asked):
        top.ask()
        time.sleep(0.25 if asked > 1 else 0)
    top.ask()
    ps = Text("$ bghost ps\n") + Text(host.bghost("ps").stdout)
    return {"ps": picture("bghost ps", ps), "top": picture("bghost top", top.shown(WIDTH, 12))}


def heads(svg: str) -> list[str]:
    return next(line.split() for line in texts(svg) if line.startswith("NAME"))


def test_the_pictures(bghost_host: StartHost) -> None:
    """They have the columns that the commands have, and workers in several states."""
    host = bghost_host(kinds={"counter": COUNTER, "mail": MAIL}, args=["run"], config=CONFIG)

    def settled() -> bool:
        states = {row["name"]: row["state"] for row in host.client.ps()}
        wanted = {"counter.1": "ready", "counter.2": "ready", "mail": "failed", "import": "backoff", "report": "done"}
        return wanted.items() <= states.items()

    until(settled)
    for name, made in pictures(host).items():
        file = PICTURES / f"{name}.svg"
        if os.environ.get("BGHOST_PICTURES"):
            file.parent.mkdir(exist_ok=True)
            file.write_text(made)
        there = file.read_text()
        assert heads(there) == heads(made), name
        assert "url(http" not in there
        for lines in (texts(there), texts(made)):
            shown = "\n".join(lines)
            assert re.search(r"^ ?counter\.2 .* ready ", shown, re.MULTILINE), shown
            assert re.search(r"^ ?mail .* failed .* gave up: no route", shown, re.MULTILINE), shown
