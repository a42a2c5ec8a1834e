"""`benchmarks.files` and `benchmarks.options`: nothing is lost to a kill, a second run or a wrong
option."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import collectives, files, growth, networks, options, speed, traffic

ROOT = Path(__file__).parent.parent
NO_FILES = "/proc/self"
"""A folder in which nobody can make a file, a superuser neither."""


def test_a_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with files.replacing(path) as new:
        new.write_text("half of the n")
        assert path.read_text() == "old"
        with files.replacing(path) as other:  # of another process
            assert other != new
            other.write_text("of another run")
        new.write_text("new")
    assert path.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as new:
        new.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_text("x")
    files.write(tmp_path / "new", "x")
    modes = {(tmp_path / name).stat().st_mode for name in ("usual", "new")}
    assert len(modes) == 1


def test_a_folder_has_one_run_at_a_time(tmp_path):
    with files.locked(tmp_path):
        with pytest.raises(ValueError, match="another run is writing"), files.locked(tmp_path):
            pass
    with files.locked(tmp_path):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from benchmarks import files\n"
        "with files.locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            with pytest.raises(ValueError, match="another run"), files.locked(tmp_path):
                pass
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    with files.locked(tmp_path):
        pass


@pytest.mark.parametrize("text", ("", '{"a": 1', "[1]", "\0\0", "null"))
def test_damaged_json_is_named(text, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="settings.json is cut or damaged, and was left as it is"):
        files.read_json(path)
    path.write_text('{"a": 1}')
    assert files.read_json(path) == {"a": 1}


@pytest.mark.parametrize("program", (speed, growth, networks, collectives, traffic))
def test_a_folder_that_takes_no_files_is_refused_before_anything_is_measured(program, capsys):
    with pytest.raises(SystemExit) as exit_info:
        program._parser().parse_args(["--output", NO_FILES])
    assert exit_info.value.code == 2
    assert "not a folder to write to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (speed, ["--seconds", "nan"]),
        (speed, ["--seconds", "-1"]),
        (growth, ["--seconds", "inf"]),
        (growth, ["--largest", "nan"]),
        (growth, ["--largest", "100"]),
        (networks, ["--seconds", "-1"]),
    ],
)
def test_numbers_out_of_range_are_refused(program, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        program.main([*arguments, "--output", str(tmp_path)])
    assert exit_info.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_numbers():
    parse = options.number(at_least=0, above=-1, below=2)
    assert [parse(text) for text in ("0", "1e-3", "1.9")] == [0, 1e-3, 1.9]
    for text in ("2", "-0.1", "nan", "inf", "-inf", "", "1,5", "1e999"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a finite"):
            parse(text)


@pytest.mark.parametrize("program", (collectives, traffic))
def test_an_interrupted_run_that_measured_nothing_leaves_the_last_result(
    program, tmp_path, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "_compile" if program is collectives else "_count", interrupt)
    monkeypatch.setattr(program, "unavailable", lambda: None, raising=False)
    name = program.__name__.split(".")[1]
    for suffix in ("json", "csv"):
        (tmp_path / f"{name}.{suffix}").write_text("the last result")
    assert program.main(["--output", str(tmp_path)]) == 130
    for suffix in ("json", "csv"):
        assert (tmp_path / f"{name}.{suffix}").read_text() == "the last result"
