"""From a config and a checkpoint to detections in images."""

import argparse
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor

from .. import model_zoo
from ..checkpoint import LongTailCheckpointer
from ..config import find_config, run_name
from ..data.class_statistics import ClassStatistics
from ..data.datasets import register_from_config
from ..data.images import read_image
from ..errors import ConfigError, DataError, MissingFileError
from ..evaluation.thresholds import ScoreThresholds
from .setup import check_device, setup_cfg

__all__ = ["LongTailPredictor", "predictor_cfg"]

ImageLike = np.ndarray | str | os.PathLike


class LongTailPredictor(DefaultPredictor):
    """``DefaultPredictor`` that knows names and training counts of its classes.

    Both come from the checkpoint, so no data set has to be there. A checkpoint that fits the model
    only in part is an error instead of a warning.

    ::

        predictor = LongTailPredictor.from_config_file("glyphs_bags.yaml")
        instances = predictor(cv2.imread("picture.png"))["instances"]
        [predictor.class_names[c] for c in instances.pred_classes]

    Attributes:
        cfg: the config.
        model: the detector, in evaluation mode.
        class_names: K names.
        class_counts: long tensor (K,), training instances; None if neither the checkpoint nor the
            training set has them.
        thresholds: of the classes' scores, to be set; None, as it is at first, for all detections.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Load ``MODEL.WEIGHTS``.

        Raises:
            MissingFileError: if the checkpoint does not exist.
            ConfigError: if it does not fit the model.
        """
        check_device(cfg)
        register_from_config(cfg.DATASETS.REGISTER)
        unloaded = cfg.clone()
        unloaded.defrost()
        unloaded.MODEL.WEIGHTS = ""  # the parent's checkpointer goes on without missing weights
        super().__init__(unloaded)
        self.cfg = cfg.clone()
        checkpointer = LongTailCheckpointer(self.model, evaluating=True)
        record = ClassStatistics.from_checkpoint(checkpointer.load(cfg.MODEL.WEIGHTS))
        num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        for key, values in vars(record).items():
            if values is not None and len(values) != num_classes:
                raise ConfigError(
                    f"Checkpoint '{cfg.MODEL.WEIGHTS}' has {key} of {len(values)} classes but "
                    f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}; make them agree."
                )
        classes = ClassStatistics.from_model(cfg, self.model)
        self.class_names = list(record.names or _registered_names(cfg))
        counts = classes.training_instances
        self.class_counts = None if counts is None else torch.tensor(counts)
        self.thresholds: ScoreThresholds | None = None

    def __call__(self, original_image: ImageLike | Sequence[ImageLike]) -> dict | list[dict]:
        """Detect in one image, or in each of a list.

        Args:
            original_image: a uint8 array (H, W, 3) in BGR, as ``cv2.imread`` gives it, the path of
                an image, or a list of either.

        Returns:
            {"instances": detections}, or a list of such: of each image what it gives alone.

        Raises:
            MissingFileError, DataError: if an image cannot be read, or is not as above.
        """
        if isinstance(original_image, np.ndarray | str | os.PathLike):
            return self([original_image])[0]
        if not isinstance(original_image, list | tuple):
            raise DataError(_not_an_image(original_image))
        return self.detect([self.prepare(image) for image in original_image])

    @torch.no_grad()
    def detect(self, inputs: Sequence[dict]) -> list[dict]:
        """Detect in what :meth:`prepare` gave of each image."""
        # Images of one size share a batch. Of several they would be padded to the largest, and
        # their detections would depend on the company.
        batches = defaultdict(list)
        for position, record in enumerate(inputs):
            batches[record["image"].shape].append(position)
        outputs: list[dict] = [{}] * len(inputs)
        for positions in batches.values():
            found = self.model([inputs[position] for position in positions])
            for position, output in zip(positions, found, strict=True):
                if self.thresholds is not None:
                    instances = self.thresholds.select(output["instances"], self.class_names)
                    output = {**output, "instances": instances}
                outputs[position] = output
        return outputs

    def prepare(self, image: ImageLike) -> dict:
        """The model's input for an image: {"image": (3, h, w) resized, "height", "width"}."""
        if isinstance(image, str | os.PathLike):
            path, image = image, read_image(image)
            try:
                return self.prepare(image)
            except DataError as error:
                raise DataError(f"'{os.fspath(path)}': {error}") from None
        is_array = isinstance(image, np.ndarray)
        if not is_array or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(_not_an_image(image))
        height, width = image.shape[:2]
        resize = self.aug.get_transform(image) if image.size else None
        if not image.size or 0 in (getattr(resize, "new_h", 1), getattr(resize, "new_w", 1)):
            raise DataError(
                f"An image of {width} x {height} pixels is too narrow for INPUT.MIN_SIZE_TEST and "
                "MAX_SIZE_TEST; crop it."
            )
        resized = resize.apply_image(image[:, :, ::-1] if self.input_format == "RGB" else image)
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        return {"image": tensor, "height": height, "width": width}

    @classmethod
    def from_config_file(cls, config_file: str | os.PathLike, *args, **kwargs):
        """A predictor of a config file, or of a name in :mod:`bags_d2.model_zoo`.

        Args and errors are those of :func:`predictor_cfg`, and of a checkpoint that does not fit.
        """
        return cls(predictor_cfg(config_file, *args, **kwargs))


