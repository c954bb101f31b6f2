"""Loss and inference of Balanced Group Softmax against a slow reference, and their identities."""

import math
from contextlib import ExitStack

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bags_d2 import ClassGroups, group_softmax_loss, merge_group_probs, sample_others
from bags_d2.modeling.losses import group_targets

INF = float("inf")
COUNTS = [5, 12, 2000, 7, 150]  # groups [0, 3] [1] [4] [2]
GROUPS = ClassGroups.from_counts(COUNTS)
K = len(COUNTS)


@st.composite
def cases(draw):
    """(counts, thresholds, labels, logits), groups of all sizes from none to all classes."""
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=7))
    thresholds = tuple(sorted(draw(st.sets(st.integers(1, 40), max_size=4))))
    labels = draw(st.lists(st.integers(0, len(counts)), max_size=12))
    width = len(counts) + len(thresholds) + 3
    seed = draw(st.integers(0, 2**31))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0]))
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
    return counts, thresholds, labels, logits


def _labels(labels):
    return torch.tensor(labels, dtype=torch.long)


def _compare_with_reference(case, beta, dtype):
    counts, thresholds, labels, logits = case
    groups = ClassGroups.from_counts(counts, thresholds)
    logits = logits.to(dtype).requires_grad_()
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {}
    losses, used = group_softmax_loss(logits, _labels(labels), groups, beta, return_used=True)
    weights = torch.arange(1.0, len(losses) + 1, dtype=dtype)
    (losses * weights).sum().backward()
    expected, gradient = reference.loss_and_gradient(
        logits.tolist(), labels, counts, thresholds, used.tolist(), weights.tolist()
    )
    assert losses.dtype == dtype
    torch.testing.assert_close(losses, losses.new_tensor(expected), **tolerance)
    gradient = losses.new_tensor(gradient).reshape(logits.shape)
    torch.testing.assert_close(logits.grad, gradient, **tolerance)
    return used.tolist()


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from([0.0, INF]), st.sampled_from([torch.float32, torch.float64]))
def test_loss_and_gradient_without_sampling(case, beta, dtype):
    counts, thresholds, labels, _ = case
    used = _compare_with_reference(case, beta, dtype)
    groups = reference.make_groups(counts, thresholds)
    assert used == reference.used_without_sampling(labels, groups, beta)


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from([0.5, 1.0, 1.7, 8.0]))
def test_loss_and_gradient_with_sampling(case, beta):
    counts, thresholds, labels, _ = case
    used = _compare_with_reference(case, beta, torch.float32)
    groups = reference.make_groups(counts, thresholds)
    assert all(used[0])
    for g in range(1, len(groups) + 1):
        inside = [reference.in_group(label, groups, g) for label in labels]
        others = [u and not i for u, i in zip(used[g], inside, strict=True)]
        assert all(u for u, i in zip(used[g], inside, strict=True) if i)
        assert sum(others) == reference.num_others(labels, groups, g, beta)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_targets_are_slots_within_the_groups(case):
    counts, thresholds, labels, _ = case
    targets = group_targets(_labels(labels), ClassGroups.from_counts(counts, thresholds))
    groups = reference.make_groups(counts, thresholds)
    for g, row in enumerate(targets.tolist()):
        assert row == [reference.target_slot(c, groups, g, len(counts)) for c in labels]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_logits_are_left_as_they_are(dtype, requires_grad):
    logits = torch.randn(6, 11).to(dtype).requires_grad_(requires_grad)
    before = logits.detach().clone()
    losses = group_softmax_loss(logits, _labels([0, 3, 1, 2, K, K]), GROUPS)
    probs = merge_group_probs(logits, GROUPS)
    if requires_grad:
        (losses.sum() + probs.sum()).backward()
    assert torch.equal(logits, before)
    assert torch.equal(merge_group_probs(before, GROUPS), probs)


