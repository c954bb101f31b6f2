"""What runs a comparison of methods consists of, and that it goes on where it stopped."""

import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import run_command
from detectron2.data import MetadataCatalog

from bags_d2 import BagsError, ConfigError, DataError, MissingFileError
from bags_d2.analysis.comparison import summarize, write_comparison
from bags_d2.analysis.method_runs import BASELINE, Comparison, Kind
from bags_d2.utils.files import FolderInUseError, lock_folder
from bags_d2.utils.processes import ProcessError, run_logged

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
            fixed = {"AP": 7.0, "bAP": 8.0}
            content = {"bbox": measures, "bbox_fixed": fixed if "bags" in str(folder) else {}}
            (folder / "results.json").write_text(json.dumps(content))
        return 60.0


def test_by_default_the_detector_is_trained_once(comparison):
    methods = comparison.methods()
    assert methods[0] == BASELINE
    assert {"bags", "softmax_retrained", "tau_norm", "tau_norm_tail"} <= set(methods)
    assert "seesaw_classifier" in methods
    assert not {"bags_classifier", "baseline_2x_classifier", "ap_fixed"} & set(methods)
    runs = [comparison.run(name, 1) for name in methods[1:]]
    assert Kind.TRAIN not in {run.kind for run in runs}
    assert len(set(methods)) == len(methods)
    with pytest.raises(ConfigError, match="'ap_fixed' changes the detector, the data or how"):
        comparison.run("ap_fixed", 1)


def test_a_baseline_of_any_name_needs_no_further_file(tmp_path):
    config = tmp_path / "detector.yaml"
    config.write_text(f'_BASE_: "{GLYPHS}"\nSTAGE2: {{WEIGHTS: "", MAX_ITER: 9, STEPS: [8]}}\n')
    (tmp_path / "mine.yaml").write_text('MODEL: {ROI_BOX_PREDICTOR: {NAME: "EQLOutputLayers"}}\n')
    comparison = Comparison(config, tmp_path / "out")
    assert "bags" in comparison.methods()
    for method, name in (("bags_beta1", "bags_beta1"), (str(tmp_path / "mine.yaml"), "mine")):
        run = comparison.run(method, 1)
        make, evaluate = comparison.commands(run)
        for command in (make, evaluate):
            assert command[command.index("--config-file") + 1] == str(config)
            assert command[command.index("--method") + 1] == method
        assert run.folder == tmp_path / "out" / name / "seed1"
    assert comparison.run("bags", 1).settings["SOLVER.MAX_ITER"] == "9"


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


def test_what_trains_more_than_classifiers_is_trained_from_images(tmp_path):
    for trainable, heads, kind in (
        ("('roi_heads.box_head*',)", "LongTailROIHeads", Kind.TRAIN),
        ("('roi_heads.box_predictor*',)", "LongTailROIHeads", Kind.FIT),
        ("('roi_heads.box_predictor*',)", "LongTailCascadeROIHeads", Kind.FIT),
    ):
        config, method = tmp_path / "detector.yaml", tmp_path / "part.yaml"
        config.write_text(f'_BASE_: "{GLYPHS}"\nMODEL:\n  ROI_HEADS:\n    NAME: "{heads}"\n')
        method.write_text(f"MODEL:\n  TRAINABLE_PARAMS: {trainable}\n")
        assert Comparison(config, tmp_path).run(str(method), 1).kind is kind


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


def test_classifiers_of_a_detector_are_evaluated_together(comparison):
    comparison.detectors = 1
    runs = comparison.runs([BASELINE, "bags", "tau_norm"], 2)
    assert [(r.method, r.seed, r.detector) for r in runs] == [
        *((BASELINE, 1, 1), ("bags", 1, 1), ("tau_norm", 1, 1)),
        ("bags", 2, 1),  # with its own seed; the others would be the same again
    ]
    states, machine = [], Machine(fails_at=5)
    with pytest.raises(ProcessError):  # the evaluation, after two commands and one for each model
        comparison.make_all(runs, machine, lambda run, state: states.append(state))
    assert states == [kind.value for kind in (Kind.TRAIN, Kind.FIT, Kind.TRANSFORM)]
    command = machine.commands[-1]
    assert command[3] == "evaluate"
    assert command.count("--run") == 2
    for run in runs[1:3]:
        at = command.index(str(run.folder))
        assert command[at - 2 : at] == [run.overlay or BASELINE, str(run.checkpoint)]
    # Models that were made are only evaluated.
    for run in runs[1:3]:
        run.checkpoint.write_bytes(b"model")
    machine = Machine(fails_at=2)
    with pytest.raises(ProcessError):
        comparison.make_all(runs, machine)
    assert [c[3] for c in machine.commands] == ["evaluate", "fit"]


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
    assert rows["bags"]["bAP-fixed"] == {"mean": 8.0, "std": 0.0}
    table = write_comparison(runs, tmp_path, "Title")
    assert "22.0 ± 1.0" in table
    assert "| AP-fixed" in table
    assert "| APr" not in table  # which none of the runs has
    assert (tmp_path / "comparison.md").read_text() == table
    assert json.loads((tmp_path / "comparison.json").read_text()) == summarize(runs)
    lines = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [(row["method"], row["seed"]) for row in lines] == [
        *(("bags", str(seed)) for seed in (1, 2)),
        *((BASELINE, str(seed)) for seed in (1, 2, 3)),
    ]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


