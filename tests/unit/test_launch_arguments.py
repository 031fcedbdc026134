"""The `deepspeed` command's reading of arguments, against DeepSpeed's own parser; the exit code it concludes."""

from __future__ import annotations

import argparse
import socket
from typing import NoReturn

import pytest

from sparselt_dist import launch
from sparselt_dist.rank_report import Reports
from sparselt_dist.supervisor import exit_code


@pytest.mark.parametrize(
    ("typed", "own", "program"),
    [
        ("--num_gpus 2 -m pkg.mod a -m b", "--num_gpus 2 --module", "pkg.mod a -m b"),
        ("-m --num_gpus=2 pkg.mod", "--module --num_gpus=2", "pkg.mod"),
        ("-mpkg.mod -q", "--module", "pkg.mod -q"),
        ("--num_g 2 --quiet script.py -m x", "--num_g 2 --quiet", "script.py -m x"),
        ("--module pkg.mod --num_gpus 3", "--module", "pkg.mod --num_gpus 3"),
        ("-H hosts -i a@b:0,1 --launcher slurm -m p", "-H hosts -i a@b:0,1 --launcher slurm --module", "p"),
        ("--launcher_args=-m script.py", "--launcher_args=-m", "script.py"),
        ("--enable_each_rank_log -m script.py", "--enable_each_rank_log -m", "script.py"),
        ("--num_gpus", "--num_gpus", ""),
    ],
)
def test_m_is_read_as_module_only_among_the_launchers_options(typed: str, own: str, program: str) -> None:
    assert launch.split_arguments(typed.split()) == (own.split(), program.split())


def test_the_option_table_is_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new DeepSpeed with another option that takes a value fails here."""
    from deepspeed.launcher import runner

    class Caught(Exception):
        pass

    def stop(parser: argparse.ArgumentParser, *rest: object, **more: object) -> NoReturn:
        raise Caught(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Caught) as caught:
        runner.parse_args([])
    actions = [action for action in caught.value.args[0]._actions if action.option_strings]
    theirs = {name: action.nargs != 0 for action in actions for name in action.option_strings if action.dest != "help"}
    assert theirs == {name: metavar is not None for names, metavar, _ in launch.OPTIONS for name in names}


def test_a_run_on_one_host_gets_a_free_port_and_others_keep_theirs() -> None:
    name, port = launch.rendezvous_arguments(["--num_gpus", "2"])
    assert name == "--master_port"
    with socket.socket() as server:
        server.bind(("", int(port)))
        server.listen()
        assert launch.free_port() != int(port)
    for own in (["--master_port", "1"], ["--hostfile=h"], ["-H", "h"], ["--no_ssh", "--node_rank=1"]):
        assert launch.rendezvous_arguments(own) == []


def test_help_names_m_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launch.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "same as --module" in shown and "example: deepspeed" in shown


def test_no_program_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launch.main(["--num_gpus", "2"])
    assert ended.value.code == 2
    assert "program" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ready", "exits", "runner", "adopted", "expected"),
    [
        ("01", {"0": 0, "1": 0}, 0, [], 0),
        ("01", {"0": 75, "1": 75}, 75, [], 75),
        ("01", {"0": 75, "1": 0}, 75, [], 75),
        ("01", {"0": 75, "1": 75}, -15, [1], 75),  # the process group got a TERM
        ("01", {"0": 75, "1": 75}, 0, [-10, 75], 75),  # the node launcher died of USR1: the runner says 0
        ("01", {"1": 1, "0": 2}, 75, [], 1),  # the first failure counts
        ("01", {"0": 75}, 75, [], 1),  # a rank was killed
        ("01", {"0": 75}, 247, [], 137),  # by SIGKILL, as DeepSpeed's launcher tells it
        ("", {"0": 2}, 1, [], 2),  # a configuration error before the announcement
        ("0", {"0": 0}, 245, [], 139),  # died after its report
        ("", {}, 7, [], 7),  # a program that reports nothing
        ("", {}, -15, [], 143),
        ("", {}, -15, [0, 3], 3),
        ("", {}, 0, [-9], 137),
        ("", {}, 0, [], 0),
        ("", {}, 255, [], 1),  # a host was lost
    ],
)
def test_exit_code(ready: str, exits: dict[str, int], runner: int, adopted: list[int], expected: int) -> None:
    assert exit_code(Reports(dict.fromkeys(ready, 1), exits), runner, adopted) == expected


@pytest.mark.parametrize(
    ("words", "is_over_ssh"),
    [
        (["--hostfile", "hosts"], True),
        (["--hostfile=hosts", "--launcher=PDSH"], True),
        (["--force_multi"], True),  # then the runner takes pdsh to this host
        (["--hostfile", "hosts", "--no_ssh"], False),
        (["--hostfile", "hosts", "--launcher", "openmpi"], False),
        (["--num_gpus", "2"], False),
    ],
)
def test_whether_ranks_are_started_over_ssh(
    monkeypatch: pytest.MonkeyPatch, words: list[str], is_over_ssh: bool
) -> None:
    monkeypatch.setattr(launch, "STOCK_HOSTFILE", "/nowhere")
    assert launch.goes_over_ssh(words) == is_over_ssh