def test_logits_need_not_be_contiguous():
    logits = torch.randn(11, 6).t().requires_grad_()
    labels = _labels([0, 3, 1, 2, K, K])
    contiguous = logits.detach().contiguous().requires_grad_()
    loss = group_softmax_loss(logits, labels, GROUPS, INF).sum()
    expected = group_softmax_loss(contiguous, labels, GROUPS, INF).sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, contiguous.grad)
    torch.testing.assert_close(
        merge_group_probs(logits, GROUPS), merge_group_probs(contiguous, GROUPS)
    )


# Values that can be checked by hand


def test_equal_logits_give_the_logarithm_of_the_group_widths():
    losses = group_softmax_loss(torch.zeros(6, 11), _labels([0, 3, 1, 4, 2, K]), GROUPS)
    expected = [math.log(2), math.log(3), math.log(2), math.log(2), math.log(2)]
    torch.testing.assert_close(losses, torch.tensor(expected))
    probs = merge_group_probs(torch.zeros(1, 11), GROUPS)
    torch.testing.assert_close(probs, torch.tensor([[1 / 6, 1 / 4, 1 / 4, 1 / 6, 1 / 4, 1 / 2]]))


def test_worked_example_of_merging_is_not_renormalised():
    # background : foreground = 1 : 3, and in each group others : classes as below
    odds = [1, 3, 2, 1, 5, 1, 9, 1, 4, 3, 1]
    probs = merge_group_probs(torch.tensor([odds], dtype=torch.float64).log(), GROUPS)
    expected = [0.75 / 8, 0.75 * 0.9, 0.75 / 4, 0.75 * 5 / 8, 0.75 * 0.8, 0.25]
    torch.testing.assert_close(probs, torch.tensor([expected], dtype=torch.float64))
    assert probs.sum() > 2


def test_worked_example_of_the_loss():
    # RoIs: class 0 (group 1), class 1 (group 2), background; logits are logarithms of odds.
    odds = torch.ones(3, 11, dtype=torch.float64)
    odds[0, :5] = torch.tensor([1, 3, 2, 1, 5])
    odds[1, :7] = torch.tensor([1, 1, 6, 1, 1, 1, 9])
    odds[2, :7] = torch.tensor([4, 1, 2, 1, 1, 3, 1])
    losses = group_softmax_loss(odds.log(), _labels([0, 1, K]), GROUPS, INF)
    expected = [
        -math.log(3 / 4 * 1 / 2 * 4 / 5) / 3,
        -math.log(1 / 8 * 6 / 8 * 2 / 4) / 3,
        -math.log(1 / 2 * 9 / 10 * 3 / 4) / 3,
        0.0,
        0.0,
    ]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))


def test_the_normaliser_is_the_number_of_used_rois():
    # With beta 0 group 1 uses its one RoI alone, however many others there are.
    logits = torch.zeros(50, 11)
    losses = group_softmax_loss(logits, _labels([0] + [K] * 49), GROUPS, 0.0)
    torch.testing.assert_close(losses[1], torch.tensor(math.log(3)))


