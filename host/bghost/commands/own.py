"""Which commands come along with bghost."""

from typing import Final

OWN: Final = {
    "config": "bghost.commands.config:config",
    "dump": "bghost.commands.dump:dump",
    "import": "bghost.commands.imports:imports",
    "launch": "bghost.commands.launch:launch",
    "logs": "bghost.commands.logs:logs",
    "plugins": "bghost.commands.plugins:plugins",
    "ps": "bghost.commands.ps:ps",
    "reload": "bghost.commands.reload:reload",
    "restart": "bghost.commands.stop:restart",
    "run": "bghost.commands.run:run",
    "shutdown": "bghost.commands.stop:shutdown",
    "signal": "bghost.commands.signal:signal",
    "status": "bghost.commands.status:status",
    "stop": "bghost.commands.stop:stop",
    "top": "bghost.commands.top:top",
    "wait": "bghost.commands.wait:wait",
    "wake": "bghost.commands.signal:wake",
    "why": "bghost.commands.why:why",
}
"""The same as the distribution's entry points say.

Nobody else can offer a command of such a name, so one that is called need not be looked for among all that is
installed, which takes longer than most of them do.
"""
