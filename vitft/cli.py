"""The door: what every `python -m vitft.X` and the `vitft` script share.

    if __name__ == "__main__":
        sys.exit(door(main))

turns whatever happens inside into an exit code and a text on stderr; results alone go to stdout.

    0    done
    1-7  a VitftError, by its class (see vitft.errors); no traceback unless --debug
    1    a bug of ours: traceback, and a request to report it
    130  Ctrl-C              143  SIGTERM or SIGHUP (closed terminal); a second one ends at once
    141  the reader of stdout has gone, as in `vitft ... | head`

`vitft X ...` is `python -m vitft.X ...`, and also `python -m vitft X ...`; every one of them takes
--debug, --quiet and --version.
"""

import errno
import gc
import importlib
import importlib.util
import os
import platform
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from types import FrameType

from vitft import console
from vitft.errors import Fault, MachineError, RecipeError, VitftError
from vitft.remedies import nearest

Main = Callable[[Sequence[str]], int]

COMMANDS = {
    "run": "train as a recipe says: photographs in; model, numbers and report out",
    "predict": "name what photographs show, with probabilities",
    "check": "look for everything wrong with data, recipe or model, and stop",
    "compare": "say whether one run is better than another, and how surely",
    "study": "train variants over seeds and say which can be told apart",
    "verify": "hash and predict a finished run again; say what changed",
    "explain": "draw what a model looks at",
    "demo": "try a model in the browser, on this computer only",
    "export": "write a model as ONNX, torch.export, timm or Hugging Face folder, and check it",
    "weights": "say what a weights file is, and which model it fits",
    "cache": "show or clear the cached features",
    "recipe": "print every key of a recipe with rule, default and meaning",
}
COMMON = """\
every command also takes:
  --debug     show the traceback of an error
  --quiet     warnings and errors only
  --version   print versions and stop
"""