# Identities


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 10), st.integers(0, 2**31))
def test_one_group_with_all_others_is_plain_cross_entropy(num_classes, num_rois, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = ClassGroups.from_counts(range(num_classes), ())
    logits = torch.randn(num_rois, num_classes + 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, num_classes + 1, (num_rois,), generator=generator)
    labels[0] = 0  # at least one foreground RoI
    grouped = logits.clone().requires_grad_()
    losses = group_softmax_loss(grouped, labels, groups, INF)
    losses[1].backward()
    # "others" is the background of a plain softmax, which Detectron2 puts last.
    plain = torch.cat([logits[:, 3:], logits[:, 2:3]], dim=1).requires_grad_()
    loss = F.cross_entropy(plain, labels)
    loss.backward()
    torch.testing.assert_close(losses[1], loss)
    assert (grouped.grad[:, :2] == 0).all()
    expected = torch.cat([plain.grad[:, -1:], plain.grad[:, :-1]], dim=1)
    torch.testing.assert_close(grouped.grad[:, 2:], expected)


def test_group_0_is_plain_cross_entropy_of_objectness():
    logits = torch.randn(8, 11)
    labels = _labels([K, 0, K, 2, 1, K, 4, K])
    losses = group_softmax_loss(logits, labels, GROUPS)
    expected = F.cross_entropy(logits[:, :2], (labels < K).long())
    torch.testing.assert_close(losses[0], expected)


def test_shifting_the_logits_of_a_group_changes_nothing():
    logits = torch.randn(6, 11, dtype=torch.float64)
    labels = _labels([0, 3, 1, 2, K, K])
    shifted = logits.clone()
    for g, columns in enumerate(GROUPS.group_slices):
        shifted[:, columns] += 10.0 * (g + 1)
    before = group_softmax_loss(logits, labels, GROUPS, INF)
    torch.testing.assert_close(group_softmax_loss(shifted, labels, GROUPS, INF), before)
    probs = merge_group_probs(logits, GROUPS)
    torch.testing.assert_close(merge_group_probs(shifted, GROUPS), probs)


def test_background_column_is_the_probability_of_background():
    logits = torch.randn(9, 11)
    probs = merge_group_probs(logits, GROUPS)
    torch.testing.assert_close(probs[:, -1], logits[:, :2].softmax(dim=1)[:, 0])


# Batches in which something is missing


@pytest.mark.parametrize("beta", [0.0, 8.0, INF])
@pytest.mark.parametrize(
    ("labels", "present"),
    [
        ([], []),
        ([K, K, K], [0]),
        ([0, 3, K], [0, 1]),
        ([2], [0, 4]),
        ([1, 1, 1], [0, 2]),
    ],
    ids=["no RoIs", "no foreground", "group 1 only", "one RoI", "no background"],
)
def test_absent_groups_lose_nothing_and_keep_the_graph_connected(labels, present, beta):
    logits = torch.randn(len(labels), 11, requires_grad=True)
    losses, used = group_softmax_loss(logits, _labels(labels), GROUPS, beta, return_used=True)
    assert losses.shape == (5,)
    assert used.shape == (5, len(labels))
    for g, loss in enumerate(losses):
        gradient = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        assert torch.isfinite(gradient).all()
        if g in present:
            assert used[g].any()
            assert loss > 0
            assert gradient[:, GROUPS.group_slices[g]].abs().sum() > 0
        else:
            assert loss == 0
            assert not used[g].any()
            assert (gradient == 0).all()


def test_a_group_without_classes_takes_no_part():
    groups = ClassGroups.from_counts([50, 5000])
    logits = torch.randn(4, groups.num_logits, requires_grad=True)
    losses, used = group_softmax_loss(logits, _labels([0, 1, 2, 0]), groups, INF, return_used=True)
    losses.sum().backward()
    assert used.any(dim=1).tolist() == [True, False, True, False, True]
    assert losses[1] == losses[3] == 0
    assert (logits.grad[:, [2, 5]] == 0).all()
    assert merge_group_probs(logits, groups).shape == (4, 3)


def test_one_class():
    groups = ClassGroups.from_counts([50], ())
    losses = group_softmax_loss(torch.zeros(2, 4), _labels([0, 1]), groups, INF)
    torch.testing.assert_close(losses, torch.tensor([math.log(2)] * 2))
    torch.testing.assert_close(
        merge_group_probs(torch.zeros(1, 4), groups), torch.tensor([[0.25, 0.5]])
    )


# Sampling


@pytest.mark.parametrize(
    ("beta", "num_in", "num_out", "drawn"),
    [
        (0.0, 5, 20, 0),
        (0.5, 1, 20, 0),
        (0.5, 3, 20, 1),
        (0.5, 4, 20, 2),
        (1.0, 3, 20, 3),
        (8.0, 2, 20, 16),
        (8.0, 3, 20, 20),
        (8.0, 3, 0, 0),
        (8.0, 0, 20, 0),
        (INF, 1, 20, 20),
        (INF, 0, 20, 0),
        (0.29, 100, 200, 28),  # int(0.29 * 100) is 28, since the product is 28.999...
        (1e20, 1, 20, 20),
    ],
)
def test_number_of_others(beta, num_in, num_out, drawn):
    in_group = torch.zeros(num_in + num_out, dtype=torch.bool)
    in_group[torch.randperm(num_in + num_out)[:num_in]] = True
    others = sample_others(in_group[None], beta)[0]
    assert others.dtype == torch.bool
    assert others.sum() == drawn
    assert not (others & in_group).any()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4),
    st.floats(0, 12),
)
def test_number_of_others_of_several_groups(in_group, beta):
    in_group = torch.tensor(in_group)
    others = sample_others(in_group, beta)
    assert not (others & in_group).any()
    for inside, drawn in zip(in_group, others, strict=True):
        n = int(inside.sum())
        assert drawn.sum() == min(int(beta * n), len(inside) - n)