def predictor_cfg(
    config_file: str | os.PathLike,
    weights: str | os.PathLike | None = None,
    opts: Sequence = (),
    device: str | None = None,
    method: str | None = None,
) -> CfgNode:
    """The config of a predictor.

    Args:
        config_file: a path, or a name such as "glyphs_bags.yaml".
        weights: the checkpoint. None takes, in this order, ``MODEL.WEIGHTS`` of ``opts``, what
            training with this config left in ``OUTPUT_DIR``, and what the model zoo carries.
        opts: further config keys and values.
        device: None is the config's, or the CPU where there is no CUDA device.
        method: what to lay over the config, as ``--method`` of ``bags-d2 train``.

    Raises:
        MissingFileError: if there is no such config, method or checkpoint.
        ConfigError: if the config is faulty.
    """
    name = os.fspath(config_file)
    is_path = os.path.isfile(find_config(name)[0])
    path = name if is_path else model_zoo.get_config_file(name)
    cfg = setup_cfg(argparse.Namespace(config_file=path, method=method, opts=list(opts)))
    cfg.defrost()
    if weights is not None:
        cfg.MODEL.WEIGHTS = os.fspath(weights)
    elif not any(str(o).startswith(("MODEL.WEIGHTS", "train.init_checkpoint=")) for o in opts):
        cfg.MODEL.WEIGHTS = _trained_weights(cfg, path, method)
    if device or not torch.cuda.is_available():
        cfg.MODEL.DEVICE = device or "cpu"
    cfg.freeze()
    return cfg


def _not_an_image(found: object) -> str:
    is_array = isinstance(found, np.ndarray)
    what = f"{found.dtype} {found.shape}" if is_array else type(found).__name__
    return (
        f"The image must be a uint8 array (height, width, 3) in BGR, found {what}; read it "
        "with bags_d2.data.images.read_image."
    )


def _trained_weights(cfg: CfgNode, config_file: str, method: str | None) -> str:
    """The result of training with a config; its MODEL.WEIGHTS is what training starts from."""
    trained = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    if os.path.isfile(trained):
        return trained
    try:
        return model_zoo.get_checkpoint(f"{run_name(Path(config_file).stem, method)}.yaml")
    except MissingFileError:
        raise MissingFileError(
            f"No trained checkpoint of '{config_file}'{f' with {method}' if method else ''}: "
            f"'{trained}' does not exist; name one "
            "(MODEL.WEIGHTS), or train with bags-d2 train."
        ) from None


def _registered_names(cfg: CfgNode) -> list[str]:
    """Names in the metadata of the data sets, whose files need not be there; else numbers."""
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        names = MetadataCatalog.get(name).get("thing_classes")
        if names is not None and len(names) == num_classes:
            return names
    return [f"class {i}" for i in range(num_classes)]
