"""The command line as a whole: a click group of the commands that installed distributions offer by entry point."""

import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property, wraps
from typing import Final

import click

from bghost import __version__
from bghost.commands.own import OWN
from bghost.shared.errors import BghostError, PluginError, UsageError
from bghost.shared.names import near
from bghost.shared.paths import directories
from bghost.shared.plugins import COMMANDS, Catalog, Found, discover

VERBOSE: Final = "bghost.verbose"


class Commands(click.Group):
    """Finds its commands by entry point, and imports each only when it is called, or all for ``--help``.

    Those of its own it knows.
    """

    called: Found | None = None
    """The command that was called, once that is known."""

    @cached_property
    def _catalog(self) -> Catalog:
        return discover()

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._catalog.commands)

    def _find(self, name: str) -> Found | None:
        if name in OWN:
            return Found(name, COMMANDS, OWN[name], "bghost", __version__)
        return self._catalog.commands.get(name)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = self._find(cmd_name)
        return None if found is None else _load(found)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        self.called = self._find(name)
        if self.called is None and not name.startswith("-"):
            raise UsageError(f"there is no command {name!r}", hint=near(name, self.list_commands(ctx)))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line each; a command that cannot be loaded says so in its line, and the others are there."""
        rows = []
        for name, found in sorted(self._catalog.commands.items()):
            try:
                command = _load(found)
            except BghostError as error:
                rows.append((name, f"[not usable] {error}"))
            else:
                if not command.hidden:
                    rows.append((name, command.get_short_help_str(formatter.width)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _load(found: Found) -> click.Command:
    command = found.load()
    if not isinstance(command, click.Command):
        raise PluginError(f"{found} is no click command", detail=f"{found.value} is {command!r}")
    _accept_everywhere(command, found.name)
    return command


def _accept_everywhere(command: click.Command, name: str) -> None:
    """Give *command*, and the commands in it, the options that may stand anywhere, unless it has its own.

    Its own ones get a variable as their twin, by what they are called on the command line: BGHOST_COMMAND_OPTION.
    """
    taken = {opt for param in command.params for opt in param.opts}
    added = [option for option in _everywhere() if not taken.intersection(option.opts)]
    if not added:
        return  # it has been here before
    for param in command.params:
        if isinstance(param, click.Option) and param.envvar is None:
            param.envvar = _variable(name, max(param.opts, key=len))
    command.params += added
    if command.callback is not None:
        command.callback = _telling(command.callback)
    if isinstance(command, click.Group):
        for each, inner in command.commands.items():
            _accept_everywhere(inner, f"{name} {each}")


def _variable(*words: str) -> str:
    return "_".join(re.sub(r"\W+", "_", word.strip("-")).upper() for word in ("bghost", *words))


def _telling(callback: Callable[..., object]) -> Callable[..., object]:
    """*callback*, which says first what ``-v`` asks for: only now are all options known."""

    @wraps(callback)
    def told(*args: object, **kwargs: object) -> object:
        ctx = click.get_current_context()
        if ctx.meta.pop(VERBOSE, False):
            _tell_more()
        return callback(*args, **kwargs)

    return told


def _everywhere(*, twins: bool = False) -> list[click.Option]:
    # Only in front of the command does a variable count: behind it, it would beat what is written in front.
    # They are the variables written out: whatever a command does then, a client of its own included, goes by them.
    return [
        click.Option(
            ["--instance"],
            metavar="NAME",
            expose_value=False,
            callback=_set_instance,
            help="The instance that is meant.  [BGHOST_INSTANCE; default]",
        ),
        click.Option(
            ["--config"],
            metavar="FILE",
            expose_value=False,
            callback=_set_config,
            help="The config file.  [BGHOST_CONFIG]",
        ),
        click.Option(
            ["-q", "--quiet"],
            envvar="BGHOST_QUIET" if twins else None,
            is_flag=True,
            expose_value=False,
            callback=_be_quiet,
            help="Print nothing but errors; run logs warnings and worse.",
        ),
        click.Option(
            ["-v", "--verbose"],
            envvar="BGHOST_VERBOSE" if twins else None,
            is_flag=True,
            expose_value=False,
            callback=_be_verbose,
            help="Say more, on stderr: which instance and files are meant; run logs debug records.",
        ),
    ]


def _be_quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        os.environ.setdefault("BGHOST_HOST_LOG_LEVEL", "WARNING")
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)


def _be_verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[VERBOSE] = True
        os.environ.setdefault("BGHOST_HOST_LOG_LEVEL", "DEBUG")


def _tell_more() -> None:
    """What ``-v`` says, once all options are known."""
    here = directories()
    config = os.environ.get("BGHOST_CONFIG") or (here.config and os.path.join(here.config, "bghost.toml"))
    for what, value in (("instance", here.instance), ("runtime directory", here.runtime), ("config file", config)):
        click.echo(f"bghost: {what}: {value}", err=True)


def _set_instance(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        os.environ["BGHOST_INSTANCE"] = directories(value).instance


def _set_config(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        os.environ["BGHOST_CONFIG"] = os.path.abspath(value)


@click.group(
    cls=Commands,
    name="bghost",
    params=_everywhere(twins=True),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="Exit codes: 0 done, 1 it failed, 2 usage or config, 3 no host of that instance, 4 timed out, "
    "5 no such worker or kind, 70 a bug of bghost.",
)
@click.version_option(__version__, message="bghost %(version)s")
def bghost() -> None:
    """Run background workers, and watch them."""


def run(argv: Sequence[str]) -> int:
    """Run one command line.

    :param argv: without the program's name.
    :returns: its exit code.
    :raises BghostError: for whatever is to be told to the user in a line.
    """
    if "_BGHOST_COMPLETE" in os.environ:
        return _complete(os.environ["_BGHOST_COMPLETE"])
    try:
        with bghost.make_context("bghost", list(argv) or ["--help"]) as ctx:
            bghost.invoke(ctx)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        raise _in_our_words(error) from None
    except BghostError:
        raise
    except Exception as error:
        called = bghost.called
        error.add_note(f"bghost: this is a bug of {f'{called.dist_name} {called.version}' if called else 'bghost'}")
        raise
    return 0


def _complete(instruction: str) -> int:
    """What a shell asks for when it completes a command line."""
    from click.shell_completion import shell_complete

    try:
        return shell_complete(bghost, {}, "bghost", "_BGHOST_COMPLETE", instruction)
    except BghostError:
        return 1  # a command line that is wrong has nothing that completes it


def _in_our_words(error: click.ClickException) -> BghostError:
    text = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    hint = f"see '{context.command_path} --help'" if isinstance(context, click.Context) else ""
    ours = UsageError(text[:1].lower() + text[1:], hint=hint)
    ours.exit_code = error.exit_code
    return ours
