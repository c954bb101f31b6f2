"""Fixtures that several test files share: small data sets, small models, log lines."""

import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Boxes, Instances
from prepare_glyphs import build_glyphs

from bags_d2 import add_bags_config
from bags_d2.data import register_lvis_format

torch.set_num_threads(1)

CONFIGS = Path(__file__).parents[1] / "configs"

# Six classes in four groups: [0, 10) holds 0 and 4, [10, 100) 1 and 5, [100, 1000) 2, the last 3.
TINY_COUNTS = [3, 12, 150, 2000, 7, 40]

# A ResNet-50-FPN detector of 0.5 M parameters; a training step takes a few hundredths of a second.
TINY_MODEL = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 32),
    *("MODEL.FPN.OUT_CHANNELS", 16),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 32),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 40),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 40),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 24),
    *("MODEL.ROI_HEADS.NUM_CLASSES", len(TINY_COUNTS)),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 32),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
    *("INPUT.MIN_SIZE_TEST", 64),
]


@pytest.fixture(scope="session")
def datasets_root(tmp_path_factory):
    """Folder of data sets with glyphs_tiny in it, built once."""
    root = tmp_path_factory.mktemp("datasets")
    build_glyphs("glyphs_tiny", root, num_workers=1, progress=False)
    return root


@pytest.fixture
def tiny_cfg(tmp_path):
    """``tiny_cfg(*opts)``: a config of a tiny softmax detector with class counts from a file."""

    def make(*opts):
        counts = tmp_path / "tiny_counts.json"
        counts.write_text(json.dumps(TINY_COUNTS))
        cfg = get_cfg()
        add_bags_config(cfg)
        cfg.merge_from_file(str(CONFIGS / "Base-Glyphs.yaml"))
        cfg.merge_from_list(TINY_MODEL)
        cfg.merge_from_list(["MODEL.LONG_TAIL.CLASS_COUNTS_FILE", str(counts)])
        cfg.merge_from_list(list(opts))
        return cfg

    return make


@pytest.fixture
def make_batch():
    """``make_batch(num_images)``: inputs of a detector for training, with boxes and masks."""

    def make(num_images=2, size=64):
        num_classes = len(TINY_COUNTS)
        torch.manual_seed(0)
        batch = []
        for i in range(num_images):
            corners = torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 10.0, 60.0, 50.0]])
            masks = torch.zeros(2, size, size, dtype=torch.bool)
            masks[0, 6:40, 4:30] = True
            masks[1, 10:50, 20:60] = True
            instances = Instances((size, size))
            instances.gt_boxes = Boxes(corners)
            instances.gt_classes = torch.tensor([(2 * i) % num_classes, (2 * i + 1) % num_classes])
            instances.gt_masks = BitMasks(masks)
            image = torch.randint(0, 255, (3, size, size), dtype=torch.uint8)
            record = {"image": image, "height": size, "width": size, "instances": instances}
            batch.append(record)
        return batch

    return make


@pytest.fixture
def write_lvis(tmp_path):
    """``write_lvis(categories, annotations)``: path of an LVIS-format JSON.

    ``categories`` is {id: name}; an annotation is (image id, category id) or, with a third
    entry, (image id, category id, iscrowd).
    """

    def write(categories, annotations, name="annotations.json", **extra):
        images = sorted({image for image, *_ in annotations})
        content = {
            "categories": [{"id": i, "name": n, "frequency": "f"} for i, n in categories.items()],
            "images": [
                {
                    "id": i,
                    "file_name": f"{i}.jpg",
                    "height": 20,
                    "width": 30,
                    "neg_category_ids": [],
                    "not_exhaustive_category_ids": [],
                }
                for i in images
            ],
            "annotations": [
                {
                    "id": i,
                    "image_id": image,
                    "category_id": category,
                    "bbox": [1, 2, 3, 4],
                    "area": 12,
                    **({"iscrowd": crowd[0]} if crowd else {}),
                }
                for i, (image, category, *crowd) in enumerate(annotations, 1)
            ],
            **extra,
        }
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return str(path)

    return write


@pytest.fixture
def register():
    """``register(name, source, **metadata)``: register a data set until the test is over.

    ``source`` is the path of an LVIS-format JSON, or a function that returns records.
    """
    names = []

    def add(name, source, image_root="", **metadata):
        if callable(source):
            DatasetCatalog.register(name, source)
        else:
            register_lvis_format(name, source, image_root)
        names.append(name)
        MetadataCatalog.get(name).set(**metadata)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def log_lines():
    """``log_lines(logger_name)``: list of "LEVEL message" that the logger fills from then on.

    Unlike ``caplog``, it hears loggers whose propagation Detectron2's ``setup_logger`` turned off.
    """
    cleanup = []

    def listen(name):
        lines = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")
        logger = logging.getLogger(name)
        cleanup.append((logger, handler, logger.level))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        return lines

    yield listen
    for logger, handler, level in cleanup:
        logger.removeHandler(handler)
        logger.setLevel(level)
