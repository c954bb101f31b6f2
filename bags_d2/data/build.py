"""From the names of data sets in a config to checked records and to classes matched by name."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from ..errors import ConfigError, DataError
from .annotations import AnnotationSet
from .class_statistics import require_same_classes
from .datasets import class_names, dataset_annotations

logger = logging.getLogger(__name__)


def training_records(cfg: CfgNode) -> list[dict]:
    """Records of the training images (``DATASETS.TRAIN``), in Detectron2's form.

    Raises:
        MissingFileError, DataError: if annotations do not exist or are faulty, or training sets
            have different classes.
        ConfigError: if proposals are to be loaded.
    """
    refuse_proposals(cfg)
    names = cfg.DATASETS.TRAIN
    keypoints = cfg.MODEL.KEYPOINT_ON
    for name in () if keypoints else names:  # keypoints are Detectron2's to read
        _adopt_and_summarize(name)
    require_same_classes(names)
    return get_detection_dataset_dicts(
        names,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if keypoints else 0,
        check_consistency=False,  # a table of a thousand classes; summaries are logged
    )


def refuse_proposals(cfg: CfgNode) -> None:
    """Raise ConfigError if proposals are to be loaded, which Detectron2 would unpickle."""
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError(
            "MODEL.LOAD_PROPOSALS reads the pickles of DATASETS.PROPOSAL_FILES_*, which can run "
            "any code; set it to False and MODEL.PROPOSAL_GENERATOR.NAME to RPN."
        )


def test_records(cfg: CfgNode, name: str) -> list[dict]:
    """Records of a test set; see :func:`training_records`."""
    if not cfg.MODEL.KEYPOINT_ON:
        _adopt_and_summarize(name)
    return get_detection_dataset_dicts(name, filter_empty=False, check_consistency=False)


def check_datasets(cfg: CfgNode, *, training: bool) -> None:
    """Check the data sets of a config, and that test sets have the classes of the training set.

    Raises as :func:`check_dataset`.
    """
    for name in cfg.DATASETS.TRAIN if training else ():
        check_dataset(cfg, name, training=True)
    for name in cfg.DATASETS.TEST:
        check_dataset(cfg, name, training=False)
        annotations = dataset_annotations(name)
        if training and annotations is not None:
            evaluated_classes(
                *(annotations.path, annotations, MetadataCatalog.get(name)),
                class_names(cfg.DATASETS.TRAIN[0]),
                in_common=cfg.TEST.COMMON_CLASSES_ONLY,
            )


def check_dataset(cfg: CfgNode, name: str, *, training: bool) -> None:
    """Check a data set, to train on or to evaluate on, before anything expensive starts.

    One with a loading function of its own is not checked: loading may be expensive itself.

    Raises:
        MissingFileError, DataError: if its annotation file does not exist, or for its first fault.
        ConfigError: if a training set has another number of classes than the model.
    """
    annotations = dataset_annotations(name)
    if annotations is None:
        return
    loader = DatasetCatalog[name]
    annotations.require_file_names(lvis=loader.args[-1] == "lvis")
    if training:
        annotations.require_objects()
        found, expected = len(annotations.names), cfg.MODEL.ROI_HEADS.NUM_CLASSES
        if found != expected:
            raise ConfigError(
                f"Data set '{name}' has {found} classes but MODEL.ROI_HEADS.NUM_CLASSES is "
                f"{expected}; set it to {found}."
            )
        registered = MetadataCatalog.get(name).get("class_instance_count")
        if registered is not None and list(registered) != annotations.instance_counts().tolist():
            logger.warning(
                "The instance counts that data set '%s' is registered with (class_instance_count) "
                "are not those of '%s'; groups and losses follow the registered ones.",
                *(name, annotations.path),
            )
    elif MetadataCatalog.get(name).evaluator_type == "lvis" and annotations.has_annotations:
        annotations.require_federated()
    if cfg.MODEL.MASK_ON:
        annotations.require_masks(cfg.INPUT.MASK_FORMAT if training else "bitmask")


def evaluated_classes(
    json_file: str,
    annotations: AnnotationSet,
    metadata: Mapping,
    model_names: Sequence[str] | None,
    *,
    in_common: bool = False,
) -> np.ndarray:
    """The model's class (K,) of each of K categories, matched by name; -1 if it is not evaluated.

    Args:
        json_file, annotations: the evaluated file, for messages, and its content.
        metadata: of the data set; its names and id map, if it has any, say which class a category
            is, else category ids are in the order of classes.
        model_names: names of the model's classes in their order; None if unknown, then the data
            set's own order stands.
        in_common: ``TEST.COMMON_CLASSES_ONLY``.

    Raises:
        ConfigError: if the two have different classes and not ``in_common``.
        DataError: if the metadata contradict the file, or a name stands for several classes.
    """
    own = _own_classes(json_file, annotations, metadata)
    if model_names is None:
        return own
    registered = metadata.get("thing_classes")
    names = [registered[c] for c in own] if registered is not None else list(annotations.names)
    model_names = list(model_names)
    in_model_order = [model_names[c] if c < len(model_names) else None for c in own]
    if len(names) == len(model_names) and names == in_model_order:
        return own

    twice = [n for ns in (names, model_names) for n, count in Counter(ns).items() if count > 1]
    if twice:
        raise DataError(
            f"'{json_file}' lists other classes than the model was trained on, and they cannot be "
            f"matched by name, since {twice[0]!r} names several; give each a name of its own."
        )
    # Where names are those of objects, classes may lack theirs.
    missing = sorted(set(model_names) - set(names)) if annotations.lists_all_classes else []
    extra = sorted(set(names) - set(model_names))
    common = len(names) - len(extra)
    if common == 0 or ((missing or extra) and not in_common):
        differences = [
            f"{len(some)} {what} (as {', '.join(map(repr, some[:3]))})"
            for some, what in ((missing, "are missing"), (extra, "are unknown to the model"))
            if some
        ]
        remedy = f"set TEST.COMMON_CLASSES_ONLY to True to evaluate the {common} in common"
        if common == 0:
            remedy = "evaluate on a data set of the model's classes"
        raise ConfigError(
            f"Of the classes of '{json_file}', compared by name with those that the model was "
            f"trained on, {' and '.join(differences)}; {remedy}, or correct the names."
        )
    if missing or extra:
        logger.warning(
            "'%s': only the %d classes in common with the model are evaluated (TEST."
            "COMMON_CLASSES_ONLY): %d of the model are missing, %d are unknown to it.",
            *(json_file, common, len(missing), len(extra)),
        )
    else:
        logger.warning(
            "'%s' lists the model's classes in another order; they are matched by name.", json_file
        )
    class_of = {name: c for c, name in enumerate(model_names)}
    return np.array([class_of.get(name, -1) for name in names], dtype=np.int64)


def _adopt_and_summarize(name: str) -> None:
    annotations = dataset_annotations(name) if name in DatasetCatalog else None
    if annotations is not None:
        logger.info("Data set '%s': %s.", name, annotations.summary)


def _own_classes(json_file: str, annotations: AnnotationSet, metadata: Mapping) -> np.ndarray:
    ids = annotations.categories.outside
    id_map = metadata.get("thing_dataset_id_to_contiguous_id")
    if id_map is None:
        return np.arange(len(ids))
    if set(id_map) != set(ids) or set(id_map.values()) != set(range(len(ids))):
        raise DataError(
            f"thing_dataset_id_to_contiguous_id must map the {len(ids)} category ids of "
            f"'{json_file}' one-to-one onto 0..{len(ids) - 1}; register the data set with this "
            "file's categories."
        )
    return np.array([id_map[i] for i in ids], dtype=np.int64)
