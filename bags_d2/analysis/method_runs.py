"""Many methods with several seeds: what each run is, the commands that make it, and its files.

A method is what ``--method`` lays over the softmax baseline's config (:mod:`bags_d2.config.files`).
Runs of seed s start from the baseline of seed s, so that differences between methods can be taken
seed by seed. Layout of a comparison's folder::

    features/seed1/                box features of the baseline's detector, for all classifiers
    bags/seed1/settings.json       what the run is of, data included, written before it starts
               model_final.pth
               seconds.json        how long the model took
               inference/results.json
"""

import argparse
import dataclasses
import enum
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import current_name, former_names, list_methods, run_name
from ..data.datasets import missing_dataset_message
from ..engine.setup import setup_cfg
from ..errors import ConfigError, DataError, MissingFileError
from ..utils.files import content_hash, load_json, write_json
from ..utils.settings import first_difference, select_config

__all__ = ["BASELINE", "Comparison", "Kind", "Run"]

BASELINE = "baseline"

# Of the source tree, which alone has the scripts.
_ROOT = Path(__file__).resolve().parents[2]
_FINAL = "model_final.pth"
_START = "initial checkpoint"

# Classifier transforms of the baseline's checkpoint, which need no config of their own: arguments
# of tools/normalize_classifier.py.
TRANSFORMS = {
    "tau_norm": ("--tau", "1.0"),
    "tau_norm_tail": ("--tau", "1.0", "--max-count", "100"),
}

# Where a run is executed says nothing about what it measures; the detector that it starts from is
# told by the seed.
_INDIFFERENT = (
    *("OUTPUT_DIR", "MODEL.DEVICE", "MODEL.WEIGHTS", "DATALOADER.NUM_WORKERS"),
    "STAGE2.*",  # in effect elsewhere, if at all
    *former_names(),
)

# What makes two configs comparable: the detector, the data, and how it is evaluated.
_SAME_DETECTOR = (
    *("MODEL.META_ARCHITECTURE", "MODEL.MASK_ON", "MODEL.ROI_HEADS.NAME", "MODEL.RPN.*"),
    *("MODEL.BACKBONE.*", "MODEL.RESNETS.*", "MODEL.FPN.*", "DATASETS.*", "INPUT.*", "TEST.*"),
)


class Kind(enum.Enum):
    """How the model of a run comes about."""

    TRAIN = "training"
    FIT = "fitting the classifier"
    TRANSFORM = "transforming the classifier"
    EVALUATE = "evaluating"


@dataclasses.dataclass(frozen=True)
class Run:
    """One method with one seed.

    Attributes:
        method: name of the method.
        seed: of the run, and of the detector that it starts from.
        overlay: what ``--method`` lays over the baseline's config, if anything.
        settings: values of its config as text, by dotted key.
        kind: how its model comes about.
        trained: which parameters train, in a word.
        from_detector: whether it starts from the baseline of its seed.
        weights: what it starts from: a file, a URL, or "".
        folder: its files.
    """

    method: str
    seed: int
    overlay: str | None
    settings: dict[str, str]
    kind: Kind
    trained: str
    from_detector: bool
    weights: str
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / _FINAL

    @property
    def results_file(self) -> Path:
        return self.folder / "inference" / "results.json"

    def record(self) -> dict[str, str]:
        """What settings.json says: the settings, and which weights the run starts from."""
        if os.path.isfile(self.weights):
            return self.settings | {_START: content_hash(self.weights)[:16]}
        # A detector that is not there, or no longer, has no content to compare.
        return self.settings if self.from_detector else self.settings | {_START: self.weights}

    @property
    def is_recorded(self) -> bool:
        """Whether data and detector were recorded, as versions before 0.5 did not."""
        path = self.folder / "settings.json"
        return path.is_file() and _START in _load(path, dict)

    @property
    def is_complete(self) -> bool:
        """Whether it has been evaluated.

        Raises:
            ConfigError: if the folder holds a run of the same name with other settings, of other
                data, or from another detector.
        """
        path = self.folder / "settings.json"
        if path.is_file():
            found, wanted = _load(path, dict), self.record()
            found = {current_name(key): value for key, value in found.items()} | {
                key: value for key, value in found.items() if current_name(key) == key
            }
            # Keys that came with a later version had their defaults in effect; of data that were
            # not recorded nothing is known.
            common = found.keys() & wanted.keys()
            difference = first_difference(
                {key: found[key] for key in common}, {key: wanted[key] for key in common}
            )
            if difference:
                raise ConfigError(
                    f"'{self.folder}' holds a run with other settings: {difference}; delete it or "
                    "name another folder with --output."
                )
        try:
            return bool(self.results())
        except (MissingFileError, DataError):  # cut short
            return False

    @property
    def seconds(self) -> float | None:
        """How long the model took to make, evaluation left out; None if it was not timed."""
        durations = self.durations()
        return sum(durations) if durations else None

    def durations(self) -> list[float]:
        """Seconds of each attempt that came to its end."""
        path = self.folder / "seconds.json"
        durations = _load(path, list) if path.is_file() else []
        if not all(isinstance(seconds, int | float) for seconds in durations):
            raise DataError(f"'{path}' must hold seconds; delete it.")
        return durations

    def results(self) -> dict:
        """Metrics in percent by task.

        Raises:
            MissingFileError, DataError: if there are none.
        """
        return _load(self.results_file, dict)