@pytest.mark.parametrize("content", ["", '{"bbox": {"AP": 1', "[]", "{}", "nul"])
def test_cut_results_are_not_complete(comparison, content):
    run = comparison.run("bags", 1)
    comparison.make(run, Machine())
    run.results_file.write_text(content)
    assert not run.is_complete


def test_damaged_files_are_named(comparison, tmp_path):
    run = comparison.run("bags", 1)
    comparison.make(run, Machine())
    for content in ('["a"]', "{}", "["):
        (run.folder / "seconds.json").write_text(content)
        with pytest.raises(DataError, match=r"seconds\.json'"):
            summarize([run])
    (run.folder / "seconds.json").unlink()
    run.results_file.write_text('{"bbox": {"AP": "x"}}')
    with pytest.raises(DataError, match=r"results\.json' must hold numbers"):
        summarize([run])
    with pytest.raises(ConfigError, match=r"no measures of --task segm, only bbox"):
        write_comparison([run], tmp_path, "Title", "segm")
    for content in ("[]", "{"):
        (run.folder / "settings.json").write_text(content)
        with pytest.raises(DataError, match=r"settings\.json'"):
            _ = run.is_complete


@pytest.fixture
def own_data(tmp_path, register):
    """A comparison on a data set of its own: function that makes it anew, annotations, image."""
    (tmp_path / "images").mkdir()
    image = tmp_path / "images" / "1.jpg"
    image.write_bytes(b"a picture")
    content = {
        "categories": [{"id": i, "name": n} for i, n in enumerate("ab", 1)],
        "images": [{"id": 1, "file_name": "1.jpg", "height": 20, "width": 30}],
        "annotations": [],
    }
    annotations = tmp_path / "a.json"
    annotations.write_text(json.dumps(content))
    files = {"json_file": str(annotations), "image_root": str(tmp_path / "images")}
    name = register(f"own_{tmp_path.name}", *files.values())

    def make():
        MetadataCatalog.remove(name)  # as in a new process
        MetadataCatalog.get(name).set(**files)
        names = f"('{name}',)"
        opts = ["DATASETS.TRAIN", names, "DATASETS.TEST", names]
        comparison = Comparison(GLYPHS, tmp_path / "compare", opts)
        comparison.require_data()
        return comparison

    return make, annotations, image


def swap_classes(annotations, image):
    text = annotations.read_text()  # another order of the classes, and the same size
    annotations.write_text(text.replace('"a"', '"c"').replace('"b"', '"a"').replace('"c"', '"b"'))


def touch_image(annotations, image):
    os.utime(image, (1, 1))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (swap_classes, "annotation file of own_"),
        (touch_image, "set of images of own_"),
        (lambda _, image: image.write_bytes(b"another picture"), "set of images of own_"),
        (lambda _, image: image.unlink(), "set of images of own_"),
    ],
)
def test_runs_of_other_data_are_refused(own_data, edit, words):
    make, annotations, image = own_data
    run = make().run(BASELINE, 1)
    make().make(run, Machine())
    assert make().run(BASELINE, 1).is_complete
    edit(annotations, image)
    with pytest.raises(ConfigError, match=rf"baseline/seed1'.*{words}.*delete it or"):
        _ = make().run(BASELINE, 1).is_complete
    assert run.is_complete  # a report needs no data


