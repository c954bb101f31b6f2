"""Class probabilities from grouped logits: both merges against slow references, and identities."""

import io

import pytest
import reference
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import COUNTS, GROUPS, K, cases

from bags_d2 import ClassGroups, ConfigError, build_box_predictor, merge_group_probs

MERGES = {"paper": reference.merge, "joint": reference.merge_joint}
both = pytest.mark.parametrize("how", MERGES)


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from(list(MERGES)))
def test_probabilities_agree_with_the_reference(case, dtype, how):
    counts, thresholds, labels, logits = case
    logits = logits.to(dtype)
    probs = merge_group_probs(logits, ClassGroups.from_counts(counts, thresholds), how)
    assert probs.shape == (len(labels), len(counts) + 1)
    assert probs.dtype == dtype
    expected = MERGES[how](logits.tolist(), counts, thresholds)
    expected = torch.tensor(expected, dtype=dtype).reshape(probs.shape)
    torch.testing.assert_close(probs, expected, atol=1e-6, rtol=1e-5)


def test_worked_example_of_the_joint_merge():
    # background : foreground = 1 : 3, and in each group others : classes as below
    odds = [1, 3, 2, 1, 5, 1, 9, 1, 4, 3, 1]
    probs = merge_group_probs(torch.tensor([odds], dtype=torch.float64).log(), GROUPS, "joint")
    # Relative to others the classes have 1/2, 9, 1/3, 5/2 and 4, and none of them 1.
    total = 1 + 1 / 2 + 9 + 1 / 3 + 5 / 2 + 4
    expected = [0.75 * x / total for x in (1 / 2, 9, 1 / 3, 5 / 2, 4)]
    torch.testing.assert_close(probs, torch.tensor([[*expected, 0.25]], dtype=torch.float64))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 2**31))
