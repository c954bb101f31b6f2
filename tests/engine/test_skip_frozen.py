"""What is left out of training steps, and that the rest goes the same way."""

import copy
import pickle

import pytest
import torch
from detectron2.utils.events import EventStorage

from bags_d2 import BAGSTrainer
from bags_d2.engine.freezing import skip_frozen_parts

CASCADE = ("MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads")
AGNOSTIC = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
MASK = ("MODEL.MASK_ON", True)
VARIANTS = {
    "faster": (),
    "mask": MASK,
    "cascade": (*CASCADE, *AGNOSTIC),
    "cascade_mask": (*CASCADE, *AGNOSTIC, *MASK),
}
CLASSIFIER = "roi_heads.box_predictor*cls_score.*"
PREDICTORS = ("BAGSOutputLayers", "FastRCNNOutputLayers")


@pytest.fixture
def build(tiny_cfg):
    def make(*opts, trainable=(CLASSIFIER,), skip=True, name="BAGSOutputLayers"):
        torch.manual_seed(0)
        cfg = tiny_cfg(
            *("MODEL.ROI_BOX_PREDICTOR.NAME", name),
            *("MODEL.TRAINABLE_PARAMS", trainable),
            *("MODEL.SKIP_FROZEN", skip),
            *("MODEL.BAGS.OTHERS_SAMPLE_RATIO", 1.0),
            *opts,
        )
        return BAGSTrainer.build_model(cfg)

    return make


def losses_of_a_step(model, batch, seed=0):
    torch.manual_seed(seed)
    with EventStorage(1):
        return model(batch)


def trajectory(model, batch, steps=3):
    """Trained parameters after some steps, and what each step's losses were."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    history = []
    for seed in range(steps):
        losses = losses_of_a_step(model, batch, seed)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    return {n: p for n, p in model.named_parameters() if p.requires_grad}, history


@pytest.mark.parametrize("name", PREDICTORS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_classifier_goes_the_same_way(build, make_batch, variant, name):
    batch = make_batch()
    whole, all_losses = trajectory(build(*VARIANTS[variant], skip=False, name=name), batch)
    short, few_losses = trajectory(build(*VARIANTS[variant], name=name), batch)
    assert whole.keys() == short.keys()
    for key in whole:
        assert torch.equal(whole[key], short[key]), key
    for every, few in zip(all_losses, few_losses, strict=True):
        assert few.items() < every.items()
        skipped = every.keys() - few.keys()
        assert {"loss_rpn_cls", "loss_rpn_loc"} <= skipped
        assert ("loss_mask" in skipped) == ("mask" in variant)
        assert ("loss_box_reg" in skipped) == ("cascade" not in variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_is_untouched(build, make_batch, variant):
    batch = make_batch()
    whole, short = (build(*VARIANTS[variant], skip=skip).eval() for skip in (False, True))
    with torch.no_grad():
        for a, b in zip(whole(batch), short(batch), strict=True):
            assert len(a["instances"]) > 0
            for field, value in a["instances"].get_fields().items():
                other = b["instances"].get(field)
                value, other = getattr(value, "tensor", value), getattr(other, "tensor", other)
                assert torch.equal(value, other)


@pytest.mark.parametrize(
    ("trainable", "skipped"),
    [
        ((), []),
        (("backbone.fpn*",), []),
        (("proposal_generator.*", CLASSIFIER), ["box regression", "mask head"]),
        (("roi_heads.box_head.*",), ["RPN losses", "mask head"]),
        (("roi_heads.box_predictor.*",), ["RPN losses", "mask head"]),
        (("roi_heads.mask_head.predictor.*", CLASSIFIER), ["RPN losses", "box regression"]),
        ((CLASSIFIER,), ["RPN losses", "box regression", "mask head"]),
    ],
)
def test_what_reaches_a_trainable_parameter_is_kept(build, make_batch, trainable, skipped):
    model = build(*MASK, trainable=trainable, skip=False)
    assert skip_frozen_parts(model) == skipped
    losses = losses_of_a_step(model, make_batch())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    kept = {
        "RPN losses": "loss_rpn_cls",
        "box regression": "loss_box_reg",
        "mask head": "loss_mask",
    }
    for part, loss in kept.items():
        assert (loss in losses) == (part not in skipped)


def test_predicted_boxes_that_are_trained_on_are_computed(build):
    model = build("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True)
    assert not model.roi_heads.box_predictor.classification_only


def test_one_line_says_what_is_skipped_and_by_which_key(build, log_lines):
    lines = log_lines("bags_d2.engine.freezing")
    build(*MASK)
    assert [line for line in lines if "Skipped" in line] == [
        "INFO Skipped in training, since no trainable parameter depends on it: RPN losses, box "
        "regression, mask head (MODEL.SKIP_FROZEN)"
    ]
    build(*MASK, skip=False)
    build(*MASK, trainable=())
    assert sum("Skipped" in line for line in lines) == 1


def test_copies_and_checkpoints_stay_what_they_were(build, make_batch):
    whole, short = build(*MASK, skip=False), build(*MASK)
    assert whole.state_dict().keys() == short.state_dict().keys()
    batch = make_batch()
    expected = losses_of_a_step(short, batch)
    for copied in (copy.deepcopy(short), pickle.loads(pickle.dumps(short))):
        assert losses_of_a_step(copied, batch) == expected