def test_sampling_is_uniform_over_what_lies_outside():
    in_group = torch.zeros(1, 24, dtype=torch.bool)
    in_group[0, [0, 5, 11, 23]] = True
    generator = torch.Generator().manual_seed(0)
    draws = 4000
    times = torch.zeros(24)
    for _ in range(draws):
        times += sample_others(in_group, 1.5, generator)[0]
    times = times[~in_group[0]]
    p = 6 / 20
    assert times.sum() == draws * 6
    # Inclusions are negatively correlated, so this has expectation 19 and deviation about 6.
    chi_square = ((times - draws * p) ** 2 / (draws * p * (1 - p))).sum() * 19 / 20
    assert chi_square < 50
    assert chi_square > 4


def test_pairs_are_drawn_together_as_often_as_without_replacement():
    in_group = torch.tensor([[True, False, False, False, False]])
    generator = torch.Generator().manual_seed(1)
    pairs = torch.zeros(5, 5)
    for _ in range(3000):
        drawn = sample_others(in_group, 2.0, generator)[0].float()
        pairs += drawn[:, None] * drawn
    rate = pairs[1:, 1:][~torch.eye(4, dtype=torch.bool)] / 3000
    torch.testing.assert_close(rate, torch.full_like(rate, 1 / 6), atol=0.03, rtol=0)


def test_groups_draw_independently_and_afresh():
    in_group = torch.zeros(2, 64, dtype=torch.bool)
    in_group[:, 0] = True
    generator = torch.Generator().manual_seed(0)
    shared = 0.0
    last = None
    for _ in range(400):
        others = sample_others(in_group, 16.0, generator)
        assert last is None or not torch.equal(others, last)
        last = others
        shared += float((others[0] & others[1]).sum())
    # Independent draws of 16 of 63 share 16 * 16 / 63 = 4.06 on average; equal ones would share 16.
    assert shared / 400 == pytest.approx(16 * 16 / 63, abs=0.4)


def test_a_generator_makes_the_loss_reproducible():
    logits, labels = torch.randn(64, 11), torch.randint(0, K + 1, (64,))
    labels[10:] = K

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return group_softmax_loss(logits, labels, GROUPS, 1.0, generator, return_used=True)

    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_the_global_generator_is_used_and_only_where_needed():
    in_group = torch.rand(3, 40) < 0.1
    in_group[:, 0] = True
    torch.manual_seed(3)
    first = sample_others(in_group, 2.0)
    torch.manual_seed(3)
    assert torch.equal(sample_others(in_group, 2.0), first)
    state = torch.get_rng_state()
    sample_others(in_group, INF)
    assert torch.equal(torch.get_rng_state(), state)


