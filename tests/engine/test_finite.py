"""Losses that are not numbers never reach the weights."""

import math
import os
import signal

import pytest
import torch
from detectron2.engine import default_argument_parser

from bags_d2 import BagsError, BAGSTrainer
from bags_d2.data.loader import LongTailDatasetMapper
from bags_d2.engine import setup_cfg
from bags_d2.errors import NonFiniteLossError

TINY = "tests/tiny.yaml"


@pytest.fixture
def make_trainer(tmp_path, datasets_root, register, request, monkeypatch):
    """``make_trainer(*opts)``: a trainer of eight steps, with a checkpoint at every second."""
    monkeypatch.chdir(request.config.rootpath)
    root = datasets_root / "glyphs_tiny"
    name = register("finite_train", str(root / "annotations" / "glyphs_tiny_train.json"), str(root))

    def make(*opts):
        options = [
            *("DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()", "SEED", "1"),
            *("OUTPUT_DIR", str(tmp_path), "MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers"),
            *("SOLVER.MAX_ITER", "8", "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", "2"),
            *opts,
        ]
        args = default_argument_parser().parse_args(["--config-file", TINY, *options])
        return BAGSTrainer(setup_cfg(args))

    return make


def poison(trainer, iterations, value=math.nan, groups=(2,)):
    """Make the losses of some groups infinite or NaN at some iterations."""
    predictor = trainer.model.roi_heads.box_predictor
    original = predictor.group_losses

    def group_losses(logits, gt_classes):
        losses, used = original(logits, gt_classes)
        if trainer.iter in iterations:
            mask = torch.zeros_like(losses, dtype=torch.bool)
            mask[list(groups)] = True
            losses = torch.where(mask, losses * value, losses)
        return losses, used

    predictor.group_losses = group_losses


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_training_stops_with_iteration_group_and_images(make_trainer, tmp_path, value):
    trainer = make_trainer()
    poison(trainer, {5}, value, groups=(0, 2))
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "iteration 5: loss_cls (class group 0" in message
    assert ", 2)" in message or value == math.inf  # infinity times a loss of 0 is NaN as well
    assert message.count(".jpg") == 2
    assert "--resume" in message
    assert "\n" not in message
    # The weights of the model and of the last checkpoint are good.
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    weights = torch.load(tmp_path / "model_0000003.pth", weights_only=True)["model"]
    assert all(w.isfinite().all() for w in weights.values())


def test_steps_that_were_left_out_count_after_a_resume(make_trainer):
    options = ("SOLVER.MAX_NONFINITE_STEPS", "1")
    first = make_trainer(*options)
    poison(first, {1})
    first.train()
    resumed = make_trainer(*options, "SOLVER.MAX_ITER", "10")
    resumed.resume_or_load(resume=True)
    poison(resumed, {8})
    with pytest.raises(NonFiniteLossError, match="at iteration 8"):
        resumed.train()


def test_some_such_steps_may_be_left_out(make_trainer, log_lines):
    lines = log_lines("bags_d2.engine.finite")
    trainer = make_trainer("SOLVER.MAX_NONFINITE_STEPS", "2")
    poison(trainer, {3, 5})
    seen = {}

    def weights():
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    step = trainer._trainer.run_step

    def run_step():
        before = weights()
        step()
        seen[trainer.iter] = not torch.equal(before, weights())

    trainer._trainer.run_step = run_step
    trainer.train()
    assert seen == {i: i not in (3, 5) for i in range(8)}
    assert len(lines) == 2
    assert "1 more may be" in lines[0]
    assert weights().isfinite().all()


def test_no_more_than_that(make_trainer):
    trainer = make_trainer("SOLVER.MAX_NONFINITE_STEPS", "2")
    poison(trainer, {1, 3, 4})
    with pytest.raises(NonFiniteLossError, match="iteration 4"):
        trainer.train()


def test_finite_losses_are_logged_as_ever(make_trainer):
    trainer = make_trainer()
    trainer.train()
    latest = trainer.storage.latest()
    assert math.isfinite(latest["total_loss"][0])
    assert {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"} <= set(latest)


def test_proposals_that_are_not_finite_stop_training_the_same_way(make_trainer, log_lines):
    lines = log_lines("detectron2.engine.train_loop")
    trainer = make_trainer()
    torch.nn.init.constant_(trainer.model.proposal_generator.rpn_head.anchor_deltas.bias, math.nan)
    with pytest.raises(
        NonFiniteLossError, match=r"proposals of the RPN at iteration 0, .*\.jpg; l"
    ):
        trainer.train()
    assert not any("Exception" in line for line in lines), "a sentence, and no traceback before it"


def test_a_killed_worker_of_the_data_loader_is_told(make_trainer, monkeypatch, log_lines):
    lines = log_lines("detectron2.engine.train_loop")
    parent, read = os.getpid(), LongTailDatasetMapper.__call__

    def die(self, record):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, record)

    monkeypatch.setattr(LongTailDatasetMapper, "__call__", die)
    with pytest.raises(BagsError, match=r"DataLoader worker.*NUM_WORKERS.*--resume") as caught:
        make_trainer("DATALOADER.NUM_WORKERS", "1").train()
    assert "\n" not in str(caught.value)
    assert not any("Exception" in line for line in lines)


def test_other_errors_keep_their_traceback(make_trainer, log_lines):
    lines = log_lines("detectron2.engine.train_loop")
    trainer = make_trainer()
    trainer._trainer._data_loader_iter_obj = iter([])
    with pytest.raises(StopIteration):
        trainer.train()
    assert any("Exception during training" in line for line in lines)
