"""What the command lines share."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from sparselt_dist import cli
from sparselt_dist.errors import DataError


def _raise(error: BaseException) -> int:
    raise error


def test_a_users_error_is_one_message_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command(lambda: _raise(DataError("shards: none"))) == 2
    assert capsys.readouterr().err == "error: shards: none\n"
    of_another_rank = DataError("shards: none")
    of_another_rank.silent = True
    assert cli.run_command(lambda: _raise(of_another_rank)) == 2
    assert capsys.readouterr().err == ""


def test_a_crash_stays_a_crash_and_an_interrupt_has_its_code() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run_command(lambda: _raise(ZeroDivisionError()))
    assert cli.run_command(lambda: _raise(KeyboardInterrupt())) == 130
    assert cli.run_command(lambda: 75) == 75


def test_options_and_overrides_may_stand_in_any_order() -> None:
    parser = cli.make_parser("test", "A test.", "sparselt test")
    cli.add_config_arguments(parser)
    parser.add_argument("--flag", action="store_true")
    parsed = cli.parse_arguments(parser, ["a=1", "--config", "x", "b=2", "--flag", "--config", "y", "c=3"])
    assert (parsed.config, parsed.overrides, parsed.flag) == (["x", "y"], ["a=1", "b=2", "c=3"], True)
    assert "--config NAME_OR_FILE" in parser.format_help()
    assert "default: []" not in parser.format_help()
    assert "example:\n  sparselt test" in parser.format_help()


def test_a_sub_command_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    module = types.ModuleType("sparselt_dist.mlflow_sync")
    module.main = lambda argv: seen.append(argv) or 75  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sparselt_dist.mlflow_sync", module)
    assert cli.main(["mlflow-sync", "runs/a", "--uri", "x"]) == 75
    assert seen == [["runs/a", "--uri", "x"]]


def test_help_lists_every_command_and_a_wrong_one_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)
    assert cli.main([]) == 2
    capsys.readouterr()
    assert cli.main(["pretain"]) == 2
    assert "did you mean pretrain?" in capsys.readouterr().err


@pytest.mark.parametrize("used_torch", [True, False])
@pytest.mark.parametrize(("body", "code"), [("return 75", 75), ("raise ZeroDivisionError", 1)])
def test_a_process_that_used_torch_is_left_without_teardown(body: str, code: int, used_torch: bool) -> None:
    program = (
        "import atexit, sys\nfrom sparselt_dist.cli import leave\n"
        f"if {used_torch}: sys.modules['torch'] = sys\n"
        "class Late:\n    def __del__(self): print('torn down')\n"
        "late = Late()\natexit.register(print, 'at exit')\n"
        f"def command():\n    print('running')\n    {body}\n"
        "leave(command)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "running\nat exit\n" + ("" if used_torch else "torn down\n"))
    assert ("ZeroDivisionError" in done.stderr) == (code == 1)