class Terminated(BaseException):
    """SIGTERM or SIGHUP: unwinds like Ctrl-C, so that half-written files are removed."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


def door(main: Main, argv: Sequence[str] | None = None) -> int:
    """Calls a main and turns its end into an exit code.

    Args:
        main: Takes the arguments, returns an exit code.
        argv: Without the program's name; default `sys.argv[1:]`.

    Returns:
        The exit code; what was wrong stands on stderr.
    """
    gc.freeze()  # what was imported stays to the end; Python's exit would look at all of it, twice
    argv, flags = _common(sys.argv[1:] if argv is None else argv)
    _tame_streams()
    if "--version" in flags:
        main = _print_versions
    if "--quiet" in flags:
        console.setup()
        console.hush()
    debug = "--debug" in flags
    try:
        with _signals():
            code = main(argv)
            sys.stdout.flush()
            return code
    except SystemExit as end:  # argparse: 2 for a wrong command line, 0 after --help
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # the last stop before the shell
        return _ended(error, debug)


def main(argv: Sequence[str] | None = None) -> int:
    """The `vitft` script: `vitft X ...` is `python -m vitft.X ...`."""
    return door(_dispatch, argv)


def overview() -> str:
    """The commands that this installation has, one line each; imports none of them."""
    lines = [f"  {name:9s} {about}" for name, about in COMMANDS.items() if _exists(name)]
    head = "usage: vitft COMMAND ...    (the same as python -m vitft.COMMAND ...)\n\ncommands:\n"
    return head + "\n".join(lines) + f"\n\n`vitft COMMAND --help` says more; {COMMON}"


# --- inside -------------------------------------------------------------------------------------


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        (sys.stdout if argv else sys.stderr).write(overview())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS or not _exists(name):
        near = nearest(name, [c for c in COMMANDS if _exists(c)])
        fix = f"did you mean vitft {near}?" if near else "see vitft --help"
        raise RecipeError.of("cli.unknown_command", f"vitft {name}", "no such command", fix)
    command: Main = importlib.import_module(f"vitft.{name}").main
    return command(rest)


def _exists(name: str) -> bool:
    return importlib.util.find_spec(f"vitft.{name}") is not None


def _common(argv: Sequence[str]) -> tuple[list[str], set[str]]:
    """Takes the flags that every command has out of its arguments (not after `--`)."""
    argv = list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    flags = {arg for arg in argv[:end] if arg in ("--debug", "--quiet", "--version")}
    return [a for a in argv[:end] if a not in flags] + argv[end:], flags


def _print_versions(argv: Sequence[str]) -> int:
    from vitft import __version__

    parts = [f"{name} {version(name)}" for name in ("torch", "timm")]
    line = f"vitft {__version__} ({', '.join(parts)}, Python {platform.python_version()})\n"
    sys.stdout.write(line)
    return 0


def _tame_streams() -> None:
    """A terminal that cannot show a character gets an escape, not an exception."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Terminated here, and only here: a worker process just dies."""
    door_process = os.getpid()

    def unwind(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)  # the second one ends at once
        if os.getpid() != door_process:
            os.kill(os.getpid(), signum)
        raise Terminated(signum)

    numbers = [getattr(signal, n) for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)]
    wanted = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]  # nohup stays nohup
    try:
        before = {n: signal.signal(n, unwind) for n in wanted}
    except ValueError:  # not the main thread: its owner handles signals
        before = {}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def _ended(error: BaseException, debug: bool) -> int:
    """The exit code of an exception, after its text was written to stderr."""
    if isinstance(error, BrokenPipeError) and _reader_gone():
        _mute_stdout()
        return 128 + getattr(signal, "SIGPIPE", 13)
    if debug:
        _tell("".join(traceback.format_exception(error)))
    if isinstance(error, VitftError):
        _tell(f"{error}\n")
        return error.exit_code
    quiet = console.logger.disabled  # a signal comes to every process of a run, one tells of it
    if isinstance(error, KeyboardInterrupt):
        _tell("stopped by Ctrl-C\n" * (not quiet))
        return 128 + signal.SIGINT
    signum = getattr(error, "signum", None)  # ours, or a training loop that saved first
    if signum is not None:
        _tell(f"stopped by {signal.Signals(signum).name}\n" * (not quiet))
        return 128 + (signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)
    return _foreign(error, debug)


def _foreign(error: BaseException, debug: bool) -> int:
    """What no room of ours expected."""
    if _is_memory(error):
        fix = "close other programs, or lower train.batch_size and train.workers"
        said = (str(error).strip().splitlines() or [""])[0][:200]
        text = f"out of memory{': ' if said else ''}{said}"
        _tell(f"{Fault('env.memory', 'this machine', text, fix)}\n")
        return MachineError.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        _mute_stdout()  # vitft.io words its own failures, so this is where stdout goes
        fix = "free space where stdout or temporary files go"
        _tell(f"{Fault('env.disk_full', 'stdout', str(error.strerror), fix)}\n")
        return MachineError.exit_code
    if not debug:
        _tell("".join(traceback.format_exception(error)))
    text = f"{type(error).__name__}: {error}"
    _tell(f"{Fault('bug', 'vitft', text, 'please report it with the lines above')}\n")
    return VitftError.exit_code


def _is_memory(error: BaseException) -> bool:
    """Python's, CUDA's, or that of torch on the CPU, which has no class of its own."""
    name, text = type(error).__name__, str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (name == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in text)
    )


def _reader_gone() -> bool:
    """Whether a broken pipe is stdout's, not one between our own processes."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError):
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _mute_stdout() -> None:
    """Nobody can read stdout any more: keeps the interpreter from complaining at its exit."""
    with suppress(OSError, ValueError):  # a stdout without a descriptor, as in a notebook
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(text: str) -> None:
    """To stderr, whole; a closed terminal ends the talk, not the run."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        return


if __name__ == "__main__":
    sys.exit(main())
