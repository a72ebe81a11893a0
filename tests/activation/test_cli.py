"""`python -m flash_attn_npu` runs programs as Python itself would."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

import flash_attn_npu
from flash_attn_npu import __main__ as command_line
from flash_attn_npu._commands import run, starting
from flash_attn_npu._commands.outputs import writable
from flash_attn_npu._core.ground import usage
from flash_attn_npu.errors import ArgumentError

Run = Callable[..., "subprocess.CompletedProcess[str]"]

OURS = 'flash_attn.flash_attn_func.__module__.split(".")[0]'
PROBE = f"""
import sys, flash_attn
print({OURS}, __name__, sys.argv, repr(sys.path[0]))
print(sys.modules["__main__"].__dict__ is globals())
"""
PLAIN = PROBE.replace(", flash_attn", "").replace(OURS, "'flash_attn_npu'")
ARGS = ("-v", "-m", "x", "--report", "-h")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    for folder in ("apps", "pack"):
        (tmp_path / folder).mkdir()
    for name, text in (("with", PROBE), ("plain", PLAIN)):
        (tmp_path / "apps" / f"{name}.py").write_text(text)
    (tmp_path / "pack" / "__init__.py").touch()
    (tmp_path / "pack" / "__main__.py").write_text(PROBE)
    (tmp_path / "module.py").write_text(PROBE)
    (tmp_path / "failing.py").write_text("import sys\nsys.exit(7)\n")
    (tmp_path / "raising.py").write_text("raise KeyError('from the program')\n")
    (tmp_path / "needy.py").write_text("import no_such_module_at_all\n")
    return tmp_path


@pytest.mark.usefixtures("programs")
def test_script_sees_what_it_sees_under_python(python: Run) -> None:
    ours = python("-W", "error", "-m", "flash_attn_npu", "apps/with.py", *ARGS)
    plain = python("apps/plain.py", *ARGS)
    assert (ours.returncode, ours.stderr) == (0, "")
    assert ours.stdout.replace("with.py", "plain.py") == plain.stdout


@pytest.mark.usefixtures("programs")
def test_command_sees_what_it_sees_under_python(python: Run) -> None:
    ours = python("-m", "flash_attn_npu", "-c", PROBE, *ARGS)
    plain = python("-c", PLAIN, *ARGS)
    assert (ours.returncode, ours.stderr) == (0, "")
    assert ours.stdout == plain.stdout
    assert python("-m", "flash_attn_npu", f"-c{PROBE}", *ARGS).stdout == plain.stdout


@pytest.mark.parametrize(("name", "file"), [("module", "module.py"), ("pack", "pack/__main__.py")])
def test_module_sees_what_it_sees_under_python(
    python: Run, programs: Path, name: str, file: str
) -> None:
    done = python("-m", "flash_attn_npu", "-m", name, *ARGS)
    assert (done.returncode, done.stderr) == (0, "")
    argv = [str(programs / file), *ARGS]
    assert done.stdout == f"flash_attn_npu __main__ {argv} {str(programs)!r}\nTrue\n"
    (programs / file).write_text(PLAIN)
    assert python("-m", name, *ARGS).stdout == done.stdout


@pytest.mark.usefixtures("programs")
def test_exit_status_and_exceptions_of_the_program_come_through(command: Run) -> None:
    assert command("failing.py").returncode == 7
    raised = command("raising.py")
    assert raised.returncode == 1
    assert "KeyError: 'from the program'" in raised.stderr
    needy = command("-m", "needy")
    assert needy.returncode == 1
    assert "Traceback" in needy.stderr
    assert "no_such_module_at_all" in needy.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "nothing to run"),
        (("-v",), "nothing to run"),
        (("-m",), "-m needs an argument"),
        (("-c",), "-c needs an argument"),
        (("-m", "no_such_module"), "no module named no_such_module"),
        (("-m", "no_such.module"), "No module named 'no_such'"),
        (("no_such_script.py",), "can't open 'no_such_script.py': there is no such file\n"),
        (("docter",), "can't open 'docter': there is no such file; the command is called doctor"),
        (("apps",), "can't find '__main__' module in 'apps'"),
        (("-m", "apps"), "no module named apps.__main__; 'apps' is a package"),
        (("--fast", "script.py"), "unrecognized arguments: --fast"),
        (("--report", "no/used.json", "-c", "print(1)"), "--report: got 'no/used.json': "),
        (("validate", "-o", "no/report.json"), "-o/--output: got 'no/report.json': "),
    ],
)
@pytest.mark.usefixtures("programs")
def test_what_cannot_run_is_said_in_one_line(
    command: Run, args: tuple[str, ...], message: str
) -> None:
    done = command(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "replaced", "why"),
    [
        ("", False, "got '': no name; allowed: a file that can be written"),
        (".", False, "got '.': it is a folder; allowed: "),
        ("failing.py/x", False, "failing.py is no folder; allowed: "),
        ("/dev/null", True, "would be replaced by a file; allowed: "),
        (f"/tmp/{'x' * 300}", False, "File name too long"),
    ],
)
def test_a_file_that_cannot_be_written_is_named(
    programs: Path, monkeypatch: pytest.MonkeyPatch, name: str, replaced: bool, why: str
) -> None:
    monkeypatch.chdir(programs)
    with pytest.raises(ArgumentError, match=re.escape(why)) as refused:
        writable("--report", name, replaced=replaced)
    assert refused.value.argument == "--report"
    assert writable("-o", "failing.py", replaced=replaced) == programs / "failing.py"
    assert (programs / "failing.py").read_text()


@pytest.mark.parametrize("words", [["-c", "print(1)"], ["matrix"]])
def test_a_setting_that_is_not_legal_is_an_error_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """The package refuses to be imported, which the command line does in `complete`."""

    def complete() -> None:
        raise ArgumentError("FLASH_ATTN_NPU_FALLBACK", "'x'", "warn", "unset it")

    monkeypatch.setattr(run, "complete", complete)
    monkeypatch.setattr(starting, "complete", complete)
    try:
        status: object = command_line.main(words)
    except SystemExit as leaving:
        status = leaving.code
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    assert said.err == (
        "error: FLASH_ATTN_NPU_FALLBACK: got 'x'; allowed: warn; to fix it: unset it\n"
    )


def test_a_chip_that_torch_npu_does_not_know_is_an_error_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def enable() -> None:
        raise RuntimeError("Unsupported soc version: Ascend999")

    monkeypatch.setattr("flash_attn_npu._virtual_ascend.start", lambda: None)
    monkeypatch.setattr("flash_attn_npu._virtual_ascend.enable", enable)
    with pytest.raises(SystemExit) as leaving:
        command_line.main(["--simulate", "-c", "print(1)"])
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "error: --simulate: Unsupported soc version: Ascend999\n"


def test_a_refused_install_is_an_error_line(python: Run, tmp_path: Path) -> None:
    # usercustomize-like: something has blocked the name before our command line runs
    (tmp_path / "block.py").write_text(
        "import runpy, sys\n"
        "sys.modules['flash_attn'] = None\n"
        "sys.argv = ['flash_attn_npu', '-c', 'print(1)']\n"
        "runpy.run_module('flash_attn_npu', run_name='__main__', alter_sys=True)\n"
    )
    done = python("block.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: sys.modules['flash_attn']: got None")
    assert "Traceback" not in done.stderr


TORCHLESS = """
import runpy, sys
sys.modules["torch"] = None
sys.modules["numpy"] = None
"""


@pytest.mark.parametrize("words", [["-h"], ["--version"], ["run", "-h"], ["matrix", "-h"]])
def test_help_and_versions_need_no_torch(python: Run, tmp_path: Path, words: list[str]) -> None:
    # before Python looks for our module: as where torch cannot be imported
    (tmp_path / "sitecustomize.py").write_text(TORCHLESS)
    done = python("-m", "flash_attn_npu", *words, path=(tmp_path,))
    assert (done.returncode, done.stderr) == (0, "")
    assert ("usage: python -m flash_attn_npu" in done.stdout) != (words == ["--version"])
    assert ("2.8.3" in done.stdout) == (words == ["--version"])


def test_the_console_script_is_the_same_command(python: Run, tmp_path: Path) -> None:
    """What an installer writes for the entry point, under its name."""
    script = tmp_path / "flash-attn-npu"
    script.write_text("import sys\nfrom flash_attn_npu.__main__ import main\nsys.exit(main())\n")
    (tmp_path / "sitecustomize.py").write_text(TORCHLESS)
    said = python(str(script), "-h", path=(tmp_path,))
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.startswith("usage: flash-attn-npu ")
    (tmp_path / "apps").mkdir()
    (tmp_path / "apps" / "with.py").write_text(PROBE)
    (tmp_path / "sitecustomize.py").unlink()
    done = python(str(script), "apps/with.py", "-h")
    assert done.stdout == python("-m", "flash_attn_npu", "apps/with.py", "-h").stdout


@pytest.mark.usefixtures("programs")
def test_run_and_its_absence_are_one(command: Run) -> None:
    done = command("-q", "run", "-v", "apps/with.py", *ARGS)
    plain = command("-v", "apps/with.py", *ARGS)
    assert (done.returncode, done.stdout, done.stderr) == (0, plain.stdout, plain.stderr)


def test_standard_input_sees_what_it_sees_under_python(python: Run) -> None:
    ours = python("-m", "flash_attn_npu", "-", *ARGS, stdin=PROBE)
    assert (ours.returncode, ours.stderr) == (0, "")
    assert ours.stdout == python("-", *ARGS, stdin=PLAIN).stdout


def test_a_file_says_what_served(command: Run, tmp_path: Path) -> None:
    code = (
        "import torch, flash_attn\n"
        "q = torch.randn(1, 4, 2, 8)\n"
        "flash_attn.flash_attn_func(q, q, q)\n"
        "raise SystemExit(3)\n"
    )
    done = command("-q", "--report", "used.json", "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
    (served,) = json.loads((tmp_path / "used.json").read_text())["served"]
    assert (served["function"], served["calls"]) == ("flash_attn_func", 1)
    assert served["reasons"]


def test_a_program_that_goes_elsewhere_takes_no_report_with_it(
    command: Run, tmp_path: Path
) -> None:
    done = command("--report", "used.json", "-c", "import os; os.mkdir('x'); os.chdir('x')")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "used.json").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full")
def test_a_report_that_cannot_be_written_at_the_end_is_told(command: Run) -> None:
    done = command("-q", "--report", "/dev/full", "-c", "raise SystemExit(3)")
    assert done.returncode == 3
    first, *told = done.stderr.splitlines()
    assert first.startswith("--report: /dev/full is not written (No space left on device)")
    assert json.loads("".join(told))["served"] == []


def test_every_rank_has_its_own_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "3")
    options = Namespace(report=str(tmp_path / "other.json"))
    assert run._report_file(options) == tmp_path / "other.rank3.json"
    assert not list(tmp_path.glob("other*"))


@pytest.mark.usefixtures("programs")
def test_verbose_logs_to_stderr_only(command: Run) -> None:
    done = command("-v", "apps/with.py")
    assert done.returncode == 0
    assert "flash_attn_npu: flash_attn is now flash_attn_npu" in done.stderr
    assert "mirroring" not in done.stdout


def test_what_served_is_said_at_exit(command: Run) -> None:
    code = (
        "import torch, flash_attn\n"
        "q = torch.randn(1, 4, 2, 8)\n"
        "flash_attn.flash_attn_func(q, q, q)\n"
        "raise SystemExit(3)\n"
    )
    done = command("-c", code)
    assert done.returncode == 3
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("flash_attn_npu: flash_attn_func: ")
    assert " x1" in last


@pytest.mark.parametrize(
    ("options", "ranks", "said"),
    [
        ((), {"RANK": "0", "LOCAL_RANK": "0"}, True),
        ((), {"RANK": "8", "LOCAL_RANK": "0"}, False),
        ((), {"LOCAL_RANK": "1"}, False),
        ((), {"LOCAL_RANK": "0"}, True),
        (("-q",), {}, False),
        (("--quiet",), {"RANK": "0"}, False),
    ],
)
def test_one_rank_says_what_served_and_none_when_quiet(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    ranks: dict[str, str],
    said: bool,
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, rank in ranks.items():
        monkeypatch.setenv(name, rank)
    monkeypatch.setattr(usage, "summary", lambda: "one line")
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        command_line.main([*options, "-c", "pass"])
    finally:
        flash_attn_npu.uninstall()
    assert capsys.readouterr().err == ("flash_attn_npu: one line\n" if said else "")


def test_a_launcher_starts_it_in_every_worker(python: Run, tmp_path: Path) -> None:
    """The launch of the help text; the workers of a launcher are processes of their own."""
    # to a file each: on the pipe that they share, the lines of both may mix
    (tmp_path / "train.py").write_text(
        "import os, sys, flash_attn\n"
        "with open('rank' + os.environ['RANK'], 'w') as file:\n"
        "    print(flash_attn.flash_attn_func.__module__, sys.argv[1:], file=file)\n"
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = python(*launcher, "-m", "flash_attn_npu", "train.py", "--lr", "1")
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        said = (tmp_path / f"rank{rank}").read_text()
        assert said == "flash_attn_npu.flash_attn_interface ['--lr', '1']\n"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="safe_path came with Python 3.11")
def test_safe_path_is_respected(python: Run) -> None:
    code = "import sys; print(repr(sys.path[0]))"
    ours = python("-P", "-m", "flash_attn_npu", "-c", code)
    assert ours.stdout == python("-P", "-c", code).stdout
