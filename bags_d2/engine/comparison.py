"""Many methods with several seeds: what each run is, the commands that make it, and its files.

A method is a config that lies beside the softmax baseline's and bears its name with "baseline"
replaced: ``glyphs_bags.yaml`` beside ``glyphs_baseline.yaml``, ``lvis_seesaw_R50.yaml`` beside
``lvis_baseline_R50.yaml``. Runs of seed s start from the baseline of seed s, so that differences
between methods can be taken seed by seed. Layout of a comparison's folder::

    features/seed1/                box features of the baseline's detector, for all classifiers
    bags/seed1/settings.json       what the run is of, written before it starts
               model_final.pth
               seconds.json        how long the model took
               inference/results.json
"""

import argparse
import dataclasses
import enum
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode

from ..errors import ConfigError
from ..utils.settings import first_difference, select_config
from .setup import setup_cfg

__all__ = ["BASELINE", "Comparison", "Kind", "Run"]

BASELINE = "baseline"

# Classifier transforms of the baseline's checkpoint, which need no config of their own: arguments
# of tools/normalize_classifier.py.
TRANSFORMS = {
    "tau_norm": ("--tau", "1.0"),
    "tau_norm_tail": ("--tau", "1.0", "--max-count", "100"),
}

# Where a run is executed says nothing about what it measures; the detector that it starts from is
# told by the seed.
_INDIFFERENT = ("OUTPUT_DIR", "MODEL.DEVICE", "MODEL.WEIGHTS", "DATALOADER.NUM_WORKERS")

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
        config_file: its config.
        settings: values of that config as text, by dotted key.
        kind: how its model comes about.
        trained: which parameters train, in a word.
        from_detector: whether it starts from the baseline of its seed.
        folder: its files.
    """

    method: str
    seed: int
    config_file: Path
    settings: dict[str, str]
    kind: Kind
    trained: str
    from_detector: bool
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "model_final.pth"

    @property
    def results_file(self) -> Path:
        return self.folder / "inference" / "results.json"

    @property
    def is_complete(self) -> bool:
        """Whether it has been evaluated.

        Raises:
            ConfigError: if the folder holds a run of the same name with other settings.
        """
        path = self.folder / "settings.json"
        if path.is_file():
            found = json.loads(path.read_text())
            # Keys that came with a later version had their defaults in effect.
            common = found.keys() & self.settings.keys()
            difference = first_difference(
                {key: found[key] for key in common}, {key: self.settings[key] for key in common}
            )
            if difference:
                raise ConfigError(
                    f"'{self.folder}' holds a run with other settings: {difference}; delete it or "
                    "name another folder with --output."
                )
        return self.results_file.is_file()

    @property
    def seconds(self) -> float | None:
        """How long the model took to make, evaluation left out; None if it was not timed."""
        path = self.folder / "seconds.json"
        return sum(json.loads(path.read_text())) if path.is_file() else None

    def results(self) -> dict:
        """Metrics in percent by task."""
        return json.loads(self.results_file.read_text())


class Comparison:
    """The runs of a comparison, and how to make them."""

    def __init__(
        self, baseline: Path, output: Path, opts: Sequence[str] = (), num_gpus: int = 0
    ) -> None:
        """
        Args:
            baseline: config of the softmax baseline, with "baseline" in its file name.
            output: folder of the comparison.
            opts: config keys and values for all runs.
            num_gpus: processes of a training; 0 is one on the CPU.

        Raises:
            ConfigError: if the file name does not contain "baseline".
        """
        if BASELINE not in baseline.name:
            raise ConfigError(
                f"--config-file '{baseline}' must have '{BASELINE}' in its name, as configs of the "
                "methods are found by replacing it."
            )
        self.baseline = baseline
        self.output = output
        self.opts = tuple(opts)
        self.num_gpus = num_gpus
        self._base = self._read(baseline)

    def methods(self) -> list[str]:
        """All methods with a config of the same detector and data beside the baseline's."""
        before, after = self.baseline.name.split(BASELINE, 1)
        detector = select_config(self._base, _SAME_DETECTOR)
        names = {
            path.name[len(before) : len(path.name) - len(after)]
            for path in self.baseline.parent.glob(f"{before}*{after}")
            if select_config(self._read(path), _SAME_DETECTOR) == detector
        }
        return [BASELINE, *sorted(names - {BASELINE} | set(TRANSFORMS))]

    def run(self, method: str, seed: int) -> Run:
        """
        Args:
            method: one of :meth:`methods`.
            seed: its seed.

        Raises:
            MissingFileError: if the method has no config.
            ConfigError: if that is faulty.
        """
        transform = method in TRANSFORMS
        name = self.baseline.name.replace(BASELINE, BASELINE if transform else method, 1)
        cfg = self._read(self.baseline.parent / name)
        settings = select_config(cfg, ("*",), ("SEED", *_INDIFFERENT))
        if transform:
            settings["transform"] = " ".join(TRANSFORMS[method])
        kind = Kind.TRANSFORM if transform else _kind_of(cfg)
        return Run(
            method=method,
            seed=seed,
            config_file=self.baseline.parent / name,
            settings=settings,
            kind=kind,
            trained=_trained(cfg, kind),
            from_detector=transform or cfg.MODEL.WEIGHTS != self._base.MODEL.WEIGHTS,
            folder=self.output / method / f"seed{seed}",
        )

    def detector(self, seed: int) -> Path:
        """Checkpoint of the baseline of a seed."""
        return self.run(BASELINE, seed).checkpoint

    def make(self, run: Run, execute: Callable[[list[str], Path], float]) -> None:
        """Train or fit what a run lacks, and evaluate it. An interrupted run goes on.

        Args:
            run: the run; that of the baseline with its seed must be complete if it starts there.
            execute: runs a command, logs to a file, and returns the seconds that it took.
        """
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "settings.json").write_text(json.dumps(run.settings, indent=2) + "\n")
        making, evaluating = self.commands(run)
        log = run.folder / "console.txt"
        if making:
            durations = run.folder / "seconds.json"
            before = json.loads(durations.read_text()) if durations.is_file() else []
            durations.write_text(json.dumps([*before, round(execute(making, log), 1)]))
        execute(evaluating, log)

    def commands(self, run: Run) -> tuple[list[str] | None, list[str]]:
        """The commands that make the model of a run, if it has one of its own, and evaluate it."""
        detector = str(self.detector(run.seed)) if run.from_detector else None
        common = ["--config-file", str(run.config_file), "--num-gpus", str(self.num_gpus)]
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
            counts = ["--config-file", str(run.config_file)]
            arguments = [*files, *TRANSFORMS[run.method], *counts]
            make = [*_script("tools/normalize_classifier.py"), *arguments]
        else:
            make = None
        weights = run.checkpoint if make else detector
        evaluate = [*_script("train_net.py"), *common, "--eval-only", *opts]
        return make, [*evaluate, "MODEL.WEIGHTS", str(weights)]

    def _read(self, path: Path) -> CfgNode:
        return setup_cfg(argparse.Namespace(config_file=str(path), opts=list(self.opts)))


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
    return [sys.executable, name]