class Comparison:
    """The runs of a comparison, and how to make them."""

    def __init__(
        self, baseline: Path, output: Path, opts: Sequence[str] = (), num_gpus: int = 0
    ) -> None:
        """
        Args:
            baseline: config of the softmax baseline.
            output: folder of the comparison.
            opts: config keys and values for all runs.
            num_gpus: processes of a training; 0 is one on the CPU.

        Raises:
            ConfigError: if the config is faulty, or that of stage 2.
        """
        self.baseline = baseline
        self.output = output
        self.opts = tuple(opts)
        self.num_gpus = num_gpus
        self._base = self._read(None)
        if self._base.STAGE2.ENABLED:
            raise ConfigError(
                f"--config-file '{baseline}' is a stage 2; name the config of its baseline."
            )
        self._data: dict[str, str] = {}

    def require_data(self) -> None:
        """From now on, runs are those of the data sets as they are, and no others.

        Raises:
            ConfigError: if a data set is not registered.
            MissingFileError: if its annotations do not exist.
        """
        self._data = _data_record((*self._base.DATASETS.TRAIN, *self._base.DATASETS.TEST))

    def methods(self) -> list[str]:
        """The methods of ``configs/methods`` that leave detector and data as they are.

        A classifier that is made for training the whole detector is also one for stage 2.
        """
        methods = []
        for name in list_methods():
            cfg = self._read(name)
            if self._is_comparable(cfg):
                predictor = cfg.MODEL.ROI_BOX_PREDICTOR.NAME
                changed = predictor != self._base.MODEL.ROI_BOX_PREDICTOR.NAME
                methods += [name, f"{name}_classifier"][: 1 + (changed and not cfg.STAGE2.ENABLED)]
        return [BASELINE, *sorted([*methods, *TRANSFORMS])]

    def run(self, method: str, seed: int) -> Run:
        """
        Args:
            method: one of :meth:`methods`, or anything else that ``--method`` takes.
            seed: its seed.

        Raises:
            MissingFileError: if there is no such method.
            ConfigError: if it is faulty, changes detector or data, or trains no baseline.
        """
        transform = method in TRANSFORMS
        overlay = None if transform or method == BASELINE else method
        cfg = self._read(overlay)
        if not self._is_comparable(cfg):
            raise ConfigError(
                f"Method '{method}' changes the detector, the data or how they are evaluated, so "
                "it cannot be compared with the baseline; leave it out."
            )
        settings = select_config(cfg, ("*",), ("SEED", *_INDIFFERENT)) | self._data
        if transform:
            settings["transform"] = " ".join(TRANSFORMS[method])
        kind = Kind.TRANSFORM if transform else _kind_of(cfg)
        from_detector = transform or cfg.STAGE2.ENABLED
        if kind is Kind.EVALUATE and not from_detector:
            raise ConfigError(
                f"'{method}' has no model, as SOLVER.MAX_ITER is 0; set it to 1 or more."
            )
        name = run_name(BASELINE, method)
        return Run(
            method=name,
            seed=seed,
            overlay=overlay,
            settings=settings,
            kind=kind,
            trained=_trained(cfg, kind),
            from_detector=from_detector,
            weights=str(self.detector(seed)) if from_detector else cfg.MODEL.WEIGHTS,
            folder=self._folder(name, seed),
        )

    def detector(self, seed: int) -> Path:
        """Checkpoint of the baseline of a seed."""
        return self._folder(BASELINE, seed) / _FINAL

    def make(self, run: Run, execute: Callable[[list[str], Path], float]) -> None:
        """Train or fit what a run lacks, and evaluate it. An interrupted run goes on.

        Args:
            run: the run; that of the baseline with its seed must be complete if it starts there.
            execute: runs a command, logs to a file, and returns the seconds that it took.
        """
        write_json(run.folder / "settings.json", run.record())
        making, evaluating = self.commands(run)
        log = run.folder / "console.txt"
        if making:
            before = run.durations()
            write_json(run.folder / "seconds.json", [*before, round(execute(making, log), 1)])
        execute(evaluating, log)

    def commands(self, run: Run) -> tuple[list[str] | None, list[str]]:
        """The commands that make the model of a run, if it has one of its own, and evaluate it."""
        detector = run.weights if run.from_detector else None
        config = ["--config-file", str(self.baseline)]
        overlay = ["--method", run.overlay] if run.overlay else []
        common = [*config, *overlay, "--num-gpus", str(self.num_gpus)]
        opts = [*self.opts, "SEED", str(run.seed), "OUTPUT_DIR", str(run.folder)]
        start = ["MODEL.WEIGHTS", detector] if detector else []
        if run.kind is Kind.TRAIN:
            # Evaluated separately, so that the time of training is that of training.
            no_test = ["DATASETS.TEST", "()"]
            make = [*_script("train_net.py"), *common, "--resume", *opts, *start, *no_test]
        elif run.kind is Kind.FIT:
            cache = self.output / "features" / f"seed{run.seed}"
            fit = [*_script("tools/fit_classifier.py"), *common, "--cache", str(cache)]
            make = [*fit, *opts, *start]
        elif run.kind is Kind.TRANSFORM:
            files = ["--input", detector, "--output", str(run.checkpoint)]
            arguments = [*files, *TRANSFORMS[run.method], *config]
            make = [*_script("tools/normalize_classifier.py"), *arguments]
        else:
            make = None
        weights = run.checkpoint if make else detector
        evaluate = [*_script("train_net.py"), *common, "--eval-only", *opts]
        return make, [*evaluate, "MODEL.WEIGHTS", str(weights)]

    def _folder(self, method: str, seed: int) -> Path:
        return self.output / method / f"seed{seed}"

    def _is_comparable(self, cfg: CfgNode) -> bool:
        return select_config(cfg, _SAME_DETECTOR) == select_config(self._base, _SAME_DETECTOR)

    def _read(self, overlay: str | None) -> CfgNode:
        return setup_cfg(
            argparse.Namespace(config_file=str(self.baseline), method=overlay, opts=list(self.opts))
        )