def test_with_one_group_both_merges_are_the_same(num_classes, num_rois, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = ClassGroups.from_counts(range(num_classes), ())
    logits = 4 * torch.randn(num_rois, num_classes + 3, generator=generator)
    joint = merge_group_probs(logits, groups, "joint")
    torch.testing.assert_close(joint, merge_group_probs(logits, groups), rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_rows_of_the_joint_merge_sum_to_one_or_less(case):
    counts, thresholds, _, logits = case
    groups = ClassGroups.from_counts(counts, thresholds)
    for x in (logits, logits.float(), 100 * logits.float()):
        assert (merge_group_probs(x, groups, "joint").sum(dim=1) <= 1 + 1e-6).all()


@both
def test_probabilities_are_monotone_in_each_logit(how):
    logits = torch.randn(50, GROUPS.num_logits, dtype=torch.float64)
    before = merge_group_probs(logits, GROUPS, how)
    for column in range(GROUPS.num_logits):
        raised = logits.clone()
        raised[:, column] += 0.5
        change = merge_group_probs(raised, GROUPS, how) - before
        rises = torch.zeros(K + 1, dtype=torch.bool)
        falls = torch.zeros(K + 1, dtype=torch.bool)
        group = next(g for g, part in enumerate(GROUPS.group_slices) if column < part.stop)
        members = torch.cat([GROUPS.class_to_group == group, torch.zeros(1, dtype=torch.bool)])
        if group == 0:  # background, then foreground
            rises[K], falls[:K] = True, True
            rises, falls = (rises, falls) if column == 0 else (falls, rises)
        elif column == GROUPS.group_slices[group].start:  # "others"
            falls = members
            rises = ~members & (torch.arange(K + 1) < K) & (how == "joint")
        else:
            rises[GROUPS.class_to_column.tolist().index(column)] = True
            falls = ~rises & (members | (torch.arange(K + 1) < K) & (how == "joint"))
        assert (change[:, rises] > 0).all()
        assert (change[:, falls] < 0).all()
        torch.testing.assert_close(
            change[:, ~rises & ~falls] + 1, torch.ones_like(change)[:, ~rises & ~falls]
        )


@both
def test_shifting_the_logits_of_a_group_changes_nothing(how):
    logits = torch.randn(6, 11, dtype=torch.float64)
    shifted = logits.clone()
    for g, columns in enumerate(GROUPS.group_slices):
        shifted[:, columns] += 10.0 * (g + 1)
    torch.testing.assert_close(
        merge_group_probs(shifted, GROUPS, how), merge_group_probs(logits, GROUPS, how)
    )


@both
def test_renumbering_the_classes_within_a_group_permutes_the_columns(how):
    logits = torch.randn(4, 11)
    swapped = logits.clone()
    swapped[:, [3, 4]] = logits[:, [4, 3]]  # classes 0 and 3
    probs, other = (merge_group_probs(x, GROUPS, how) for x in (logits, swapped))
    torch.testing.assert_close(other[:, [3, 1, 2, 0, 4, 5]], probs)


@both
def test_the_gradient_is_that_of_the_formula(how):
    logits = torch.randn(3, GROUPS.num_logits, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: merge_group_probs(x, GROUPS, how), (logits,))


@both
@pytest.mark.parametrize("counts", [[50, 5000], [50], COUNTS])
def test_groups_may_be_empty_and_rois_missing(how, counts):
    groups = ClassGroups.from_counts(counts)
    for num_rois in (0, 3):
        logits = torch.randn(num_rois, groups.num_logits)
        probs = merge_group_probs(logits, groups, how)
        assert probs.shape == (num_rois, len(counts) + 1)
        expected = torch.tensor(MERGES[how](logits.tolist(), counts, (10, 100, 1000)))
        torch.testing.assert_close(probs, expected.reshape(probs.shape), atol=1e-6, rtol=1e-5)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_of_any_precision_stay_finite(how, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 11, generator=generator).sign() * 1e4
    logits[100:] *= torch.rand(100, 11, generator=generator)
    logits = logits.to(dtype).requires_grad_()
    probs = merge_group_probs(logits, GROUPS, how)
    assert probs.dtype == torch.float32
    assert ((probs >= 0) & (probs <= 1)).all()
    exact = merge_group_probs(logits.detach().double(), GROUPS, how)
    # Differences of 2e4 are rounded to 1e-3 in float32, in any way of computing a joint softmax.
    torch.testing.assert_close(probs, exact.float(), atol=1e-3, rtol=1e-3)
    probs.sum().backward()
    assert logits.grad.isfinite().all()


@both
def test_the_result_is_float32_under_autocast(how):
    logits = torch.randn(32, 11).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probs = merge_group_probs(logits, GROUPS, how)
    assert probs.dtype == torch.float32
    assert torch.equal(probs, merge_group_probs(logits, GROUPS, how))


@both
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_serves_other_numbers_of_rois(how):
    traced = torch.jit.trace(lambda x: merge_group_probs(x, GROUPS, how), torch.randn(4, 11))
    kinds = {node.kind() for node in traced.graph.nodes()}
    assert "aten::index_select" in kinds
    assert "aten::exp2" not in kinds  # which ONNX does not have
    assert not any(kind.endswith("_") for kind in kinds)  # nor has it work in place
    for num_rois in (1, 9):
        logits = torch.randn(num_rois, 11)
        torch.testing.assert_close(traced(logits), merge_group_probs(logits, GROUPS, how))


@both
@pytest.mark.filterwarnings("ignore")
def test_it_exports_to_onnx(how):
    pytest.importorskip("onnx")

    class Merge(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.groups = ClassGroups.from_counts(COUNTS)

        def forward(self, logits):
            return merge_group_probs(logits, self.groups, how)

    exported = io.BytesIO()
    options = {"input_names": ["logits"], "dynamic_axes": {"logits": {0: "rois"}}}
    torch.onnx.export(Merge(), (torch.randn(4, 11),), exported, dynamo=False, **options)
    assert exported.getvalue()


# As a config key


def _scores(cfg, logits):
    return build_box_predictor(cfg, ShapeSpec(channels=8)).class_probs(logits)


@both
@pytest.mark.parametrize("name", ["BAGSOutputLayers", "ReweightedBAGSOutputLayers"])
def test_the_config_decides(tiny_cfg, how, name):
    cfg = tiny_cfg("MODEL.ROI_BOX_PREDICTOR.NAME", name, "MODEL.BAGS.MERGE", how)
    logits = torch.randn(5, 12)
    expected = MERGES[how](logits.tolist(), [3, 12, 150, 2000, 7, 40], (10, 100, 1000))
    torch.testing.assert_close(_scores(cfg, logits), torch.tensor(expected))


@pytest.mark.parametrize("name", ["BAGSOutputLayers", "BAGSWithoutOthersOutputLayers"])
def test_an_unknown_merge_is_refused(tiny_cfg, name):
    cfg = tiny_cfg("MODEL.ROI_BOX_PREDICTOR.NAME", name, "MODEL.BAGS.MERGE", "mean")
    with pytest.raises(ConfigError, match=r"MODEL\.BAGS\.MERGE must be one of .*found 'mean'"):
        build_box_predictor(cfg, ShapeSpec(channels=8))
    with pytest.raises(ConfigError, match="found 'mean'"):
        merge_group_probs(torch.zeros(1, 11), GROUPS, "mean")


@pytest.mark.parametrize("part", ["BackgroundGroup", "Others"])
def test_ablations_without_what_the_joint_merge_needs_refuse_it(tiny_cfg, part):
    name = f"BAGSWithout{part}OutputLayers"
    cfg = tiny_cfg("MODEL.ROI_BOX_PREDICTOR.NAME", name, "MODEL.BAGS.MERGE", "joint")
    with pytest.raises(ConfigError, match=r"MERGE must be one of \('paper',\), found 'joint'"):
        build_box_predictor(cfg, ShapeSpec(channels=8))


@pytest.mark.parametrize("heads", ["LongTailROIHeads", "LongTailCascadeROIHeads"])
def test_a_detector_of_either_merge_loads_the_others_weights(tiny_cfg, make_batch, heads):
    options = [
        *("MODEL.ROI_HEADS.NAME", heads, "MODEL.MASK_ON", True),
        *("MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers"),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    ]
    found = []
    torch.manual_seed(0)
    weights = build_model(tiny_cfg(*options)).state_dict()
    for name, tensor in weights.items():
        if name.endswith("cls_score.weight"):
            torch.nn.init.normal_(tensor, std=0.01)
    for how in MERGES:
        model = build_model(tiny_cfg(*options, "MODEL.BAGS.MERGE", how)).eval()
        model.load_state_dict(weights)
        with torch.no_grad():
            found.append(model(make_batch(1))[0]["instances"].scores)
    assert found[0].sum() > 1.01 * found[1].sum()  # none competes with classes of other groups
