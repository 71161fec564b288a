"""The door: every end of a command is an exit code and a text on stderr."""

import argparse
import ast
import errno
import gc
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vitft
from vitft import cli, console
from vitft.errors import (
    BusyError,
    DataError,
    DivergedError,
    MachineError,
    RecipeError,
    VitftError,
    WeightsError,
)

PACKAGE = Path(cli.__file__).parent
FAMILY = (VitftError, RecipeError, DataError, WeightsError, MachineError, DivergedError, BusyError)


@pytest.fixture(autouse=True)
def own_handlers():
    """What a door does to the process stays in the test that did it."""
    before = {handler: handler.level for handler in console.logger.handlers}
    yield
    gc.unfreeze()
    for handler in set(console.logger.handlers) - set(before):
        console.logger.removeHandler(handler)
    for handler, level in before.items():
        handler.setLevel(level)


def raising(error: BaseException):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize("kind", FAMILY)
def test_each_of_our_errors_ends_with_its_code_its_text_and_no_traceback(kind, capsys):
    error = kind.of("some.id", "r.yaml:7:3: train.lr", "must be above 0, got -1", "write 0.1")
    code = cli.door(raising(error), [])
    out, err = capsys.readouterr()
    assert code == kind.exit_code == FAMILY.index(kind) + 1
    assert out == ""
    assert err == "error[some.id] r.yaml:7:3: train.lr: must be above 0, got -1\nfix: write 0.1\n"


def test_debug_shows_the_traceback_and_is_not_passed_on(capsys):
    seen = []

    def main(argv):
        seen.extend(argv)
        raise DataError.of("data.empty", "x", "no photographs", "add some")

    assert cli.door(main, ["--debug", "a", "--", "--debug"]) == 3
    assert seen == ["a", "--", "--debug"]
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("error[data.empty] x: no photographs\nfix: add some\n")