# Number formats


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits = (4 * torch.randn(32, 11)).to(dtype).requires_grad_()
    labels = torch.randint(0, K + 1, (32,))
    losses = group_softmax_loss(logits, labels, GROUPS, INF)
    probs = merge_group_probs(logits, GROUPS)
    assert losses.dtype == probs.dtype == torch.float32
    exact = logits.detach().float()
    torch.testing.assert_close(losses, group_softmax_loss(exact, labels, GROUPS, INF))
    torch.testing.assert_close(probs, merge_group_probs(exact, GROUPS))
    losses.sum().backward()
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_loss_and_probabilities(dtype):
    logits = (4 * torch.randn(32, 11)).to(dtype)
    labels = torch.randint(0, K + 1, (32,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = group_softmax_loss(logits, labels, GROUPS, INF)
        probs = merge_group_probs(logits, GROUPS)
    assert losses.dtype == probs.dtype == torch.float32
    assert torch.equal(losses, group_softmax_loss(logits, labels, GROUPS, INF))
    assert torch.equal(probs, merge_group_probs(logits, GROUPS))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_logits_stay_finite(sign):
    logits = torch.randn(12, 11).sign() * 1e4 * sign
    logits.requires_grad_()
    labels = _labels([0, 1, 2, 3, 4, K] * 2)
    losses = group_softmax_loss(logits, labels, GROUPS, INF)
    losses.sum().backward()
    probs = merge_group_probs(logits, GROUPS)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(probs).all()
    assert ((probs >= 0) & (probs <= 1)).all()


@pytest.mark.parametrize("offset", [-1e12, 1e12, -1e30, 1e30])
def test_enormous_logits_stay_finite(offset):
    logits = torch.full((7, 11), offset, requires_grad=True)
    losses = group_softmax_loss(logits, _labels([0, 3, 1, 2, K, K, K]), GROUPS, INF)
    losses.sum().backward()
    torch.testing.assert_close(losses[0], torch.tensor(2.0).log())
    assert logits.grad.isfinite().all()
    for x in (logits, logits.detach()):
        torch.testing.assert_close(merge_group_probs(x, GROUPS)[:, -1], torch.full((7,), 0.5))


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_logits_far_from_zero_lose_no_precision(offset):
    logits = (torch.randn(12, 11) + offset).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    labels = _labels([0, 1, 2, 3, 4, K] * 2)
    losses = group_softmax_loss(logits, labels, GROUPS, INF)
    expected = group_softmax_loss(exact, labels, GROUPS, INF)
    losses.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)
    probs = merge_group_probs(logits, GROUPS).double()
    torch.testing.assert_close(probs, merge_group_probs(exact, GROUPS), atol=1e-5, rtol=1e-5)


def test_an_infinite_loss_of_an_unused_roi_does_not_spread():
    logits = torch.zeros(2, 11)
    logits[1, 3] = -INF  # class 0, of group 1, on a background RoI
    logits[1, 2] = -INF  # and its "others": the RoI would lose infinity if it took part
    logits.requires_grad_()
    losses = group_softmax_loss(logits, _labels([0, K]), GROUPS, 0.0)
    assert torch.isfinite(losses).all()
    losses.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[1, 2:5] == 0).all()


def test_nothing_that_a_group_loses_spreads_to_other_groups_or_rois():
    logits = torch.randn(2, 11)
    logits[1, 2:5] = -INF  # all of group 1, whose softmax is undefined
    logits.requires_grad_()
    losses = group_softmax_loss(logits, _labels([0, K]), GROUPS, 0.0)
    assert torch.isfinite(losses).all()
    losses.sum().backward()
    assert torch.isfinite(logits.grad[0]).all()
    assert torch.isfinite(logits.grad[1, [0, 1, 5, 6, 7, 8, 9, 10]]).all()


# Errors


@pytest.mark.parametrize("label", [-1, K + 1, 10_000])
def test_labels_out_of_range_are_refused(label):
    with pytest.raises(ValueError, match=r"gt_classes must lie in 0\.\.5 \(5 is background\)"):
        group_softmax_loss(torch.zeros(2, 11), _labels([0, label]), GROUPS)


@pytest.mark.parametrize("shape", [(2, K + 1), (2, 10), (2, 12), (11,), (1, 2, 11)])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(R, 11\)"):
        group_softmax_loss(torch.zeros(shape), _labels([0, 0]), GROUPS)
    with pytest.raises(ValueError, match=r"\(R, 11\)"):
        merge_group_probs(torch.zeros(shape), GROUPS)


