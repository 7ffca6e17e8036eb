"""``bghost import``: a config for what another supervisor ran, and what could not be carried over."""

import os
import pwd
import tomllib
from typing import Final

from support import Sandbox

USER: Final = pwd.getpwuid(os.geteuid()).pw_name

SUPERVISOR: Final = """
[supervisord]
logfile=/var/log/supervisord.log ; main log

[program:web-app]
command=python3 -m http.server --bind 127.0.0.1 8000
directory=/srv/web
environment=KEY="a,b",PATH="/opt/bin:/usr/bin",N=5
numprocs=3
process_name=%(program_name)s_%(process_num)02d
autorestart=true
stopsignal=INT
stopwaitsecs=30
priority=20
user={user}
stdout_logfile=/var/log/web.log

[program:db]
command=/bin/sh -c "exec sleep %(ENV_LONG)s"
priority=10
autostart=false
autorestart=unexpected

[program:pipe]
command=tail -f /dev/null
autorestart=false

[group:all]
programs=web-app,db
"""

PROCFILE: Final = """
# what runs
web: bundle exec rails server -p $PORT
worker: python3 -c 'print("it runs", flush=True)'
"""


def test_supervisord(sandbox: Sandbox) -> None:
    """Programs in the order of priority; what is left out is listed, and the config is good."""
    (sandbox.root / "supervisord.conf").write_text(SUPERVISOR.replace("{user}", USER))
    result = sandbox.bghost("import", "supervisord.conf", "-o", "new.toml")
    assert result.code == 0 and result.stdout == ""
    text = (sandbox.root / "new.toml").read_text()
    assert tomllib.loads(text)["worker"] == [
        {"kind": "exec", "name": "db", "restart": "on-failure",
         "args": {"command": ["/bin/sh", "-c", "exec sleep %(ENV_LONG)s"]}},
        {"kind": "exec", "name": "web-app", "count": 3, "stop_timeout": 30, "user": USER,
         "restart": "always",
         "args": {"command": ["python3", "-m", "http.server", "--bind", "127.0.0.1", "8000"], "cwd": "/srv/web",
                  "env": {"KEY": "a,b", "PATH": "/opt/bin:/usr/bin", "N": "5"}, "stop_signal": "INT"}},
        {"kind": "exec", "name": "pipe", "restart": "never",
         "args": {"command": ["tail", "-f", "/dev/null"]}},
    ]  # fmt: skip
    for left in ("%(ENV_LONG)", "autostart = false", "[group:all]", "stdout_logfile", "bghost logs"):
        assert left in result.stderr, left
    assert text.count("# Not carried over: ") == result.stderr.count("not carried over: ")
    assert sandbox.bghost("config", "check", "new.toml").code == 0
    again = sandbox.bghost("import", "supervisord.conf", "-o", "new.toml")
    assert again.code == 1 and "exists" in again.stderr


def test_a_procfile(sandbox: Sandbox) -> None:
    """Runs, as it is written; a line for a shell is given to one."""
    (sandbox.root / "Procfile").write_text(PROCFILE)
    result = sandbox.bghost("import", "Procfile")
    assert "PORT is not set" in result.stderr
    web, worker = tomllib.loads(result.stdout)["worker"]
    assert web["args"]["command"] == ["sh", "-c", "exec bundle exec rails server -p $PORT"]
    assert worker["args"]["cwd"] == str(sandbox.root)
    (sandbox.root / "Procfile").write_text("worker: " + PROCFILE.rpartition("worker: ")[2])
    sandbox.config(sandbox.bghost("import", "Procfile").stdout)
    host = sandbox.start_host("run")
    host.wait_line(r"\[worker\] it runs")
    assert host.client.wait("worker", until="stopped")[0]["state"] == "done"


def test_what_is_neither(sandbox: Sandbox) -> None:
    """Is refused in a line."""
    for text, why in (("", "no program"), ("no colon", "NAME: COMMAND"), ("[program:x]\nuser=a", "no command")):
        (sandbox.root / "file").write_text(text)
        result = sandbox.bghost("import", "file")
        assert result.code == 2 and why in result.stderr, result
    for command, words in (
        ("A=1 run", ["sh", "-c", "A=1 run"]),
        ("a && b", ["sh", "-c", "a && b"]),
        ("a 'b c'", ["a", "b c"]),
    ):
        (sandbox.root / "file").write_text(f"web: {command}")
        (worker,) = tomllib.loads(sandbox.bghost("import", "file").stdout)["worker"]
        assert worker["args"]["command"] == words
    assert sandbox.bghost("import", "nowhere").code == 2
