"""What runs a comparison of methods consists of, and that it goes on where it stopped."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bags_d2 import BagsError, ConfigError, MissingFileError
from bags_d2.analysis.comparison import summarize, write_report
from bags_d2.engine.comparison import BASELINE, Comparison, Kind
from bags_d2.engine.logged_process import ProcessError, run_logged

ROOT = Path(__file__).resolve().parents[2]
GLYPHS = ROOT / "configs" / "glyphs_baseline.yaml"


@pytest.fixture
def comparison(tmp_path):
    return Comparison(GLYPHS, tmp_path / "compare", ["SOLVER.MAX_ITER", "7"])


class Machine:
    """Stands in for running commands: leaves the files that they would."""

    def __init__(self, fails_at=None):
        self.commands = []
        self.fails_at = fails_at

    def __call__(self, command, log):
        self.commands.append(command)
        if len(self.commands) == self.fails_at:
            raise ProcessError("the power went")
        if "--eval-only" in command:
            folder = Path(command[command.index("OUTPUT_DIR") + 1]) / "inference"
            folder.mkdir(parents=True, exist_ok=True)
            measures = dict.fromkeys(("AP", "AP50", "AP1", "AP2", "AP3", "AP4", "bAP"), 10.0)
            seed = int(command[command.index("SEED") + 1])
            measures |= {"AP": 20.0 + seed, "APr": None, "APc": 3.0, "APf": 4.0}
            measures["bAP"] = 10.0 * seed + (seed if "bags" in str(folder) else 0)
            (folder / "results.json").write_text(json.dumps({"bbox": measures}))
        return 60.0


def test_methods_are_the_configs_beside_the_baseline(comparison):
    methods = comparison.methods()
    assert methods[0] == BASELINE
    assert {"bags", "softmax_retrained", "tau_norm", "tau_norm_tail"} <= set(methods)
    assert len(set(methods)) == len(methods)
    lvis = Comparison(ROOT / "configs" / "lvis_baseline_R50.yaml", Path("anywhere")).methods()
    assert "bags" in lvis
    # Other data and other detectors are no methods, though the names fit.
    assert not {"v0.5_bags", "bags_mask", "v0.5_baseline"} & set(lvis)


@pytest.mark.parametrize(
    ("method", "kind", "trained", "from_detector"),
    [
        (BASELINE, Kind.TRAIN, "all", False),
        ("bags", Kind.FIT, "classifier", True),
        ("tau_norm", Kind.TRANSFORM, "nothing", True),
    ],
)
def test_how_the_model_of_a_run_comes_about(comparison, method, kind, trained, from_detector):
    run = comparison.run(method, 2)
    assert (run.kind, run.trained, run.from_detector) == (kind, trained, from_detector)
    assert run.settings["SOLVER.MAX_ITER"] == "7"
    make, evaluate = comparison.commands(run)
    detector = str(comparison.detector(2))
    assert (detector in make) == from_detector
    assert evaluate[-2:] == ["MODEL.WEIGHTS", str(run.checkpoint)]
    assert "--eval-only" in evaluate


def test_what_trains_a_part_or_a_cascade_is_trained_from_images(comparison, tmp_path):
    config = tmp_path / "glyphs_part.yaml"
    for trainable, heads, kind in (
        ("('roi_heads.box_head*',)", "LongTailROIHeads", Kind.TRAIN),
        ("('roi_heads.box_predictor*',)", "LongTailROIHeads", Kind.FIT),
        ("('roi_heads.box_predictor*',)", "LongTailCascadeROIHeads", Kind.TRAIN),
    ):
        config.write_text(
            f'_BASE_: "{GLYPHS}"\nMODEL:\n  TRAINABLE_PARAMS: {trainable}\n'
            f'  ROI_HEADS:\n    NAME: "{heads}"\n'
        )
        (tmp_path / "glyphs_baseline.yaml").write_text(f'_BASE_: "{GLYPHS}"\n')
        of_folder = Comparison(tmp_path / "glyphs_baseline.yaml", tmp_path)
        assert of_folder.run("part", 1).kind is kind


def test_nothing_is_done_twice(comparison):
    run = comparison.run("bags", 1)
    machine = Machine()
    assert not run.is_complete
    comparison.make(run, machine)
    assert len(machine.commands) == 2
    assert run.is_complete
    assert run.seconds == 60.0


def test_an_interrupted_run_goes_on(comparison):
    run = comparison.run("bags", 1)
    for fails_at in (1, 2):
        with pytest.raises(BagsError):
            comparison.make(run, Machine(fails_at))
        assert not run.is_complete
    comparison.make(run, Machine())
    assert run.is_complete
    # Of three attempts the first never ended; what the other two took is added up.
    assert run.seconds == 120.0


def test_a_run_of_other_settings_is_not_taken_for_this_one(comparison):
    run = comparison.run("bags", 1)
    comparison.make(run, Machine())
    other = Comparison(GLYPHS, comparison.output, ["SOLVER.MAX_ITER", "8"]).run("bags", 1)
    with pytest.raises(ConfigError, match=r"SOLVER\.MAX_ITER is 7 there and 8 now.*--output"):
        assert other.is_complete
    # Where it runs, and how many workers read images, makes no difference.
    elsewhere = ["SOLVER.MAX_ITER", "7", "DATALOADER.NUM_WORKERS", "5", "MODEL.DEVICE", "cuda"]
    assert Comparison(GLYPHS, comparison.output, elsewhere).run("bags", 1).is_complete


def test_the_report_has_means_over_seeds_and_every_run(comparison, tmp_path):
    runs = [comparison.run(m, s) for m in (BASELINE, "bags") for s in (1, 2, 3)][:5]
    for run in runs:
        comparison.make(run, Machine())
    rows = {row["method"]: row for row in summarize(runs)}
    assert rows[BASELINE]["AP"] == {"mean": 22.0, "std": 1.0}
    assert rows["bags"]["AP"]["mean"] == 21.5
    assert rows["bags"]["APr"] == {"mean": None, "std": None}
    assert rows["bags"]["seeds"] == [1, 2]
    # Of bAP 11 and 22 over 10 and 20 of the same seeds.
    assert rows["bags"]["gain"] == {"mean": 1.5, "std": pytest.approx(0.5**0.5)}
    assert rows[BASELINE]["gain"] == {"mean": 0.0, "std": 0.0}
    assert all(row["gain"]["mean"] is None for row in summarize(runs[3:]))
    table = write_report(runs, tmp_path, "Title")
    assert "22.0 ± 1.0" in table
    assert (tmp_path / "comparison.md").read_text() == table
    assert json.loads((tmp_path / "comparison.json").read_text()) == summarize(runs)
    lines = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [(row["method"], row["seed"]) for row in lines] == [
        *(("bags", str(seed)) for seed in (1, 2)),
        *((BASELINE, str(seed)) for seed in (1, 2, 3)),
    ]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_faulty_arguments_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="must have 'baseline' in its name"):
        Comparison(ROOT / "configs" / "glyphs_bags.yaml", tmp_path)
    with pytest.raises(MissingFileError, match="glyphs_nothing"):
        Comparison(GLYPHS, tmp_path).run("nothing", 1)


def test_a_failing_command_is_an_error_with_its_last_words(tmp_path):
    command = [sys.executable, "-c", "print('first'); raise SystemExit('last words')"]
    with pytest.raises(ProcessError, match="last words"):
        run_logged(command, tmp_path / "log.txt")
    assert "first" in (tmp_path / "log.txt").read_text()


def test_the_tool_trains_fits_and_evaluates(datasets_root, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_root))
    tiny = ROOT / "tests" / "tiny.yaml"
    (tmp_path / "tiny_baseline.yaml").write_text(f'_BASE_: "{tiny}"\n')
    (tmp_path / "tiny_bags.yaml").write_text(
        '_BASE_: "tiny_baseline.yaml"\nMODEL:\n  WEIGHTS: "the detector"\n'
        '  ROI_BOX_PREDICTOR:\n    NAME: "BAGSOutputLayers"\n'
        '  TRAINABLE_PARAMS: ("roi_heads.box_predictor*cls_score.*",)\n'
    )
    command = [sys.executable, "tools/compare_methods.py", "--methods", "bags", "--seeds", "1"]
    command += ["--config-file", str(tmp_path / "tiny_baseline.yaml"), "--output", str(tmp_path)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "[2/2] bags, seed 1: fitting the classifier" in first.stdout
    assert (tmp_path / "features" / "seed1" / "cache.json").is_file()
    rows = json.loads((tmp_path / "comparison.json").read_text())
    assert {row["method"] for row in rows} == {BASELINE, "bags"}
    assert all(row["AP"]["mean"] is not None and row["seconds"] > 0 for row in rows)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.stdout.count(": complete") == 2
