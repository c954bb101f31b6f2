"""Detectron2's default trainer, plus what long-tailed training in two stages needs."""

import json
import logging
import math
import os
import weakref
from collections import OrderedDict

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    TrainerBase,
    create_ddp_model,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from ..data.class_counts import training_class_counts
from ..data.class_record import ClassRecord
from ..data.loader import NamingDatasetMapper, build_resumable_loader
from ..errors import ConfigError, MissingFileError
from ..evaluation import LongTailCOCOEvaluator, LongTailLVISEvaluator
from ..modeling.class_groups import ClassCounts, ClassGroups
from ..modeling.test_time_augmentation import GeneralizedRCNNWithTTA
from ..seeding import seed_generators, step_seed
from .checkpoint import LongTailCheckpointer
from .finite import GuardedAMPTrainer, GuardedSimpleTrainer
from .frozen import skip_frozen_parts
from .optimizer import clip_full_model
from .trainable import freeze_norm_statistics, select_trainable_params

__all__ = ["BAGSTrainer"]

logger = logging.getLogger(__name__)

# Detectron2's further samplers. Their order cannot be resumed.
_OTHER_SAMPLERS = (
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
)


class BAGSTrainer(DefaultTrainer):
    """``DefaultTrainer`` that trains chosen parameters and evaluates by training frequency."""

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: config with the keys of ``add_bags_config``.

        Raises:
            BagsError: if the class groups cannot be determined, or a config key has no meaning.
        """
        # Not DefaultTrainer.__init__, which offers no say in the checkpointer and wraps models on
        # the CPU with device ids, as DistributedDataParallel does not allow.
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        for module in _modules(model, ClassGroups, ClassCounts):
            module.require_determined()
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        on_cpu = cfg.MODEL.DEVICE == "cpu"
        ddp_kwargs = {"device_ids": None} if on_cpu else {}
        model = create_ddp_model(model, broadcast_buffers=False, **ddp_kwargs)
        trainer = GuardedAMPTrainer if cfg.SOLVER.AMP.ENABLED else GuardedSimpleTrainer
        self._trainer = trainer(
            model, data_loader, optimizer, max_skips=cfg.SOLVER.MAX_NONFINITE_STEPS
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = LongTailCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            stage2=bool(cfg.MODEL.TRAINABLE_PARAMS),
            new_classifier=cfg.MODEL.ROI_BOX_PREDICTOR.REINITIALIZE,
            classes=ClassRecord.of_training_set(cfg),
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model, freeze all but ``MODEL.TRAINABLE_PARAMS``, and skip what that spares."""
        model = super().build_model(cfg)
        if cfg.MODEL.TRAINABLE_PARAMS:
            select_trainable_params(model, cfg.MODEL.TRAINABLE_PARAMS)
            freeze_norm_statistics(model)
        if cfg.MODEL.SKIP_FROZEN:
            skip_frozen_parts(model)
        for groups in _modules(model, ClassGroups)[:1]:
            logger.info("Class groups by training count: %s", groups)
        return model

    def resume_or_load(self, resume: bool = True) -> None:
        """As the parent's; the data go on where the checkpoint's run has had them."""
        super().resume_or_load(resume=resume)
        if self.start_iter > 0:
            self._trainer.reset_data_loader(
                lambda: self.build_train_loader(self.cfg, self.start_iter)
            )

    def build_hooks(self):
        """The parent's, after one that seeds every step (unless ``SEED`` is negative)."""
        seeding = [_SeededSteps(self.cfg)] if self.cfg.SEED >= 0 else []
        return [*seeding, *super().build_hooks()]

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0):
        """Detectron2's loader, resumable, and with the samplers of ``data/samplers.py`` as well.

        Args:
            cfg: the config.
            start_iter: batches that training has had.

        Raises:
            ConfigError: if there is no such sampler.
        """
        if cfg.DATALOADER.SAMPLER_TRAIN in _OTHER_SAMPLERS:
            return build_detection_train_loader(cfg, mapper=NamingDatasetMapper(cfg, True))
        return build_resumable_loader(cfg, start_iter)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """Detectron2's loader, with errors that name the image."""
        mapper = NamingDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Detectron2's optimizer; ``CLIP_GRADIENTS.CLIP_TYPE: "full_model"`` clips one norm."""
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if not (clip.ENABLED and clip.CLIP_TYPE == "full_model"):
            return super().build_optimizer(cfg, model)
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
        optimizer = super().build_optimizer(cfg, model)
        clip_full_model(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
        return optimizer

    @classmethod
    def build_evaluator(
        cls,
        cfg: CfgNode,
        dataset_name: str,
        output_folder: str,
        class_counts: torch.Tensor | None = None,
    ) -> DatasetEvaluator:
        """The evaluator of a data set's ``evaluator_type``, with AP per bin of training count.

        Args:
            cfg: the config.
            dataset_name: name of the evaluated data set.
            output_folder: for predictions and per-class tables.
            class_counts: training instances (K,); None leaves the bins out.

        Raises:
            ConfigError: if the data set is of another evaluator type.
        """
        kinds = {"lvis": LongTailLVISEvaluator, "coco": LongTailCOCOEvaluator}
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if kind not in kinds:
            raise ConfigError(
                f"Data set '{dataset_name}' has evaluator_type '{kind}'; supported are "
                f"{sorted(kinds)}, set by its registration (docs/datasets.md)."
            )
        options = {}
        if cfg.TEST.LVIS_AP_FIXED:
            if kind != "lvis":
                raise ConfigError(
                    f"TEST.LVIS_AP_FIXED is a measure of LVIS, but data set '{dataset_name}' has "
                    f"evaluator_type '{kind}'; set it to False."
                )
            options["detections_per_class"] = cfg.TEST.DETECTIONS_PER_CLASS
        return kinds[kind](
            dataset_name, output_dir=output_folder, class_counts=class_counts, **options
        )

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: list[DatasetEvaluator] | None = None,
        output_folder: str | None = None,
    ) -> dict:
        """As the parent's; also writes the metrics to ``results.json``.

        Args:
            cfg: the config.
            model: the model, with its weights.
            evaluators: one for each of ``DATASETS.TEST``; None builds them, with the bins of
                training count that the checkpoint remembers or the training set has.
            output_folder: None is ``OUTPUT_DIR/inference``.

        Returns:
            Metrics in percent by task, by data set first if there are several.
        """
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        if evaluators is None:
            counts = _evaluation_counts(cfg, model) if cfg.DATASETS.TEST else None
            evaluators = [
                cls.build_evaluator(
                    cfg, name, os.path.join(output_folder, name), class_counts=counts
                )
                for name in cfg.DATASETS.TEST
            ]
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process() and results:
            PathManager.mkdirs(output_folder)
            with PathManager.open(os.path.join(output_folder, "results.json"), "w") as file:
                json.dump(_nan_to_none(results), file, indent=2)
        return results

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Evaluate with test-time augmentation (``TEST.AUG``); metrics carry the suffix _TTA."""
        logger.info("Running inference with test-time augmentation ...")
        results = cls.test(
            cfg, GeneralizedRCNNWithTTA(cfg, model), output_folder=f"{cfg.OUTPUT_DIR}/inference_TTA"
        )
        return OrderedDict((f"{name}_TTA", value) for name, value in results.items())


class _SeededSteps(HookBase):
    """Makes the random numbers of a step a function of its number."""

    def __init__(self, cfg: CfgNode) -> None:
        self.seed = cfg.SEED
        self.device = torch.device(cfg.MODEL.DEVICE).type

    def before_step(self) -> None:
        seed_generators(step_seed(self.seed, self.trainer.iter, comm.get_rank()), self.device)


def _modules(model: nn.Module, *kinds: type) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kinds)]


def _evaluation_counts(cfg: CfgNode, model: nn.Module) -> torch.Tensor | None:
    """Training instances of each class: as the checkpoint remembers them, else counted."""
    for module in _modules(model, ClassGroups, ClassCounts):
        remembered = module.class_counts.cpu()
        if cfg.MODEL.BAGS.COUNT_BY == "instances" and bool((remembered >= 0).all()):
            return remembered
    try:
        return training_class_counts(cfg, by="instances")
    except MissingFileError as error:
        logger.warning("AP per bin of training instances is left out: %s", error)
        return None


def _nan_to_none(results):
    """Measures that nothing defines are null in JSON, which has no NaN."""
    if isinstance(results, dict):
        return {key: _nan_to_none(value) for key, value in results.items()}
    return None if isinstance(results, float) and math.isnan(results) else results
