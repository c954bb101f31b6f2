"""bags-d2 auto: what it chooses and writes, and that the commands it shows do what it does."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import own_data
import pytest
import yaml
from commands import bags_d2, run_command

from bags_d2 import ConfigError, DataError, MissingFileError, cli
from bags_d2.analysis.auto import choose_settings, make_plan
from bags_d2.data.annotations import check_annotations
from bags_d2.data.formats import find_dataset
from bags_d2.data.formats.convert import convert_dataset
from bags_d2.engine import setup_cfg
from bags_d2.utils.files import load_json

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "tests" / "tiny.yaml")


def annotations(boxes, side, images=10):
    """A set of one class with these boxes (width, height) on each image."""
    rows = [
        {"id": i, "file_name": f"{i}.png", "height": side, "width": 2 * side} for i in range(images)
    ]
    objects = [
        {"id": i * len(boxes) + j, "image_id": i, "category_id": 1, "bbox": [0, 0, *box]}
        for i in range(images)
        for j, box in enumerate(boxes)
    ]
    content = {"images": rows, "annotations": objects, "categories": [{"id": 1, "name": "a"}]}
    return check_annotations("set", content)


def choose(train, *opts, base="lvis_baseline_R50.yaml", num_gpus=1):
    cfg = setup_cfg(argparse.Namespace(config_file=base, opts=list(opts)))
    return choose_settings(cfg, train, num_gpus, opts[::2])


def test_large_objects_on_large_images_keep_the_base():
    chosen = choose(annotations([(60, 60)] * 4, 480), num_gpus=8)
    cfg = setup_cfg(argparse.Namespace(config_file="lvis_baseline_R50.yaml", opts=[]))
    for key in (
        *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "MODEL.RPN.POST_NMS_TOPK_TEST", "INPUT.MIN_SIZE_TRAIN"),
        *("INPUT.MAX_SIZE_TEST", "MODEL.ANCHOR_GENERATOR.SIZES", "SOLVER.BASE_LR"),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "SOLVER.IMS_PER_BATCH"),
        *("TEST.DETECTIONS_PER_IMAGE", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"),
    ):
        value = cfg
        for name in key.split("."):
            value = value[name]
        assert chosen[key] == (list(value) if isinstance(value, tuple) else value), key
    assert chosen["SOLVER.MAX_ITER"] == 500  # 8,000 images at 16


def test_small_thin_and_many_objects():
    chosen = choose(annotations([(16, 4)] * 400, 1000))
    assert chosen["INPUT.MIN_SIZE_TEST"] == 1600  # twice the base's: the object is 13 pixels
    assert chosen["INPUT.MAX_SIZE_TRAIN"] == 2666
    assert chosen["MODEL.ANCHOR_GENERATOR.SIZES"] == [[16], [32], [64], [128], [256]]
    assert chosen["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"] == [[0.25, 0.5, 1, 2, 4]]
    assert chosen["MODEL.RPN.POST_NMS_TOPK_TEST"] == 2000
    assert chosen["MODEL.RPN.PRE_NMS_TOPK_TRAIN"] == 4000
    assert chosen["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"] == 2048
    assert chosen["TEST.DETECTIONS_PER_IMAGE"] == 400
    assert chosen["SOLVER.IMS_PER_BATCH"] == 1
    assert chosen["SOLVER.BASE_LR"] == 0.01 / 16
    assert choose(annotations([(8, 8)], 100))["INPUT.MIN_SIZE_TEST"] == 200  # of images of 100


def test_the_schedule_follows_from_images_batch_and_what_is_given():
    train = annotations([(60, 60)], 480, images=2000)
    chosen = choose(train, num_gpus=2)
    assert chosen["SOLVER.IMS_PER_BATCH"] == 8
    assert chosen["SOLVER.BASE_LR"] == 0.005
    assert chosen["SOLVER.MAX_ITER"] == 3000
    assert chosen["SOLVER.STEPS"] == [2000, 2750]
    assert (chosen["STAGE2.MAX_ITER"], chosen["STAGE2.STEPS"]) == (1500, [1000, 1375])
    chosen = choose(train, "SOLVER.MAX_ITER", "60", "SOLVER.IMS_PER_BATCH", "4", num_gpus=0)
    assert (chosen["SOLVER.IMS_PER_BATCH"], chosen["SOLVER.BASE_LR"]) == (4, 0.01)
    assert (chosen["SOLVER.STEPS"], chosen["STAGE2.MAX_ITER"]) == ([40, 55], 30)
    assert chosen["MODEL.DEVICE"] == "cpu"
    for steps in range(1, 30):  # steps of decay lie within a schedule, one after the other
        chosen = choose(train, "SOLVER.MAX_ITER", str(steps))
        for part in ("SOLVER", "STAGE2"):
            points = [0, *chosen[f"{part}.STEPS"], chosen[f"{part}.MAX_ITER"]]
            assert points == sorted(set(points))
    assert choose(train, num_gpus=3)["SOLVER.IMS_PER_BATCH"] % 3 == 0


@pytest.fixture
def mine(tmp_path):
    own_data.build(tmp_path / "mine")
    return tmp_path / "mine"


def plan(*arguments):
    _, args = cli.parse_args(
        ["auto", "--config-file", TINY, "--num-gpus", "0", *map(str, arguments)]
    )
    return make_plan(args)


def test_a_plan_of_sets_that_there_are(mine, tmp_path):
    made = plan(mine, "--output", tmp_path / "out", "--opts", "SOLVER.MAX_ITER", "8")
    assert [path.name for path in made.files] == ["mine_auto_baseline.yaml"]
    made.write()
    cfg = setup_cfg(argparse.Namespace(config_file=str(next(iter(made.files))), opts=[]))
    assert cfg.DATASETS.REGISTER[0] == [
        *("mine_auto_train", "coco", str(mine / "train.json"), str(mine / "images")),
    ]
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("mine_auto_train",), ("mine_auto_val",))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 7
    assert cfg.MODEL.BAGS.GROUP_THRESHOLDS == (10,)
    assert (cfg.SOLVER.MAX_ITER, cfg.STAGE2.MAX_ITER) == (8, 4)
    for words in made.commands:
        cli.parse_args(words)


def test_a_plan_with_a_split_masks_and_weights(mine, tmp_path):
    weights = tmp_path / "model.pth"
    weights.write_bytes(b"")
    (mine / "val.json").unlink()
    arguments = (mine, "--masks", "--weights", weights, "--output", tmp_path / "out")
    made = plan(*arguments)
    config, train, val = made.files
    content = yaml.safe_load(made.files[config])
    assert content["MODEL"]["WEIGHTS"] == str(weights)
    assert content["MODEL"]["MASK_ON"] is True
    assert content["INPUT"]["MASK_FORMAT"] == "polygon"
    assert content["DATASETS"]["REGISTER"][1][1:3] == ["coco", str(tmp_path / "out" / "val.json")]
    shares = [len(json.loads(made.files[path])["images"]) for path in (train, val)]
    assert sum(shares) == len(json.loads((mine / "train.json").read_text())["images"])
    assert 0 < shares[1] <= sum(shares) / 5
    assert (
        made.files
        == plan(mine, "--masks", "--weights", weights, "--output", tmp_path / "out").files
    )
    assert all("segm" in words for words in made.commands[1:])


def test_codes_are_trained_as_bitmaps_unless_they_are_of_crowds(mine, tmp_path):
    content = json.loads((mine / "train.json").read_text())
    (row,) = content["images"][:1]
    for crowd, mask_format in ((1, "polygon"), (0, "bitmask")):
        size = [row["height"], row["width"]]
        code = {"size": size, "counts": [0, size[0] * size[1]]}
        own = {"segmentation": code, "iscrowd": crowd}
        content["annotations"][0] |= {**own, "image_id": row["id"], "bbox": [0, 0, *size[::-1]]}
        (mine / "train.json").write_text(json.dumps(content))
        files = plan(mine, "--masks", "--output", tmp_path / "out").files
        assert yaml.safe_load(next(iter(files.values())))["INPUT"]["MASK_FORMAT"] == mask_format


def test_a_folder_that_was_begun_otherwise_is_refused_and_an_edited_config_stays(mine, tmp_path):
    out = tmp_path / "out"
    made = plan(mine, "--output", out)
    made.write()
    config = next(iter(made.files))
    config.write_text(config.read_text() + "# mine\n")
    plan(mine, "--output", out).write()
    assert config.read_text().endswith("# mine\n")
    with pytest.raises(ConfigError, match=r"out' was begun .*: --seed is 1 there and 2 now; name"):
        plan(mine, "--output", out, "--seed", "2").write()
    with pytest.raises(ConfigError, match=r"SOLVER\.MAX_ITER is not set there and 9 now"):
        plan(mine, "--output", out, "--opts", "SOLVER.MAX_ITER", "9").write()
    (mine / "val.json").write_text((mine / "val.json").read_text() + " ")
    with pytest.raises(ConfigError, match="annotations of mine_val is"):
        plan(mine, "--output", out).write()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([], ConfigError, "Name either DATA or rows"),
        (["nowhere"], MissingFileError, "'nowhere' does not exist"),
        (["mine", "--weights", "none.pth"], MissingFileError, r"'none\.pth' does not exist"),
        (["mine", "--config-file", "none.yaml"], MissingFileError, r"none\.yaml"),
        (["mine", "--opts", "SOLVER.NOTHING", "1"], ConfigError, r"SOLVER\.NOTHING"),
        (["mine", "--opts", "SEED"], ConfigError, "odd length"),
        (["mine", "--opts", "SOLVER.SCHEDULE_FACTOR", "2"], ConfigError, r"set SOLVER\.MAX_ITER"),
        (["empty.json"], DataError, "there are no objects"),
        (["mine", "--output", "mine/out"], ConfigError, "'mine/out' lies in 'mine'.*--output"),
    ],
)
def test_what_is_faulty_is_one_sentence(arguments, error, message, mine, monkeypatch):
    monkeypatch.chdir(mine.parent)
    content = json.loads((mine / "train.json").read_text())
    rows = [{**row, "file_name": f"mine/images/{row['file_name']}"} for row in content["images"]]
    empty = content | {"images": rows, "annotations": []}
    Path("empty.json").write_text(json.dumps(empty))
    with pytest.raises(error, match=message) as raised:
        plan(*arguments)
    assert "\n" not in str(raised.value)


def test_a_dry_run_writes_nothing(mine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_command("auto", mine, "--config-file", TINY, "--num-gpus", "0", "--dry-run")
    shown = capsys.readouterr().out
    assert "NUM_CLASSES: 7" in shown
    assert shown.count("\n$ bags-d2 ") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


@pytest.mark.slow
def test_formats_agree_and_the_commands_shown_do_the_same_by_hand(mine, tmp_path):
    """Boxes, scores and measures of three runs: two by auto, and one by the commands it shows."""
    flags = ["--config-file", TINY, "--num-gpus", "0", "--opts", "SOLVER.MAX_ITER", "30"]
    convert_dataset(find_dataset(mine), "yolo", tmp_path / "yolo")
    convert_dataset(find_dataset(mine), "voc", tmp_path / "voc")
    found = {}
    for kind, data in (("coco", mine), ("yolo", tmp_path / "yolo"), ("voc", tmp_path / "voc")):
        out = tmp_path / f"{kind}_out"
        words = ["auto", str(data), "--output", str(out), *flags]
        if kind == "voc":
            plan = make_plan(cli.parse_args(words)[1])
            plan.write()
            shown = [bags_d2(*command) for command in plan.commands]
        else:
            shown = [bags_d2(*words)]
        assert not any(done.returncode for done in shown), shown[-1].stderr
        groups = re.search(r" group  training.*?At the edges", shown[0].stdout, re.DOTALL)[0]
        (config,) = out.glob("*_baseline.yaml")
        found[kind] = [groups, yaml.safe_load(config.read_text()) | {"DATASETS": None}]
        for method in ("baseline", "bags_one_group+cosine", "crt+cosine"):
            folder = out / method / "seed1" / "inference"
            (path,) = folder.glob("*/coco_instances_results.json")
            rows = [(r["category_id"], r["score"], *r["bbox"]) for r in load_json(path)]
            measures = load_json(folder / "results.json")["bbox"]
            for size in "sml":  # by areas, which not all formats have
                del measures[f"AP{size}"]
            found[kind] += [measures, np.array(rows)]
        assert "crt+cosine" in (out / "comparison.md").read_text()
        assert "crt+cosine" in (out / "report.html").read_text()
    for kind in ("yolo", "voc"):
        for own, other in zip(found[kind], found["coco"], strict=True):
            if isinstance(own, np.ndarray):
                # Category ids are those of the format.
                np.testing.assert_allclose(own[:, 1:], other[:, 1:], rtol=1e-4, atol=1e-4)
            else:
                assert own == other
    assert found["coco"][2]["AP"] > 0


@pytest.mark.slow
def test_killed_it_resumes_with_the_same_command(mine, tmp_path):
    words = ["auto", str(mine), "--config-file", TINY, "--num-gpus", "0", "--output", "out"]
    command = [sys.executable, "-m", "bags_d2", *words, "--opts", "SOLVER.MAX_ITER", "40"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert any(" iter: 19 " in line for line in process.stdout)
        process.kill()
    begun = tmp_path / "out" / "baseline" / "seed1"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Starting training from iteration [12]0", (begun / "console.txt").read_text())
    assert (tmp_path / "out" / "report.html").is_file()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout.count(": complete") == 3
