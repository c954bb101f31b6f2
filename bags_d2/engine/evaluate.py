"""Evaluation of checkpoints, and of many classifiers of one detector in a single pass."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from torch import nn

from ..checkpoint import LongTailCheckpointer
from ..errors import ConfigError
from .trainer import BAGSTrainer, write_results

__all__ = ["evaluate_classifiers", "load_for_evaluation"]

_PREDICTOR = "roi_heads.box_predictor"


def load_for_evaluation(cfg: CfgNode, resume: bool = False) -> nn.Module:
    """The model with its weights; training annotations are read only if the weights need them."""
    alone = cfg.clone()
    alone.defrost()
    alone.DATASETS.TRAIN = ()
    for config in (alone, cfg):
        model = BAGSTrainer.build_model(config)
        LongTailCheckpointer(model, cfg.OUTPUT_DIR, evaluating=True).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=resume
        )
        if all(getattr(module, "is_determined", True) for module in model.modules()):
            break
    return model


def evaluate_classifiers(cfgs: Sequence[CfgNode]) -> None:
    """Evaluate models that differ in their classifiers alone; the rest of them runs only once.

    Each gets the files that ``BAGSTrainer.test`` writes to its ``OUTPUT_DIR/inference``, with the
    same results.

    Args:
        cfgs: a config of each, with its ``MODEL.WEIGHTS``, ``OUTPUT_DIR`` and the same data sets.

    Raises:
        ConfigError: if two models differ in more than the classifier.
    """
    shared, evaluators = None, []
    for cfg in cfgs:
        model = load_for_evaluation(cfg).eval()
        if shared is None:
            shared = SharedDetector(model)
        elif difference := _difference(shared.model, model):
            raise ConfigError(
                f"'{cfg.MODEL.WEIGHTS}' and '{cfgs[0].MODEL.WEIGHTS}' differ in '{difference}', "
                "not in the classifier alone; evaluate them one by one with --eval-only."
            )
        shared.add(model.roi_heads)
        evaluators.append(BAGSTrainer.build_evaluators(cfg, model))
        write_results(cfg, None)
    results = [{} for _ in cfgs]
    for i, name in enumerate(cfgs[0].DATASETS.TEST):
        each = _EachEvaluator([of_model[i] for of_model in evaluators])
        loader = BAGSTrainer.build_test_loader(cfgs[0], name)
        for found, measures in zip(
            results, inference_on_dataset(shared, loader, each), strict=True
        ):
            found[name] = measures
    for cfg, found in zip(cfgs, results, strict=True):
        write_results(cfg, found[name] if len(found) == 1 else found)


class SharedDetector(nn.Module):
    """A detector with RoI heads that differ in their predictors: a list of outputs for an image."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleList()
        box_head = model.roi_heads.box_head
        self._pooler = _Replay(model.roi_heads.box_pooler)
        # The box heads of a cascade's stages, whose boxes do not depend on the classifiers.
        if isinstance(box_head, nn.ModuleList):
            self._box_head = nn.ModuleList(map(_Replay, box_head))
            self._replays = [self._pooler, *self._box_head]
        else:
            self._box_head = _Replay(box_head)
            self._replays = [self._pooler, self._box_head]

    def add(self, heads: nn.Module) -> None:
        """Add RoI heads; all but their predictors is taken from the first ones."""
        heads.box_pooler, heads.box_head = self._pooler, self._box_head
        self.heads.append(heads)

    def forward(self, inputs: list[dict]) -> list[list[dict]]:
        images = self.model.preprocess_image(inputs)
        features = self.model.backbone(images.tensor)
        proposals, _ = self.model.proposal_generator(images, features)
        outputs: list[list[dict]] = [[] for _ in inputs]
        for module in self._replays:
            module.forget()
        for heads in self.heads:
            for module in self._replays:
                module.rewind()
            instances, _ = heads(images, features, proposals)
            for of_image, x, found, size in zip(
                outputs, inputs, instances, images.image_sizes, strict=True
            ):
                height, width = x.get("height", size[0]), x.get("width", size[1])
                of_image.append({"instances": detector_postprocess(found, height, width)})
        return outputs


class _Replay(nn.Module):
    """Computes each of its calls once, and gives the results again in the same order."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.forget()

    def forget(self) -> None:
        self._results: list[torch.Tensor] = []
        self.rewind()

    def rewind(self) -> None:
        self._next = 0

    def forward(self, *args):
        if self._next == len(self._results):
            self._results.append(self.module(*args))
        self._next += 1
        return self._results[self._next - 1]


class _EachEvaluator(DatasetEvaluator):
    """One evaluator for each of the outputs of an image."""

    def __init__(self, evaluators: Sequence[DatasetEvaluator]) -> None:
        self.evaluators = evaluators

    def reset(self) -> None:
        for evaluator in self.evaluators:
            evaluator.reset()

    def process(self, inputs: list[dict], outputs: list[list[dict]]) -> None:
        for evaluator, of_images in zip(self.evaluators, zip(*outputs, strict=True), strict=True):
            evaluator.process(inputs, list(of_images))

    def evaluate(self) -> list[dict]:
        return [evaluator.evaluate() for evaluator in self.evaluators]


def _difference(shared: nn.Module, model: nn.Module) -> str | None:
    """The first weight in which two models differ, classifiers and their counts left out."""
    first = {name.replace(".module.", "."): w for name, w in shared.state_dict().items()}
    for name, weight in model.state_dict().items():
        if name.startswith(_PREDICTOR) and "bbox_pred" not in name:
            continue
        if name not in first or not torch.equal(weight, first[name]):
            return name
    return None
