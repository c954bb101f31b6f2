"""bags-d2: its table of commands, their help, and how errors and Ctrl-C end it."""

import importlib
import os
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import bags_d2
from detectron2.engine import default_argument_parser

from bags_d2 import ConfigError, cli

ROOT = Path(__file__).resolve().parents[1]
MODULES = {m.name.replace("_", "-") for m in pkgutil.iter_modules(cli.__path__)} - {"flags"}


def test_every_module_is_a_command_and_listed_once(capsys):
    assert set(cli.COMMANDS) >= MODULES
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(listed) == sorted(MODULES)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", sorted(MODULES))
def test_help_has_an_example_and_says_what_flags_do(name):
    parser = cli.build_parser(name)
    text = parser.format_help()
    assert f"\nExample:\n    bags-d2 {name} " in text
    for action in parser._actions:
        assert action.help, action
        if action.nargs != 0 and action.default not in (None, [], "", "==SUPPRESS=="):
            assert "default" in action.help or f"(default: {action.default})" in " ".join(
                text.split()
            )


def test_help_imports_neither_torch_nor_what_needs_it():
    code = (
        "import sys; from bags_d2 import cli\n"
        "for name in cli._commands(): cli.build_parser(name).format_help()\n"
        "cli._overview()\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "detectron2", "yaml"} & set(done.stdout.split())


def test_train_has_the_flags_of_detectron2():
    ours, theirs = cli.build_parser("train"), default_argument_parser()
    options = ["--eval-only", "--num-gpus", "8", "--machine-rank", "1", "A.B", "('x',)"]
    args = ["--config-file", "x.yaml", "--resume", "--dist-url", "tcp://a:1", *options]
    expected = vars(theirs.parse_args(args))
    assert vars(ours.parse_args(args)) == {**expected, "method": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tarin"], "There is no command 'tarin'"),
        (["train"], "arguments are required: --config-file; see 'bags-d2 train --help'"),
        (["report"], "arguments are required: OUTPUT_DIR"),
    ],
)
def test_a_wrong_line_is_refused_in_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ")
    assert message in line


@pytest.mark.parametrize(
    ("raised", "code", "sentence"),
    [
        (ConfigError("MODEL.X is wrong."), "Error: MODEL.X is wrong.", ""),
        (ModuleNotFoundError("No", name="detectron2"), "Error: Detectron2 is not installed", ""),
        (KeyboardInterrupt(), 130, "Interrupted. Run the same command with --resume to go on"),
    ],
)
def test_how_a_command_ends(raised, code, sentence, monkeypatch, capsys):
    def run(_):
        raise raised

    monkeypatch.setattr(importlib.import_module("bags_d2.cli.train"), "run", run)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--config-file", "x.yaml"])
    assert str(ended.value.code).startswith(str(code))
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "num_workers"), [("1", "2"), ("2", "1")])
def test_ctrl_c_in_a_training_is_one_sentence(num_processes, num_workers, datasets_root, tmp_path):
    command = [sys.executable, "-m", "bags_d2", "train", "--config-file", f"{ROOT}/tests/tiny.yaml"]
    command += ["--num-gpus", num_processes, "SOLVER.MAX_ITER", "5000", "OUTPUT_DIR", "out"]
    process = subprocess.Popen(
        [*command, "DATALOADER.NUM_WORKERS", num_workers],
        cwd=tmp_path,
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets_root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Not ignored, as in what a shell has put into the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert any(" iter: " in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    how = importlib.import_module("bags_d2.cli.train").INTERRUPTED
    assert errors.split("\n") == ["", f"Interrupted. {how}", ""]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--method", "bags")])
def test_a_config_of_the_package_needs_no_checkout(arguments, datasets_root, tmp_path):
    done = bags_d2(
        *("train", "--config-file", "configs/glyphs_baseline.yaml", *arguments),
        *("DATASETS.TRAIN", "('glyphs_tiny_train',)", "DATASETS.TEST", "()", "SOLVER.STEPS", "()"),
        *("MODEL.ROI_HEADS.NUM_CLASSES", "6", "SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "1"),
        *("OUTPUT_DIR", "out", "MODEL.WEIGHTS", ""),
        cwd=tmp_path,
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets_root)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "out" / "model_final.pth").is_file()
