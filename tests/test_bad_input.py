"""Bad input is refused in one sentence that names the file or key: docs/reliability.md by row.

Every case is one row of the page's first table, under the same name.
"""

import contextlib
import copy
import errno
import json
import math
import re
import resource
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepare_glyphs import build_glyphs

from bags_d2 import BagsError, BAGSTrainer
from bags_d2.engine import LongTailCheckpointer, check_files, process_count, setup_cfg, training
from bags_d2.errors import exit_on_user_error, one_sentence

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "tests" / "tiny.yaml")
PAGE = (ROOT / "docs" / "reliability.md").read_text()

CONTENT = {
    "categories": [{"id": i, "name": n} for i, n in enumerate("abcdef", start=1)],
    "images": [{"id": 1, "file_name": "1.jpg", "height": 20, "width": 30}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 12}
    ],
}


def edited(edit):
    content = copy.deepcopy(CONTENT)
    edit(content)
    return json.dumps(content)


def with_box(box):
    return edited(lambda c: c["annotations"][0].update(bbox=box))


def twice(section):
    return edited(lambda c: c[section].append(copy.deepcopy(c[section][0])))


# Row: (text of the annotation file; None for no file, what the message says).
ANNOTATIONS = {
    "annotations missing": (None, r"does not exist"),
    "annotations truncated": (json.dumps(CONTENT)[:150], r"is not valid JSON"),
    "annotations not JSON": ("<html>", r"is not valid JSON"),
    "annotations a list": ("[]", r"has no list 'images'"),
    "no list of categories": (edited(lambda c: c.pop("categories")), r"has no list 'categories'"),
    "no category": (edited(lambda c: c["categories"].clear()), r"has no categories"),
    "no list of annotations": (
        edited(lambda c: c.pop("annotations")),
        r"'annotations' are missing or empty",
    ),
    "category without a name": (
        edited(lambda c: c["categories"][0].pop("name")),
        r"category 1 has no name",
    ),
    "duplicate category ids": (twice("categories"), r"category id 1 occurs twice"),
    "duplicate image ids": (twice("images"), r"image id 1 occurs twice"),
    "duplicate annotation ids": (twice("annotations"), r"annotation id 1 occurs twice"),
    "image without a size": (
        edited(lambda c: c["images"][0].pop("width")),
        r"image 1 has width None",
    ),
    "image without a file name": (
        edited(lambda c: c["images"][0].pop("file_name")),
        r"image 1 has no file_name",
    ),
    "negative box": (with_box([1, 2, -3, 4]), r"annotation 1 has bbox \[1, 2, -3, 4\]"),
    "NaN in a box": (with_box([1, math.nan, 3, 4]), r"annotation 1 has bbox \[1, nan, 3, 4\]"),
    "box without four numbers": (with_box([1, 2, 3]), r"annotation 1 has bbox \[1, 2, 3\]"),
    "unknown category": (
        edited(lambda c: c["annotations"][0].update(category_id=77)),
        r"annotation 1 has category_id 77",
    ),
    "unknown image": (
        edited(lambda c: c["annotations"][0].update(image_id="x")),
        r"annotation 1 has image_id 'x'",
    ),
}
# Row: (options, what the message says), with six classes in the data set.
OPTIONS = {
    "another number of classes": (["MODEL.ROI_HEADS.NUM_CLASSES", "5"], r"set it to 6"),
    "thresholds unsorted": (
        ["MODEL.BAGS.GROUP_THRESHOLDS", "(100, 10)"],
        r"strictly increasing.*\(100, 10\)",
    ),
    "beta negative": (["MODEL.BAGS.OTHERS_SAMPLE_RATIO", "-1.0"], r"OTHERS_SAMPLE_RATIO must be"),
    "counts file of wrong length": (
        ["MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "{tmp}/short.json"],
        r"short\.json' has 2 classes but",
    ),
    "counts file with negatives": (
        ["MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "{tmp}/negative.json"],
        r"negative\.json' must hold a JSON list of whole numbers of 0 or more",
    ),
    "counts file missing": (
        ["MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "{tmp}/none.json"],
        r"none\.json' does not exist",
    ),
    "unknown predictor": (["MODEL.ROI_BOX_PREDICTOR.NAME", "NoSuchLayers"], r"NoSuchLayers"),
    "globs that match nothing": (
        ["MODEL.TRAINABLE_PARAMS", "('no.such.*',)"],
        r"'no\.such\.\*' matches no trainable parameter",
    ),
    "unknown key": (["MODEL.BAGS.NO_SUCH_KEY", "1"], r"NO_SUCH_KEY"),
    "integer for a float": (["MODEL.BAGS.OTHERS_SAMPLE_RATIO", "8"], r"OTHERS_SAMPLE_RATIO"),
    "unknown sampler": (["DATALOADER.SAMPLER_TRAIN", "NoSampler"], r"SAMPLER_TRAIN is 'NoSampler'"),
    "data set not registered": (["DATASETS.TRAIN", "('no_set',)"], r"'no_set'.*is not registered"),
    "no CUDA device": (["MODEL.DEVICE", "cuda"], r"there is no CUDA device"),
    "output folder not writable": (["OUTPUT_DIR", "/proc/none"], r"OUTPUT_DIR '/proc/none' cannot"),
    "checkpoint missing": (["MODEL.WEIGHTS", "none.pth"], r"'none\.pth' \(MODEL\.WEIGHTS\)"),
    "checkpoint truncated": (["MODEL.WEIGHTS", "{tmp}/half.pth"], r"is truncated or not a checkp"),
    "not a checkpoint": (["MODEL.WEIGHTS", "{tmp}/short.json"], r"is truncated or not a checkp"),
    "checkpoint a folder": (["MODEL.WEIGHTS", "{tmp}"], r"\(MODEL\.WEIGHTS\) does not exist"),
    "batch of no image": (
        ["SOLVER.IMS_PER_BATCH", "0"],
        r"IMS_PER_BATCH is 0; it must be at least 1",
    ),
    "batch that processes cannot share": (
        ["SOLVER.IMS_PER_BATCH", "3"],
        r"IMS_PER_BATCH is 3, which 2 processes cannot share",
    ),
    "checkpoint period 0": (["SOLVER.CHECKPOINT_PERIOD", "0"], r"CHECKPOINT_PERIOD is 0"),
    "negative number of steps": (["SOLVER.MAX_ITER", "-1"], r"MAX_ITER is -1"),
    "no step": (["SOLVER.MAX_ITER", "0"], r"nothing to train; add --eval-only"),
    "learning rate not finite": (["SOLVER.BASE_LR", "float('inf')"], r"BASE_LR"),
    "learning rate beyond float32": (["SOLVER.BASE_LR", "1e39"], r"BASE_LR is 1e\+39; it must be"),
    "learning rate negative": (["SOLVER.BASE_LR", "-0.1"], r"BASE_LR is -0\.1; it must be"),
    "negative number of workers": (["DATALOADER.NUM_WORKERS", "-1"], r"NUM_WORKERS is -1"),
    "seed of more than 32 bits": (
        ["SEED", "4294967296"],
        r"SEED is 4294967296; it must be at most",
    ),
    "unknown schedule": (["SOLVER.LR_SCHEDULER_NAME", "NoLR"], r"LR_SCHEDULER_NAME.*NoLR"),
    "steps of a schedule unsorted": (["SOLVER.STEPS", "(3, 2)"], r"SOLVER's schedule .*STEPS"),
    "unknown architecture": (
        ["MODEL.META_ARCHITECTURE", "NoNet"],
        r"META_ARCHITECTURE is 'NoNet', which is not one of .*GeneralizedRCNN",
    ),
    "unknown backbone": (["MODEL.BACKBONE.NAME", "no_net"], r"BACKBONE\.NAME is 'no_net'"),
    "unknown RoI heads": (["MODEL.ROI_HEADS.NAME", "NoHeads"], r"one of .*LongTailROIHeads"),
    "unknown box head": (["MODEL.ROI_BOX_HEAD.NAME", "NoHead"], r"one of FastRCNNConvFCHead"),
    "unknown proposal generator": (["MODEL.PROPOSAL_GENERATOR.NAME", "NoRPN"], r"one of .*RPN"),
    "no such device": (["MODEL.DEVICE", "gpu"], r"DEVICE is 'gpu', .*; set it to cuda or cpu"),
    "misspelt device": (["MODEL.DEVICE", "cpux"], r"DEVICE is 'cpux', .*; set it to cuda"),
    "device of no memory": (
        ["MODEL.DEVICE", "meta"],
        r"MODEL\.DEVICE is 'meta', which does not wo",
    ),
    "no such CUDA device": (["MODEL.DEVICE", "cuda:99"], r"no CUDA device of number 99"),
    "mixed precision on a CPU": (["SOLVER.AMP.ENABLED", "True"], r"AMP\.ENABLED.*MODEL\.DEVICE is"),
    "output folder a file": (["OUTPUT_DIR", "{tmp}/short.json"], r"short\.json' cannot be written"),
    "proposals in pickles": (
        ["MODEL.LOAD_PROPOSALS", "True"],
        r"can run any code; set it to False",
    ),
}
FLAGS = {"batch that processes cannot share": ["--num-gpus", "2"]}
# Rows that have a test of their own: here, or in the file that the page names.
ELSEWHERE = {
    "config that would run code",
    "config its own base",
    "config too deep or too large once expanded",
    "last_checkpoint damaged",
    "checkpoint of other classes, resumed",
    "checkpoint of another optimizer, resumed",
    "checkpoint with a flipped bit",
    "checkpoint larger once read",
    "unprintable class names in a checkpoint",
    "another word for trust",
    "training annotations damaged, evaluation only",
    "proposals not finite",
    "worker of a data loader killed",
    "checkpoint of other classes",
    "checkpoint of other groups",
    "checkpoint that would run code",
    "image missing",
    "image truncated or no image",
    "image of another size than annotated",
    "image of more than 8 bits",
    "disk full while writing a checkpoint",
    "disk full while caching features",
    "disk full while building data",
}


def test_the_page_lists_these_cases():
    table = PAGE.split("## Bad input")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)
    rows = {row for row in rows if row not in ("input", "---")} - {"---"}
    assert rows == {*ANNOTATIONS, *OPTIONS, *ELSEWHERE}


def train(args):
    """As bags-d2 train does it, in this process."""
    check_files(setup_cfg(args), args.eval_only, args.resume, process_count(args))
    training.main(args)


@pytest.fixture
def refuse(tmp_path):
    """``refuse(text, options)``: the message that ends a training on these annotations."""

    def run(text, options=(), flags=()):
        path = tmp_path / "annotations.json"
        if text is not None:
            path.write_text(text)
        (tmp_path / "short.json").write_text("[1, 2]")
        (tmp_path / "negative.json").write_text("[1, 2, 3, 4, 5, -6]")
        torch.save({"model": {"w": torch.zeros(1000)}}, tmp_path / "half.pth")
        whole = (tmp_path / "half.pth").read_bytes()
        (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
        name = f"bad_{tmp_path.name}"
        config = tmp_path / "config.yaml"
        config.write_text(
            f"_BASE_: {TINY}\nOUTPUT_DIR: {tmp_path}/out\nDATASETS:\n"
            f'  REGISTER:\n    - ["{name}", "lvis", "{path}", "{tmp_path}"]\n'
            f"  TRAIN: ['{name}']\n  TEST: []\n"
            "MODEL:\n  ROI_BOX_PREDICTOR:\n    NAME: BAGSOutputLayers\n"
        )
        words = [str(o).replace("{tmp}", str(tmp_path)) for o in options]
        args = default_argument_parser().parse_args(["--config-file", str(config), *flags, *words])
        with pytest.raises(BagsError) as caught:
            train(args)
        message = one_sentence(caught.value)
        assert "\n" not in message
        return message

    return run


@pytest.mark.parametrize("row", ANNOTATIONS)
def test_annotations(row, refuse):
    text, expected = ANNOTATIONS[row]
    message = refuse(text)
    assert re.search(expected, message), message
    assert "annotations.json" in message


@pytest.mark.parametrize("row", OPTIONS)
def test_options(row, refuse):
    options, expected = OPTIONS[row]
    assert re.search(expected, refuse(json.dumps(CONTENT), options, FLAGS.get(row, ())))


def test_checks_can_be_switched_off(tiny_cfg, tmp_path, register):
    path = tmp_path / "annotations.json"
    path.write_text(with_box([1, 2, -3, 4]))
    name = register("unchecked_train", str(path), str(tmp_path))
    options = ("DATASETS.TRAIN", (name,), "OUTPUT_DIR", str(tmp_path / "out"))
    cfg = tiny_cfg(*options, "DATASETS.TEST", ())
    with pytest.raises(BagsError, match="has bbox"):
        check_files(cfg)
    cfg.DATASETS.CHECK_ANNOTATIONS = False
    check_files(cfg)


KEYS = [
    "MODEL.BAGS.GROUP_THRESHOLDS",
    "MODEL.BAGS.OTHERS_SAMPLE_RATIO",
    "MODEL.LONG_TAIL.COUNT_BY",
    "MODEL.LONG_TAIL.CLASS_COUNTS_FILE",
    "MODEL.ROI_BOX_PREDICTOR.NAME",
    "MODEL.TRAINABLE_PARAMS",
    "DATASETS.REGISTER",
    "SOLVER.MAX_NONFINITE_STEPS",
]
VALUES = st.one_of(
    st.integers(-5, 2000).map(str),
    st.floats(allow_nan=True).map(str),
    st.lists(st.integers(-5, 2000), max_size=4).map(lambda x: str(tuple(x))),
    st.sampled_from(["instances", "images", "BAGSOutputLayers", "('*',)", "[['a']]", "''", "{}"]),
    st.text(alphabet="ab.*/'(", max_size=6),
)


@given(key=st.sampled_from(KEYS), value=VALUES)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_fuzzed_configs_raise_our_errors_or_none(tmp_path, key, value):
    counts = tmp_path / "counts.json"
    counts.write_text("[3, 12, 150, 2000, 7, 40]")
    options = ["MODEL.LONG_TAIL.CLASS_COUNTS_FILE", str(counts), "DATASETS.TRAIN", "()", key, value]
    args = default_argument_parser().parse_args(["--config-file", TINY])
    args.opts = options
    with contextlib.suppress(BagsError):
        BAGSTrainer.build_model(setup_cfg(args))


@contextlib.contextmanager
def full_disk(size=3000):
    """Files can grow no larger than this: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_no_half_written_checkpoint(tmp_path):
    checkpointer = LongTailCheckpointer(torch.nn.Linear(100, 100), str(tmp_path))
    checkpointer.save("model_0000001")
    with full_disk(), pytest.raises(BagsError, match=r"'model_0000002\.pth' could not be written"):
        checkpointer.save("model_0000002")
    assert {p.name for p in tmp_path.iterdir()} == {"model_0000001.pth", "last_checkpoint"}
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    checkpointer.save("model_0000002")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"


def test_a_full_disk_leaves_no_half_built_data_set(tmp_path):
    for size in (100, 1000):  # the first picture, and a later file
        with full_disk(size), pytest.raises(SystemExit) as stopped, exit_on_user_error():
            build_glyphs("glyphs_tiny", tmp_path, num_workers=1, progress=False)
        assert "could not be written" in str(stopped.value)
        assert "free some space" in str(stopped.value)
    assert not (tmp_path / "glyphs_tiny").exists()
    build_glyphs("glyphs_tiny", tmp_path, num_workers=1, progress=False)
    assert (tmp_path / "glyphs_tiny" / "annotations").is_dir()


def test_other_faults_of_the_system_keep_their_traceback():
    with pytest.raises(PermissionError), exit_on_user_error():
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(ZeroDivisionError), exit_on_user_error():
        raise ZeroDivisionError
    with pytest.raises(SystemExit, match=r"^Error: x$"), exit_on_user_error():
        raise BagsError("x")
