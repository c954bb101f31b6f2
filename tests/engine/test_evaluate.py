"""Many classifiers of one detector, evaluated in one pass: the same results as one by one."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from bags_d2 import BAGSTrainer, ConfigError
from bags_d2.data import register_lvis_format
from bags_d2.engine import evaluate_classifiers, load_for_evaluation

MASK = ("MODEL.MASK_ON", True)
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
)


@pytest.fixture
def tiny_val(datasets_root, tmp_path_factory):
    """Name of a data set of four images of the tiny validation set."""
    folder = datasets_root / "glyphs_tiny"
    name = "evaluated_together"
    content = json.loads((folder / "annotations/glyphs_tiny_val.json").read_text())
    kept = content["images"] = content["images"][:4]
    ids = {image["id"] for image in kept}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    path = tmp_path_factory.mktemp("evaluated") / "val.json"
    path.write_text(json.dumps(content))
    register_lvis_format(name, str(path), str(folder))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def runs(tiny_cfg, tiny_val, tmp_path):
    """``runs(*opts)``: configs of three classifiers with one detector, and their checkpoints."""

    def make(*opts):
        cfgs, shared = [], None
        for i, predictor in enumerate(("FastRCNNOutputLayers", "BAGSOutputLayers") * 2):
            folder = tmp_path / f"run{i}"
            folder.mkdir()
            cfg = tiny_cfg(
                *("MODEL.ROI_BOX_PREDICTOR.NAME", predictor, "OUTPUT_DIR", str(folder)),
                *("DATASETS.TEST", (tiny_val,), "MODEL.WEIGHTS", str(folder / "model.pth")),
                *("TEST.DETECTIONS_PER_IMAGE", 30),
                *("MODEL.BAGS.MERGE", "joint" if i > 1 else "paper", "DATALOADER.NUM_WORKERS", 0),
                *opts,
            )
            torch.manual_seed(i)
            model = BAGSTrainer.build_model(cfg)
            if shared is None:
                shared = {k: v for k, v in model.state_dict().items() if "cls_score" not in k}
            model.load_state_dict(shared, strict=False)
            for name, weight in model.named_parameters():
                if "cls_score.weight" in name:
                    weight.data *= 30  # so that classes differ
            torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
            cfgs.append(cfg)
        return cfgs

    return make


def files_of(cfg):
    folder = Path(cfg.OUTPUT_DIR) / "inference"
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "opts",
    [(*CASCADE, *MASK), *(pytest.param(o, marks=pytest.mark.slow) for o in ((), MASK, CASCADE))],
    ids=str,
)
def test_results_are_those_of_one_by_one(runs, opts):
    cfgs = runs(*opts)
    evaluate_classifiers(cfgs)
    together = [files_of(cfg) for cfg in cfgs]
    for cfg in cfgs:
        BAGSTrainer.test(cfg, load_for_evaluation(cfg))
    assert together == [files_of(cfg) for cfg in cfgs]
    measures = [json.loads(files[Path("results.json")]) for files in together]
    assert all(
        set(m) == ({"bbox", "segm"} if "MODEL.MASK_ON" in opts else {"bbox"}) for m in measures
    )
    predictions = {files[next(p for p in files if "instances" in str(p))] for files in together}
    assert len(predictions) == len(cfgs)  # of four different classifiers


@pytest.mark.parametrize("name", ["backbone.bottom_up.stem.conv1.weight", "bbox_pred.weight"])
def test_another_detector_is_refused(runs, name):
    cfgs = runs()
    content = torch.load(cfgs[2].MODEL.WEIGHTS)
    key = next(k for k in content["model"] if k.endswith(name))
    content["model"][key] += 1
    torch.save(content, cfgs[2].MODEL.WEIGHTS)
    with pytest.raises(ConfigError, match=rf"run2.*differ in '.*{name}'"):
        evaluate_classifiers(cfgs)
