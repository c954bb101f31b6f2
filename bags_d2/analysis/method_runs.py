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
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import BASELINE, current_name, former_names, list_methods, run_name
from ..data.datasets import dataset_annotations, missing_dataset_message
from ..engine.setup import setup_cfg
from ..errors import ConfigError, DataError, MissingFileError
from ..fitting.calibration import CALIBRATIONS
from ..utils.files import content_hash, load_json, write_json
from ..utils.processes import bags_d2_command
from ..utils.settings import first_difference, select_config

__all__ = ["BASELINE", "Comparison", "Kind", "MethodRun"]

_FINAL = "model_final.pth"
_START = "initial checkpoint"

# Calibrations of the baseline's checkpoint, which need no config of their own: arguments of
# ``bags-d2 calibrate``.
TRANSFORMS = {
    **{name: ("--calibration", name) for name in CALIBRATIONS},
    "tau_norm_tail": ("--calibration", "tau_norm", "--max-count", "100"),
}

# Where a run is executed says nothing about what it measures; which detector it starts from follows
# from the seed.
_INDIFFERENT = (
    *("OUTPUT_DIR", "MODEL.DEVICE", "MODEL.WEIGHTS", "DATALOADER.NUM_WORKERS"),
    *("STAGE2.*", "LAZY.file"),  # in effect elsewhere, if at all
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
class MethodRun:
    """One method with one seed."""

    method: str
    seed: int
    detector: int  # seed of the baseline that it starts from
    overlay: str | None  # what ``--method`` lays over the baseline's config
    settings: dict[str, str]  # of its config, by dotted key
    kind: Kind
    trained: str  # which parameters, in a word
    from_detector: bool  # whether it starts from the baseline of its seed
    weights: str  # what it starts from: a file, a URL, or ""
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / _FINAL

    @property
    def settings_file(self) -> Path:
        return self.folder / "settings.json"

    @property
    def durations_file(self) -> Path:
        return self.folder / "seconds.json"

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
        return _START in _load(self.settings_file, {})

    @property
    def is_complete(self) -> bool:
        """Whether it has been evaluated.

        Raises:
            ConfigError: if the folder holds a run of the same name with other settings, of other
                data, or from another detector.
        """
        if difference := self._difference():
            raise ConfigError(
                f"'{self.folder}' holds a run with other settings: {difference}; delete it or "
                "name another folder with --output."
            )
        try:
            return bool(self.results())
        except DataError:  # cut short
            return False

    @property
    def is_made(self) -> bool:
        """Whether the model itself is there, be it evaluated or not."""
        made = self.checkpoint.exists() and bool(self.durations())
        return made and not self._difference()

    def _difference(self) -> str | None:
        """The first difference of the settings from those that the folder's run was made with."""
        written, wanted = _load(self.settings_file, {}), self.record()
        names = sorted(written, key=lambda name: current_name(name) == name)  # current ones last
        found = {current_name(name): written[name] for name in names}
        # Keys that came with a later version had their defaults in effect; of data that were not
        # recorded nothing is known.
        found = {name: found.get(name, value) for name, value in wanted.items()}
        return first_difference(found, wanted)

    @property
    def seconds(self) -> float | None:
        """How long the model took to make, without evaluation; None if it was not timed."""
        return sum(self.durations()) or None

    def durations(self) -> list[float]:
        """Seconds of each attempt that was not interrupted."""
        durations = _load(self.durations_file, [])
        if not all(isinstance(seconds, int | float) for seconds in durations):
            raise DataError(f"'{self.durations_file}' must hold seconds; delete it.")
        return durations

    def results(self) -> dict:
        """Metrics in percent by task; {} if it has not been evaluated (DataError: damaged)."""
        return _load(self.results_file, {})


class Comparison:
    """The runs of a comparison, and how to make them.

    ``baseline`` is the config of the softmax baseline, ``output`` the folder of the comparison;
    ``opts`` are config keys and values for all runs. With no GPUs, one process works on the CPU.
    With a number of ``detectors``, seeds beyond it start from those detectors again, in turn.

    Raises:
        ConfigError: if the config is faulty, or that of stage 2.
    """

    def __init__(
        self,
        baseline: Path,
        output: Path,
        opts: Sequence[str] = (),
        num_gpus: int = 0,
        detectors: int | None = None,
    ) -> None:
        self.baseline = baseline
        self.output = output
        self.opts = tuple(opts)
        self.num_gpus = num_gpus
        self.detectors = detectors
        self._base = self._read(None)
        if self._base.STAGE2.ENABLED:
            raise ConfigError(
                f"--config-file '{baseline}' is a stage 2; name the config of its baseline."
            )
        self._data: dict[str, str] = {}

    @property
    def test_set(self) -> str:
        """The data set of the runs' results; ConfigError if there are several."""
        if len(self._base.DATASETS.TEST) != 1:
            raise ConfigError(
                f"DATASETS.TEST {tuple(self._base.DATASETS.TEST)} must be one data set here."
            )
        return self._base.DATASETS.TEST[0]

    def require_data(self) -> None:
        """From now on, only runs on the data sets as they are now count.

        Raises:
            ConfigError, MissingFileError: if a data set is not registered or does not exist.
        """
        self._data = _data_record((*self._base.DATASETS.TRAIN, *self._base.DATASETS.TEST))

    def methods(self) -> list[str]:
        """The methods of ``configs/methods`` that need no more than the baseline's box features.

        Of a classifier that is meant for training the whole detector, it is its training alone, in
        stage 2 ("seesaw_classifier").
        """
        methods = []
        for name in list_methods():
            cfg = self._read(name)
            if not self._is_comparable(cfg):
                continue
            predictor = cfg.MODEL.ROI_BOX_PREDICTOR.NAME
            if cfg.STAGE2.ENABLED and _kind_of(cfg)[0] is not Kind.TRAIN:
                methods.append(name)
            elif not cfg.STAGE2.ENABLED and predictor != self._base.MODEL.ROI_BOX_PREDICTOR.NAME:
                methods.append(f"{name}_classifier")
        softmax = self._base.MODEL.ROI_BOX_PREDICTOR.NAME == "FastRCNNOutputLayers"
        softmax &= not self._base.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE
        return [BASELINE, *sorted([*methods, *(TRANSFORMS if softmax else ())])]

    def choose(self, names: str | None) -> list[str]:
        """The baseline, which goes first as others start from it, and the methods that were named.

        ``names`` are separated by commas; "ablations" stands for all of these, None for all
        :meth:`methods`.
        """
        if names is None:
            return self.methods()
        chosen = []
        for name in filter(None, map(str.strip, names.split(","))):
            chosen += list_methods(ablations=True) if name == "ablations" else [name]
        if not chosen:
            raise ConfigError(f"--methods names none, such as {', '.join(self.methods())}.")
        return list(dict.fromkeys([BASELINE, *chosen]))

    def run(self, method: str, seed: int) -> MethodRun:
        """A run of one of :meth:`methods`, or of anything else that ``--method`` takes.

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
        kind, trained = (Kind.TRANSFORM, "nothing") if transform else _kind_of(cfg)
        from_detector = transform or cfg.STAGE2.ENABLED
        if kind is Kind.EVALUATE and not from_detector:
            raise ConfigError(
                f"'{method}' has no model, as SOLVER.MAX_ITER is 0; set it to 1 or more."
            )
        name = run_name(BASELINE, method)
        return MethodRun(
            method=name,
            seed=seed,
            detector=self.detector_seed(seed),
            overlay=overlay,
            settings=settings,
            kind=kind,
            trained=trained,
            from_detector=from_detector,
            weights=str(self.detector(seed)) if from_detector else cfg.MODEL.WEIGHTS,
            folder=self._folder(name, seed),
        )

    def runs(self, methods: Sequence[str], seeds: int) -> list[MethodRun]:
        """Runs of all methods, seed by seed.

        The baseline, and methods that train nothing, have one for each detector.
        """
        runs = [self.run(method, seed) for seed in range(1, seeds + 1) for method in methods]
        for_each_seed = {Kind.TRAIN, Kind.FIT}
        return [
            run
            for run in runs
            if run.seed == run.detector or (run.method != BASELINE and run.kind in for_each_seed)
        ]

    def detector(self, seed: int) -> Path:
        """Checkpoint of the baseline that runs of a seed start from."""
        return self._folder(BASELINE, self.detector_seed(seed)) / _FINAL

    def detector_seed(self, seed: int) -> int:
        """The seed of that baseline."""
        return seed if self.detectors is None else (seed - 1) % self.detectors + 1

    def make(self, run: MethodRun, execute: Callable[[list[str], Path], float]) -> None:
        """Train or fit what a run lacks, and evaluate it; an interrupted run is resumed.

        The baseline of its seed must be complete if it starts there. ``execute`` runs a command,
        logs to a file, and returns the seconds that it took.
        """
        self._make_model(run, execute)
        execute(self.commands(run)[1], run.folder / "console.txt")

    def make_all(
        self,
        runs: Sequence[MethodRun],
        execute: Callable[[list[str], Path], float],
        report: Callable[[MethodRun, str], None] = lambda run, state: None,
    ) -> None:
        """Make all runs that are not complete; classifiers of one detector are evaluated together.

        Args:
            runs: seed by seed, the baseline first.
            execute: as for :meth:`make`.
            report: is told of each run what is done about it.
        """
        for seed, of_seed in itertools.groupby(runs, key=lambda run: run.seed):
            waiting = []
            for run in of_seed:
                if run.is_complete:
                    unrecorded = ", of data and a detector that were not recorded"
                    report(run, f"complete{'' if run.is_recorded else unrecorded}")
                    continue
                report(run, run.kind.value)
                if run.kind is Kind.TRAIN:
                    self.make(run, execute)
                    continue
                # A model that was left without an evaluation is not made again.
                if not run.is_made:
                    self._make_model(run, execute)
                waiting.append(run)
            if waiting:
                log = self.output / f"evaluation_seed{seed}.txt"
                execute(self._evaluation_command(waiting), log)

    def _make_model(self, run: MethodRun, execute: Callable[[list[str], Path], float]) -> None:
        write_json(run.settings_file, run.record())
        making, _ = self.commands(run)
        if making:
            before = run.durations()
            seconds = execute(making, run.folder / "console.txt")
            write_json(run.durations_file, [*before, round(seconds, 1)])

    def _evaluation_command(self, runs: Sequence[MethodRun]) -> list[str]:
        """What evaluates classifiers of the same detector."""
        arguments = ["--config-file", str(self.baseline), "--num-gpus", str(self.num_gpus)]
        for run in runs:
            weights = run.weights if run.kind is Kind.EVALUATE else run.checkpoint
            arguments += ["--run", run.overlay or BASELINE, str(weights), str(run.folder)]
        return bags_d2_command("evaluate", *arguments, *self.opts)

    def commands(self, run: MethodRun) -> tuple[list[str] | None, list[str]]:
        """The commands that make the model of a run (None: it has none) and evaluate it."""
        config = ["--config-file", str(self.baseline)]
        overlay = ["--method", run.overlay] if run.overlay else []
        common = [*config, *overlay, "--num-gpus", str(self.num_gpus)]
        opts = [*self.opts, "SEED", str(run.seed), "OUTPUT_DIR", str(run.folder)]
        start = ["MODEL.WEIGHTS", run.weights] if run.from_detector else []
        cache = self.output / "features" / f"seed{self.detector_seed(run.seed)}"
        cache = ["--cache", str(cache)]
        make, weights = None, str(run.checkpoint)
        if run.kind is Kind.TRAIN:
            # Evaluated separately, so that the time of training is that of training.
            no_test = ["DATASETS.TEST", "()"]
            make = bags_d2_command("train", *common, "--resume", *opts, *start, *no_test)
        elif run.kind is Kind.FIT:
            make = bags_d2_command("fit", *common, *cache, *opts, *start)
        elif run.kind is Kind.TRANSFORM:
            arguments = [*TRANSFORMS[run.method], *config, *cache, *opts, *start]
            make = bags_d2_command("calibrate", *arguments)
        else:
            weights = run.weights
        test = ["--eval-only", *opts, "MODEL.WEIGHTS", weights]
        return make, bags_d2_command("train", *common, *test)

    def _folder(self, method: str, seed: int) -> Path:
        return self.output / method / f"seed{seed}"

    def _is_comparable(self, cfg: CfgNode) -> bool:
        return select_config(cfg, _SAME_DETECTOR) == select_config(self._base, _SAME_DETECTOR)

    def _read(self, overlay: str | None) -> CfgNode:
        return setup_cfg(
            argparse.Namespace(config_file=str(self.baseline), method=overlay, opts=list(self.opts))
        )


def _kind_of(cfg: CfgNode) -> tuple[Kind, str]:
    """How a model comes about, and which of its parameters are trained."""
    globs = cfg.MODEL.TRAINABLE_PARAMS
    if cfg.SOLVER.MAX_ITER == 0:
        return Kind.EVALUATE, "nothing"
    if not globs:
        return Kind.TRAIN, "all"
    if not all(glob.startswith("roi_heads.box_predictor") for glob in globs):
        return Kind.TRAIN, "a part"
    return Kind.FIT, "classifier"


def _load(path: Path, default: dict | list):
    """The content of a file, which must be of the default's type; the default if there is none."""
    content = load_json(path) if path.is_file() else default
    if not isinstance(content, type(default)):
        raise DataError(f"'{path}' is damaged; delete the run's folder, and make it again.")
    return content


def _data_record(names: Sequence[str]) -> dict[str, str]:
    """What distinguishes data sets from edited ones: annotations, and size and time of images."""
    record = {}
    for name in names:
        if name not in DatasetCatalog:
            raise ConfigError(f"Data set '{name}' (DATASETS) is not registered (docs/datasets.md).")
        metadata = MetadataCatalog.get(name)
        if metadata.get("json_file"):
            if not os.path.isfile(metadata.json_file):
                raise MissingFileError(missing_dataset_message(name, metadata.json_file))
            record[f"annotation file of {name}"] = content_hash(metadata.json_file)[:16]
        elif (annotations := dataset_annotations(name)) is not None:
            record[f"annotations of {name}"] = annotations.digest()
        digest, root = hashlib.sha256(), metadata.get("image_root")
        for path in sorted(r["file_name"] for r in DatasetCatalog.get(name)):
            found = os.stat(path) if os.path.isfile(path) else None
            version = (found.st_size, found.st_mtime_ns) if found else None
            shown = os.path.relpath(path, root) if root else path
            digest.update(os.fsencode(f"{shown}\0{version}\n"))
        record[f"set of images of {name}"] = digest.hexdigest()[:16]
    return record
