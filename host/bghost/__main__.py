"""The command ``bghost``: hands the command line to a command, and tells errors in a line and an exit code."""

from __future__ import annotations

import io
import os
import sys

from bghost.shared.errors import BUG, DONE, FAILED, BghostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Run the command line of this process, and exit with its code."""
    sys.exit(_outcome(sys.argv[1:]))


def _outcome(argv: list[str]) -> int:
    try:
        try:
            return _run(argv)
        finally:
            # Here, and not when the interpreter ends: what goes wrong then cannot be told.
            _flush()
    except BghostError as error:
        from bghost.commands.listing import plain

        _tell(plain(str(error)))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return FAILED  # whoever read the output has enough
    except Exception as error:
        import traceback

        if not hasattr(error, "__notes__"):
            error.add_note("bghost: this is a bug of bghost")
        _tell(traceback.format_exc().rstrip(), prefix="")
        return BUG


def _run(argv: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a text may be more than the terminal's encoding can say
    if (simple := _simple_ps(argv)) is not None:
        from bghost.commands import listing

        names, as_json, instance = simple
        if instance is not None:
            os.environ["BGHOST_INSTANCE"] = instance
        listing.ps(names, as_json=as_json)
        _flush()
        os._exit(DONE)  # nothing is left to be put in order, and the interpreter takes an eighth of the time for that
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")  # a library's warning says nothing to somebody who types a command
    from bghost.commands import group

    return group.run(argv)


def _simple_ps(argv: list[str]) -> tuple[list[str], bool, str | None] | None:
    """Names, ``--json`` and instance, if *argv* is a ``ps`` without anything else.

    It is answered without click, and without a look at what is installed: either takes longer than all the rest.
    """
    if any(name.startswith(("BGHOST_PS_", "BGHOST_QUIET", "BGHOST_VERBOSE", "_BGHOST_")) for name in os.environ):
        return None  # options that were given as variables
    called, as_json, instance, names = False, False, None, []
    words = iter(argv)
    for word in words:
        if word == "--instance":
            instance = next(words, "")
        elif word.startswith("--instance="):
            instance = word.partition("=")[2]
        elif not called:
            if word != "ps":
                return None
            called = True
        elif word == "--json":
            as_json = True
        elif word.startswith("-"):
            return None
        else:
            names.append(word)
    return (names, as_json, instance) if called and instance != "" else None


def _flush() -> None:
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        # What could not be written must not fail once more, and be told by the interpreter, when that ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            raise
        raise BghostError(f"the output cannot be written: {error.strerror}") from None


def _tell(text: str, prefix: str = "bghost: ") -> None:
    if sys.stderr is not None:
        try:
            print(prefix + text, file=sys.stderr, flush=True)
        except OSError:
            pass  # nobody is there to be told; the exit code tells


if __name__ == "__main__":
    main()
