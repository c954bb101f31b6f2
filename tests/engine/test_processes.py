"""Two and four processes: equal parameters, and the measures of one."""

import json
import os

import pytest
import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from bags_d2 import BAGSTrainer
from bags_d2.engine import LongTailCheckpointer, launch, setup_cfg

pytestmark = pytest.mark.slow

TINY = "tests/tiny.yaml"
BAGS = ("MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers")


def _cfg(folder, *opts):
    # Other processes know no data set that a test has registered, but they read the config.
    root = os.environ["TINY_ROOT"]
    rows = [
        [f"processes_{s}", "lvis", f"{root}/annotations/glyphs_tiny_{s}.json", root]
        for s in ("train", "val")
    ]
    options = [
        *("DATASETS.REGISTER", str(rows), "DATASETS.TRAIN", "('processes_train',)"),
        *("DATASETS.TEST", "('processes_val',)", "OUTPUT_DIR", str(folder), "SEED", "1"),
        *(*BAGS, *opts),
    ]
    return setup_cfg(default_argument_parser().parse_args(["--config-file", TINY, *options]))


def _train(folder, opts, lonely):
    torch.set_num_threads(1)
    trainer = BAGSTrainer(_cfg(folder, *opts))
    if comm.get_rank() == lonely:
        _without_objects(trainer)
    trainer.train()
    state = {n: p.detach() for n, p in trainer.model.module.named_parameters()}
    torch.save(state, f"{folder}/rank{comm.get_rank()}.pth")


def _without_objects(trainer):
    """Take all objects from a process's images: no RoI of it is foreground."""
    loader = trainer._trainer.data_loader

    def emptied():
        for batch in loader:
            for record in batch:
                record["instances"] = record["instances"][:0]
            yield batch

    trainer._trainer.reset_data_loader(emptied)


def _evaluate(folder, weights):
    torch.set_num_threads(1)
    cfg = _cfg(folder, "MODEL.WEIGHTS", weights)
    model = BAGSTrainer.build_model(cfg)
    LongTailCheckpointer(model, evaluating=True).load(weights)
    BAGSTrainer.test(cfg, model)


def _args(num_processes):
    return default_argument_parser().parse_args(
        ["--num-gpus", str(num_processes), "--dist-url", "auto"]
    )


@pytest.fixture(autouse=True)
def _data(datasets_root, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setenv("TINY_ROOT", str(datasets_root / "glyphs_tiny"))


@pytest.mark.parametrize(("num_processes", "lonely"), [(2, None), (2, 1), (4, 0)])
def test_parameters_stay_equal(num_processes, lonely, tmp_path):
    opts = ("SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "(2,)")
    launch(_train, _args(num_processes), (tmp_path, opts, lonely))
    states = [
        torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in range(num_processes)
    ]
    for name, parameter in states[0].items():
        assert parameter.isfinite().all()
        for other in states[1:]:
            assert torch.equal(parameter, other[name]), name


def test_measures_are_those_of_one_process(tmp_path):
    weights = str(tmp_path / "model_final.pth")
    cfg = _cfg(tmp_path, "SOLVER.MAX_ITER", "40", "SOLVER.STEPS", "(30,)", "DATASETS.TEST", "()")
    trainer = BAGSTrainer(cfg)
    trainer.train()
    results = {}
    # The last batches are uneven.
    with open(f"{os.environ['TINY_ROOT']}/annotations/glyphs_tiny_val.json") as file:
        assert len(json.load(file)["images"]) % 4 != 0
    for num_processes in (1, 2, 4):
        folder = tmp_path / str(num_processes)
        folder.mkdir()
        launch(_evaluate, _args(num_processes), (folder, weights))
        results[num_processes] = json.loads((folder / "inference" / "results.json").read_text())
    assert results[1]["bbox"]["AP50"] > 0
    assert results[2] == results[1]
    assert results[4] == results[1]