def _kind_of(cfg: CfgNode) -> Kind:
    if cfg.SOLVER.MAX_ITER == 0:
        return Kind.EVALUATE
    globs = cfg.MODEL.TRAINABLE_PARAMS
    classifier_only = globs and all(g.startswith("roi_heads.box_predictor") for g in globs)
    cascade = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS) and "Cascade" in cfg.MODEL.ROI_HEADS.NAME
    return Kind.FIT if classifier_only and not cascade else Kind.TRAIN


def _trained(cfg: CfgNode, kind: Kind) -> str:
    if kind in (Kind.EVALUATE, Kind.TRANSFORM):
        return "nothing"
    globs = cfg.MODEL.TRAINABLE_PARAMS
    if not globs:
        return "all"
    only = all(glob.startswith("roi_heads.box_predictor") for glob in globs)
    return "classifier" if only else "a part"


def _script(name: str) -> list[str]:
    return [sys.executable, str(_ROOT / name)]


def _load(path: Path, kind: type):
    content = load_json(path)
    if not isinstance(content, kind):
        raise DataError(f"'{path}' is damaged; delete the run's folder, and make it again.")
    return content


def _data_record(names: Sequence[str]) -> dict[str, str]:
    """What tells data sets from edited ones: their annotations, and size and time of each image."""
    record = {}
    for name in names:
        if name not in DatasetCatalog:
            raise ConfigError(f"Data set '{name}' (DATASETS) is not registered (docs/datasets.md).")
        metadata = MetadataCatalog.get(name)
        if metadata.get("json_file"):
            if not os.path.isfile(metadata.json_file):
                raise MissingFileError(missing_dataset_message(name, metadata.json_file))
            record[f"annotation file of {name}"] = content_hash(metadata.json_file)[:16]
        digest, root = hashlib.sha256(), metadata.get("image_root")
        for path in sorted(r["file_name"] for r in DatasetCatalog.get(name)):
            found = os.stat(path) if os.path.isfile(path) else None
            version = (found.st_size, found.st_mtime_ns) if found else None
            shown = os.path.relpath(path, root) if root else path
            digest.update(os.fsencode(f"{shown}\0{version}\n"))
        record[f"set of images of {name}"] = digest.hexdigest()[:16]
    return record