def test_runs_from_another_detector_are_refused(comparison):
    detector = comparison.detector(1)
    detector.parent.mkdir(parents=True)
    detector.write_bytes(b"weights")
    run = comparison.run("bags", 1)
    comparison.make(run, Machine())
    assert run.is_complete
    assert run.is_recorded
    detector.write_bytes(b"retrain")  # of the same size
    with pytest.raises(ConfigError, match=r"bags/seed1'.*initial checkpoint is .* there and"):
        _ = run.is_complete
    detector.unlink()  # its results are kept
    assert run.is_complete


def test_runs_of_earlier_versions_are_taken_as_they_are(own_data):
    run = own_data[0]().run(BASELINE, 1)
    own_data[0]().make(run, Machine())
    path = run.folder / "settings.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if " " not in k}))
    touch_image(*own_data[1:])
    run = own_data[0]().run(BASELINE, 1)
    assert run.is_complete
    assert not run.is_recorded


def test_faulty_arguments_are_refused_in_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"glyphs_bags\.yaml' is a stage 2; name the config"):
        Comparison(ROOT / "configs" / "glyphs_bags.yaml", tmp_path)
    with pytest.raises(MissingFileError, match="no method 'nothing'"):
        Comparison(GLYPHS, tmp_path).run("nothing", 1)
    with pytest.raises(ConfigError, match=r"SOLVER\.MAX_ITER is 0"):
        Comparison(GLYPHS, tmp_path, ["SOLVER.MAX_ITER", "0"]).run(BASELINE, 1)
    with pytest.raises(ConfigError, match=r"'nowhere' .* is not registered"):
        Comparison(GLYPHS, tmp_path, ["DATASETS.TRAIN", "('nowhere',)"]).require_data()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match=r"glyphs_train\.json.*build it with"):
        Comparison(GLYPHS, tmp_path).require_data()
    for arguments, message in (
        (["--methods", ","], "names none, such as baseline, "),
        (["--methods", ""], "names none, such as baseline, "),
        (["--seeds", "0"], "--seeds must be 1 or more"),
        (["--report-only"], "No run in .* is complete"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare(["--output", str(tmp_path / "out"), *arguments], monkeypatch)


def compare(arguments, monkeypatch):
    """bags-d2 compare in this process."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    run_command("compare", "--config-file", GLYPHS, *arguments)


def test_two_comparisons_in_one_folder(tmp_path, monkeypatch):
    holder = rf"is in use by process {os.getpid()} "
    with lock_folder(tmp_path), pytest.raises(FolderInUseError, match=holder):
        compare(["--output", str(tmp_path)], monkeypatch)


def test_a_report_beside_a_comparison_at_work_and_without_unicode(tmp_path, monkeypatch):
    comparison = Comparison(GLYPHS, tmp_path)
    for seed in (1, 2):
        comparison.make(comparison.run(BASELINE, seed), Machine())
    with lock_folder(tmp_path):
        compare(["--output", str(tmp_path), "--report-only"], monkeypatch)
    assert "±" in (tmp_path / "comparison.md").read_text(encoding="utf-8")


def test_a_command_ends_with_the_process_that_runs_it(tmp_path):
    child = "import os, time; print(' iter: ', os.getpid(), flush=True); time.sleep(60)"
    code = (
        "import sys; from pathlib import Path\n"
        "from bags_d2.utils.processes import run_logged\n"
        f"run_logged([sys.executable, '-c', {child!r}], Path({str(tmp_path / 'log')!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline().split()[-1])
    os.kill(pid, 0)  # it is there
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the command goes on")


def test_a_failing_command_is_an_error_with_its_last_words(tmp_path):
    command = [sys.executable, "-c", "print('first'); raise SystemExit('last words')"]
    with pytest.raises(ProcessError, match="last words"):
        run_logged(command, tmp_path / "log.txt")
    assert "first" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_the_tool_trains_fits_and_evaluates_from_any_folder(datasets_root, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_root))
    (tmp_path / "tiny.yaml").write_text(f'_BASE_: "{ROOT}/tests/tiny.yaml"\n')
    command = [sys.executable, "-m", "bags_d2", "compare"]
    command += ["--methods", "bags", "--seeds", "1"]
    command += ["--config-file", "tiny.yaml", "--output", "out"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "[2/2] bags, seed 1: fitting the classifier" in first.stdout
    assert (tmp_path / "out" / "features" / "seed1" / "cache.json").is_file()
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert {row["method"] for row in rows} == {BASELINE, "bags"}
    assert all(row["AP"]["mean"] is not None and row["seconds"] > 0 for row in rows)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout.count(": complete") == 2