def test_a_bug_of_ours_shows_its_traceback_and_asks_for_a_report(capsys):
    assert cli.door(raising(KeyError("oops")), []) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith(
        "error[bug] vitft: KeyError: 'oops'\nfix: please report it with the lines above\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (cli.Terminated(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (cli.Terminated(signal.SIGHUP), 143, "stopped by SIGHUP"),
        (cli.Terminated(signal.SIGINT), 130, "stopped by SIGINT"),
        (MemoryError(), 5, "error[env.memory] this machine: out of memory"),
        (OSError(errno.ENOSPC, "No space left"), 5, "error[env.disk_full] stdout: No space left"),
        (SystemExit(2), 2, ""),
        (SystemExit(None), 0, ""),
        (SystemExit("text"), 1, ""),
    ],
)
def test_every_other_end_has_its_code(error, code, text, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_mute_stdout", lambda: None)
    assert cli.door(raising(error), []) == code
    err = capsys.readouterr().err
    assert err.startswith(text)
    assert "Traceback" not in err


def test_a_loop_that_saved_before_it_stopped_is_believed(capsys):
    class Saved(BaseException):
        signum = signal.SIGINT

    assert cli.door(raising(Saved()), []) == 130


def test_the_code_of_a_main_is_the_code_of_the_door():
    assert cli.door(lambda argv: 3, []) == 3


def test_what_was_imported_is_set_aside_before_the_work_begins():
    assert cli.door(lambda argv: int(gc.get_freeze_count() > 10_000), []) == 1


def test_the_handlers_of_others_come_back(capsys):
    before = signal.getsignal(signal.SIGTERM)
    cli.door(lambda argv: int(signal.getsignal(signal.SIGTERM) == before), [])
    assert signal.getsignal(signal.SIGTERM) == before
    assert cli.door(lambda argv: int(signal.getsignal(signal.SIGTERM) == before), []) == 0


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        kept = cli.door(lambda argv: int(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN), [])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert kept == 1


def test_quiet_keeps_news_off_the_screen_but_not_warnings(capsys, tmp_path):
    log = tmp_path / "log.txt"

    def main(argv):
        console.setup(log_file=log)
        console.say("news")
        console.warn("warning")
        console.close_log()
        return 0

    assert cli.door(main, ["--quiet"]) == 0
    assert capsys.readouterr().err == "WARNING: warning\n"
    assert "news" in log.read_text()


def test_version_names_the_versions_that_matter(capsys):
    assert cli.main(["--version"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"vitft {vitft.__version__} (torch ")
    assert "timm 1." in out


# --- the vitft script -----------------------------------------------------------------------------


def test_the_overview_lists_every_command_and_help_is_no_error(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("run", "predict", "recipe"):
        assert f"  {name:9s} {cli.COMMANDS[name]}\n" in out
    assert cli.main([]) == 2
    assert "usage: vitft COMMAND" in capsys.readouterr().err


def test_the_package_itself_is_the_script(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vitft", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("vitft", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out == cli.overview()


def test_an_unknown_command_is_answered_with_the_nearest(capsys):
    assert cli.main(["prdict"]) == 2
    assert capsys.readouterr().err == (
        "error[cli.unknown_command] vitft prdict: no such command\n"
        "fix: did you mean vitft predict?\n"
    )


def mains() -> set[str]:
    """Modules that `python -m` runs and that have a main, read without importing them."""
    found = set()
    for path in PACKAGE.glob("*.py"):
        text = path.read_text()
        names = {n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
        if "main" in names and '\nif __name__ == "__main__":\n' in text:
            found.add(path.stem)
    return found - {"cli"}


def test_every_module_that_can_be_run_is_a_command_with_one_line_of_help():
    assert mains() <= set(cli.COMMANDS)
    for name, about in cli.COMMANDS.items():
        assert about
        assert "\n" not in about
        assert not cli._exists(name) or name in mains(), f"vitft.{name} has no main"


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - {"recipe"}))
def test_every_help_explains_each_word_and_gives_an_example_that_parses(name, capsys, monkeypatch):
    """Up to the first thing the example names that is not here; argparse would end with 2."""
    monkeypatch.chdir(PACKAGE.parent)
    with pytest.raises(SystemExit) as end:
        cli._dispatch([name, "--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out.rstrip("\n").replace("example:\n", "example:")
    last = " ".join(told.splitlines()[-1].split())  # one line, so that it can be copied
    words = last.partition(f"example: python -m vitft.{name} ")[2].split()
    assert words, f"vitft {name} --help ends without an example"
    parsed = []

    def stopping(real):
        def parse(self, *given):
            parsed.append((self, real(self, *given)))
            raise KeyboardInterrupt

        return parse

    for method in ("parse_args", "parse_intermixed_args"):
        real = getattr(argparse.ArgumentParser, method)
        monkeypatch.setattr(argparse.ArgumentParser, method, stopping(real))
    with pytest.raises(KeyboardInterrupt):
        cli._dispatch([name, *words])
    ((parser, _),) = parsed
    silent = [a.option_strings or a.metavar for a in parser._actions if not a.help]
    assert set(map(str, silent)) <= {"None"}, "words without help"


def test_a_command_is_its_module(capsys):
    assert cli.main(["recipe"]) == 0
    assert capsys.readouterr().out.startswith("## Recipe keys")


# --- real processes -------------------------------------------------------------------------------

STUB = (
    "import types\nfor name in ('vit', 'vitflower'):\n"
    "    sys.modules[f'vitft.{name}'] = types.SimpleNamespace(VisionTransformer=None)\n"
)
# Whoever tests under nohup, or in the background of a script, hands ignored signals down.
PRELUDE = (
    "import sys, time, os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom vitft.cli import door\n"
)


def start(body: str, **options) -> subprocess.Popen:
    """A process whose main is `body`."""
    code = f"import sys\n{STUB}{PRELUDE}def main(argv):\n{body}\nsys.exit(door(main, sys.argv[1:]))"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **streams)


WAIT = """
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned", flush=True)
"""


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGHUP", 143), ("SIGINT", 130)])
def test_a_signal_cleans_up_and_ends_with_its_code(number, code):
    process = start(WAIT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, number))
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "cleaned\n")
    assert err in (f"stopped by {number}\n", "stopped by Ctrl-C\n")


def test_a_second_sigterm_ends_at_once():
    slow = WAIT.replace(
        'print("cleaned", flush=True)', 'print("saving", flush=True); time.sleep(60)'
    )
    process = start(slow)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert time.monotonic() - began < 10


def test_a_worker_process_just_dies_of_sigterm_and_says_nothing():
    body = """
    child = os.fork()
    if child == 0:
        print("up", flush=True)
        time.sleep(60)
    time.sleep(0.5)
    os.kill(child, 15)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) + 15
"""
    process = start(body)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "up\n", "")


def test_a_reader_that_has_gone_ends_it_quietly():
    process = start("\n    for n in range(100_000):\n        print('line', n)\n    return 0\n")
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=30), err) == (141, "")


def test_a_broken_pipe_between_our_own_processes_is_a_bug(capfd):
    if not hasattr(select, "poll"):
        pytest.skip("needs poll")
    assert cli.door(raising(BrokenPipeError(errno.EPIPE, "Broken pipe")), []) == 1
    assert "error[bug]" in capfd.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_told():
    with Path("/dev/full").open("w") as full:
        process = start("\n    print('result')\n    return 0\n", stdout=full)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 5
    assert err.startswith("error[env.disk_full] stdout: No space left on device\nfix: ")


def test_a_terminal_that_cannot_show_a_character_gets_an_escape():
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    os.environ.update(environment)
    try:
        process = start("\n    print('93 % · 🌻')\n    return 0\n")
    finally:
        for name in environment:
            del os.environ[name]
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "93 % \\xb7 \\U0001f33b\n", "")


def test_a_bad_recipe_ends_the_real_command_with_2_and_no_traceback(tmp_path):
    (tmp_path / "r.yaml").write_text("train:\n  lr: -1\n")
    code = f"import sys\n{STUB}from vitft import recipe, cli\n"
    code += "sys.exit(cli.door(lambda argv: bool(recipe.load(argv[0], argv[1:]))))"
    done = subprocess.run(
        [sys.executable, "-c", code, "r.yaml", "seed=x"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error[recipe.range] r.yaml:2:3: train.lr: must be a number above 0, got -1\n"
        "fix: write a value such as 0.001\n"
        "error[recipe.type] command line: seed: must be a whole number from 0 to 2^63 - 1, got x\n"
        "fix: write a value such as 0\n"
    )
