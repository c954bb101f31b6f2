"""Detectron2's default trainer, with what long-tailed training in two stages needs."""

import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from ..checkpoint import LongTailCheckpointer
from ..config.lazy_reader import LAZY_LOADER, lazy_config
from ..data.build import test_records, training_records
from ..data.class_statistics import ClassStatistics
from ..data.datasets import register_from_config
from ..data.loader import LongTailDatasetMapper, build_resumable_loader
from ..errors import BagsError, ConfigError
from ..evaluation import LabelCheck, LongTailCOCOEvaluator, LongTailLVISEvaluator
from ..modeling import lazy_model  # noqa: F401, registers the model of LazyConfigs
from ..modeling.class_groups import ClassCounts, ClassGroups
from ..modeling.test_time_augmentation import GeneralizedRCNNWithTTA
from ..solver import clip_full_model
from ..utils.events import default_writers
from ..utils.files import write_json
from ..utils.seeding import seed_generators, step_seed
from .finite import GuardedAMPTrainer, GuardedSimpleTrainer
from .freezing import freeze_norm_statistics, select_trainable_params, skip_frozen_parts

__all__ = ["BAGSTrainer", "write_results"]

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
        """Build all that training needs; a BagsError if the class groups cannot be determined."""
        # Not DefaultTrainer.__init__, which lets nobody choose the checkpointer and the inner
        # trainer, and gives models on the CPU device ids, which DistributedDataParallel refuses.
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        for module in _modules(model, ClassCounts):
            module.require_determined()
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        lazy = lazy_config(cfg)
        ddp = {"broadcast_buffers": False, **(lazy.train.get("ddp", {}) if lazy else {})}
        on_cpu = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        model = create_ddp_model(model, **ddp, **on_cpu)
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
            classes=ClassStatistics.from_training_set(cfg),
            trainer=weakref.proxy(self),
        )
        self.checkpointer.model.class_statistics = self.checkpointer.classes
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model, with all frozen but ``MODEL.TRAINABLE_PARAMS``.

        The first step of training as of evaluation, so ``DATASETS.REGISTER`` takes effect here.
        """
        register_from_config(cfg.DATASETS.REGISTER)
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
        """Load a checkpoint, and go on with the next images of the run that wrote it.

        The optimizer's settings are the config's, where torch and Detectron2 would silently restore
        the checkpoint's.

        Raises:
            ConfigError: if its classes are those of the training set in another order.
        """
        optimizer = self._trainer.optimizer
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        base_lrs = self.scheduler.base_lrs
        super().resume_or_load(resume=resume)
        self.scheduler.base_lrs = base_lrs
        for group, own, lr in zip(
            optimizer.param_groups, settings, self.scheduler.get_lr(), strict=True
        ):
            group.update(own, lr=lr)
        model, trained_on = self.checkpointer.model, self.checkpointer.classes
        model.class_statistics.require_order_of(trained_on)
        model.class_statistics = trained_on
        if self.start_iter > 0:
            self._trainer.reset_data_loader(
                lambda: self.build_train_loader(self.cfg, self.start_iter)
            )

    def train(self):
        # The parent logs the traceback of every error; for ours, the sentence is enough.
        log = logging.getLogger("detectron2.engine.train_loop")
        log.addFilter(_is_no_user_error)
        try:
            return super().train()
        finally:
            log.removeFilter(_is_no_user_error)

    def build_hooks(self):
        """Detectron2's, after one that seeds every step (unless ``SEED`` is negative)."""
        seeding = [_SeededSteps(self.cfg)] if self.cfg.SEED >= 0 else []
        return [*seeding, *super().build_hooks()]

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's, with ``metrics.json`` in strict JSON."""
        return default_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0):
        """Detectron2's loader, with the samplers of ``data/samplers.py`` as well.

        ``start_iter`` batches are left out, as a resumed run has had them. A loader of a LazyConfig
        that keys cannot describe starts afresh.
        """
        if cfg.DATALOADER.SAMPLER_TRAIN == LAZY_LOADER:
            return instantiate(lazy_config(cfg).dataloader.train)
        if cfg.DATALOADER.SAMPLER_TRAIN in _OTHER_SAMPLERS:
            mapper, records = LongTailDatasetMapper(cfg, True), training_records(cfg)
            return build_detection_train_loader(cfg, mapper=mapper, dataset=records)
        return build_resumable_loader(cfg, start_iter)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """Detectron2's loader, with errors that name the image."""
        mapper = LongTailDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(
            test_records(cfg, dataset_name), mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
        )

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Detectron2's optimizer; ``CLIP_GRADIENTS.CLIP_TYPE: "full_model"`` clips one norm."""
        if lazy := lazy_config(cfg):
            lazy.optimizer.params.model = model
            if "globs" in lazy.optimizer.params:  # what trains is chosen already
                lazy.optimizer.params.update(globs=(), skip_frozen=False)
            return instantiate(lazy.optimizer)
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
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        if lazy := lazy_config(cfg):
            return LRMultiplier(optimizer, instantiate(lazy.lr_multiplier), cfg.SOLVER.MAX_ITER)
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_evaluator(
        cls,
        cfg: CfgNode,
        dataset_name: str,
        output_folder: str,
        class_counts: torch.Tensor | None = None,
        class_names: Sequence[str] | None = None,
    ) -> DatasetEvaluator:
        """The evaluator of a data set's ``evaluator_type``, with AP per bin of training count.

        Args:
            cfg, dataset_name, output_folder: as for Detectron2's.
            class_counts: training instances (K,); None leaves the bins out.
            class_names: K names of the model's classes, by which the data set's are found; None if
                they are in the data set's order.

        Raises:
            ConfigError: if the data set is of another evaluator type, or has other classes.
        """
        kinds = {"lvis": LongTailLVISEvaluator, "coco": LongTailCOCOEvaluator}
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if kind not in kinds:
            raise ConfigError(
                f"Data set '{dataset_name}' has evaluator_type '{kind}'; supported are "
                f"{sorted(kinds)}, set by its registration (docs/datasets.md)."
            )
        options = {"class_names": class_names, "common_classes_only": cfg.TEST.COMMON_CLASSES_ONLY}
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
    def build_evaluators(
        cls, cfg: CfgNode, model: nn.Module, output_folder: str | None = None
    ) -> list[DatasetEvaluator]:
        """One for each of ``DATASETS.TEST``, with the names and counts that the model knows.

        Where the model has a box head, labels are checked in the same pass.
        """
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        classes = ClassStatistics.from_model(cfg, model)
        counts, names = classes.training_instances, classes.names
        heads, evaluators = LabelCheck.heads_of(model), []
        for name in cfg.DATASETS.TEST:
            folder = os.path.join(output_folder, name)
            evaluator = cls.build_evaluator(cfg, name, folder, counts, names)
            if heads is not None:
                check = LabelCheck(heads, name, folder, names, cfg.TEST.COMMON_CLASSES_ONLY)
                evaluator = DatasetEvaluators([evaluator, check])
            evaluators.append(evaluator)
        return evaluators

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: list[DatasetEvaluator] | None = None,
        output_folder: str | None = None,
    ) -> dict:
        """Evaluate as Detectron2 does, and write the metrics to ``results.json`` as well.

        Args:
            cfg, model: what to evaluate.
            evaluators: one for each of ``DATASETS.TEST``; None builds them, with the bins of
                training count that the checkpoint remembers or the training set has.
            output_folder: None is ``OUTPUT_DIR/inference``.

        Returns:
            Metrics in percent by task, by data set first if there are several.
        """
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        if evaluators is None:
            evaluators = cls.build_evaluators(cfg, model, output_folder)
        write_results(cfg, None, output_folder)
        results = super().test(cfg, model, evaluators)
        if results:
            write_results(cfg, results, output_folder)
        return results

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Evaluate with test-time augmentation (``TEST.AUG``); metrics carry the suffix _TTA."""
        logger.info("Running inference with test-time augmentation ...")
        results = cls.test(
            cfg, GeneralizedRCNNWithTTA(cfg, model), output_folder=f"{cfg.OUTPUT_DIR}/inference_TTA"
        )
        return OrderedDict((f"{name}_TTA", value) for name, value in results.items())


def write_results(cfg: CfgNode, results: dict | None, folder: str | None = None) -> None:
    """Write the metrics of an evaluation to ``results.json``, in the main process.

    None removes the file: it is stale as soon as new detections are written.
    """
    path = Path(folder or os.path.join(cfg.OUTPUT_DIR, "inference")) / "results.json"
    if not comm.is_main_process():
        return
    if results is None:
        path.unlink(missing_ok=True)
    else:
        write_json(path, results)


class _SeededSteps(HookBase):
    """Make the random numbers of a step a function of its number."""

    def __init__(self, cfg: CfgNode) -> None:
        self.seed = cfg.SEED
        self.device = torch.device(cfg.MODEL.DEVICE).type

    def before_step(self) -> None:
        seed_generators(step_seed(self.seed, self.trainer.iter, comm.get_rank()), self.device)


def _is_no_user_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], BagsError))


def _modules(model: nn.Module, *kinds: type) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kinds)]