@pytest.mark.parametrize("beta", [-1.0, -INF, float("nan")])
def test_a_negative_ratio_is_refused(beta):
    with pytest.raises(ValueError, match="OTHERS_SAMPLE_RATIO"):
        sample_others(torch.ones(1, 2, dtype=torch.bool), beta)
    with pytest.raises(ValueError, match="OTHERS_SAMPLE_RATIO"):
        group_softmax_loss(torch.zeros(1, 11), _labels([0]), GROUPS, beta)


def test_undetermined_groups_are_refused():
    groups = ClassGroups.undetermined(K, (10, 100, 1000), "No annotations.")
    with pytest.raises(ValueError, match="No annotations"):
        group_softmax_loss(torch.zeros(1, 11), _labels([0]), groups)
    with pytest.raises(ValueError, match="No annotations"):
        merge_group_probs(torch.zeros(1, 11), groups)


# Waiting for the device

_WAITING = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select"}


class _Waits(TorchDispatchMode):
    """Notes every operation that would make a CPU wait for its accelerator."""

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != self.device.type:
                self.found.append(f"{name} to {tensor.device}")
        if name in _WAITING:
            self.found.append(name)
        return result


@pytest.mark.parametrize("beta", [0.0, 8.0, INF])
def test_the_forward_pass_on_an_accelerator_never_waits(beta):
    # Fake tensors know their device and shape but no values, so whatever needs a value fails.
    groups = ClassGroups.from_counts(COUNTS)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        groups = groups.to("cuda")
        logits = torch.zeros(7, 11, device="cuda", requires_grad=True)
        labels = torch.zeros(7, dtype=torch.long, device="cuda")
        waits = stack.enter_context(_Waits("cuda"))
        losses, used = group_softmax_loss(logits, labels, groups, beta, return_used=True)
        probs = merge_group_probs(logits, groups)
    assert waits.found == []
    assert (losses.shape, used.shape, probs.shape) == ((5,), (5, 7), (7, 6))
    assert losses.device.type == probs.device.type == "cuda"


def test_the_guard_against_waiting_sees_what_it_should():
    with _Waits("cpu") as waits:
        torch.ones(2).sum().item()
        torch.ones(2).nonzero()
    assert waits.found == ["_local_scalar_dense", "nonzero"]


@pytest.mark.parametrize("beta", [0.0, 8.0, INF])
def test_backward_never_waits_and_forward_reads_the_labels_alone(beta):
    logits = torch.randn(7, 11, requires_grad=True)
    labels = _labels([0, 3, 1, 2, K, K, K])
    with _Waits("cpu") as waits:
        losses = group_softmax_loss(logits, labels, GROUPS, beta)
    # Whether the labels are in range, on a CPU, which has nothing to wait for: see above.
    assert [w for w in waits.found if w != "is_nonzero"] == ["_local_scalar_dense"]
    with _Waits("cpu") as waits:
        losses.sum().backward()
    assert waits.found == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("beta", [0.0, 8.0, INF])
def test_loss_and_backward_do_not_synchronise_with_cuda(beta):
    groups = ClassGroups.from_counts(COUNTS).cuda()
    logits = torch.randn(512, 11, device="cuda", requires_grad=True)
    labels = torch.randint(0, K + 1, (512,), device="cuda")
    group_softmax_loss(logits, labels, groups, beta).sum().backward()  # start-up synchronises
    logits.grad = None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses, used = group_softmax_loss(logits, labels, groups, beta, return_used=True)
        losses.sum().backward()
        probs = merge_group_probs(logits, groups)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, gradient = reference.loss_and_gradient(
        logits.tolist(), labels.tolist(), COUNTS, (10, 100, 1000), used.tolist(), [1.0] * 5
    )
    torch.testing.assert_close(losses, losses.new_tensor(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits.grad, losses.new_tensor(gradient), atol=1e-5, rtol=1e-5)
    merged = reference.merge(logits.tolist(), COUNTS, (10, 100, 1000))
    torch.testing.assert_close(probs, losses.new_tensor(merged), atol=1e-5, rtol=1e-5)
