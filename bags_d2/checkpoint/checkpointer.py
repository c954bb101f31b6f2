"""Loading checkpoints, with an account of what was not loaded."""

import logging
import os
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from fvcore.common.checkpoint import _strip_prefix_if_present

from ..data.class_statistics import ClassStatistics
from ..errors import BagsError, ConfigError, DataError, MissingFileError
from ..modeling.class_groups import ClassGroups
from ..utils.files import local_path, write_atomically
from .files import read_checkpoint

logger = logging.getLogger(__name__)


class LongTailCheckpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` that distinguishes an intended new classifier from a mistake.

    Detectron2 warns of parameters that a checkpoint does not fill, and goes on. In stage 2 a new
    classifier is intended, and named in one line; a frozen layer of random weights would be a
    disaster, so that is an error, as in evaluation is any new parameter. So is a checkpoint with
    other class groups.
    """

    def __init__(
        self,
        model,
        save_dir="",
        *,
        evaluating: bool = False,
        stage2: bool = False,
        new_classifier: bool = False,
        classes: ClassStatistics | None = None,
        **kwargs,
    ) -> None:
        """
        Args:
            model, save_dir, **kwargs: as for ``DetectionCheckpointer``; a local folder.
            evaluating: the weights are used as they are.
            stage2: MODEL.TRAINABLE_PARAMS selects a part of the model to train.
            new_classifier: leave out the classifier of an initial checkpoint; that of a run which
                is resumed is loaded.
            classes: what saved checkpoints are to remember of the classes.
        """
        super().__init__(model, save_dir, **kwargs)
        self.evaluating = evaluating
        self.stage2 = stage2
        self.new_classifier = new_classifier
        self.classes = classes or ClassStatistics()
        self._resuming = False
        self._path = ""

    def save(self, name, **kwargs):
        """Save atomically, with the record of the classes.

        Raises:
            DataError: if it cannot be written, as on a full disk; nothing is left of it then.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        content = {key: item.state_dict() for key, item in self.checkpointables.items()}
        content |= {"model": self.model.state_dict(), **self.classes.for_checkpoint(), **kwargs}
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with write_atomically(path, "wb") as file:
                torch.save(content, file)
        except (DataError, RuntimeError) as error:  # RuntimeError: torch's for a full disk
            raise DataError(
                f"Checkpoint '{name}.pth' could not be written to '{self.save_dir}' "
                f"({_first_line(error)}); free some space, and go on from the one before "
                "it with --resume."
            ) from None
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename):
        with write_atomically(Path(self.save_dir) / "last_checkpoint") as file:
            file.write(last_filename_basename)

    def get_checkpoint_file(self):
        """The file that ``last_checkpoint`` names; a DataError if its folder has none such."""
        tag = Path(self.save_dir) / "last_checkpoint"
        try:
            name = tag.read_text(encoding="utf-8").strip()
            if name == Path(name).name and (tag.parent / name).is_file():
                return str(tag.parent / name)
        except (OSError, ValueError):  # not text, or with a null byte
            pass
        raise DataError(
            f"'{tag}' names no checkpoint of its folder; write the name of one into it, or delete "
            "it to start afresh."
        )

    def resume_or_load(self, path, *, resume=True):
        self._resuming = resume and self.has_checkpoint()
        return super().resume_or_load(path, resume=resume)

    def load(self, path, *args, **kwargs):
        """Load, with every failure a BagsError."""
        self._path = path
        if path and not os.path.isfile(local_path(path.partition("?")[0], "MODEL.WEIGHTS")):
            raise MissingFileError(f"Checkpoint '{path}' (MODEL.WEIGHTS) does not exist.")
        try:
            rest = super().load(path, *args, **kwargs)
        except BagsError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"Checkpoint '{path}' holds the state of another run ({_first_line(error)}); make "
                "the config that of the run, or start afresh without --resume."
            ) from None
        finally:
            self._parsed_url_during_load = None  # the parent leaves it set after an error
        if "classes" in rest:
            self.model.class_statistics = ClassStatistics.from_checkpoint(rest)
            names = self.model.class_statistics.names or ()
            if not all(name.isprintable() for name in names):
                raise DataError(f"Checkpoint '{path}' has class names that cannot be printed.")
        return rest

    def _load_file(self, filename):
        # The parent's, for .pkl and .pyth files, runs whatever code a pickle brings.
        if filename.endswith((".pkl", ".pyth")):
            return read_checkpoint(filename)
        return super()._load_file(filename)

    def _torch_load(self, f):
        return read_checkpoint(f)

    def _load_model(self, checkpoint):
        weights = checkpoint["model"]
        _strip_prefix_if_present(weights, "module.")
        if self.new_classifier and not self._resuming:
            for name in [n for n in weights if ".box_predictor." in n and ".cls_score." in n]:
                del weights[name]
        grouped = {n: m for n, m in self.model.named_modules() if isinstance(m, ClassGroups)}
        for name, groups in grouped.items():
            self._check_groups(name, groups, weights)
        before = {
            name: groups.class_to_group.clone()
            for name, groups in grouped.items()
            if groups.is_determined and not self.evaluating
        }
        incompatible = super()._load_model(checkpoint)
        for name, class_to_group in before.items():
            if not torch.equal(class_to_group, grouped[name].class_to_group):
                raise ConfigError(
                    f"Checkpoint '{self._path}' groups the classes differently from the config "
                    "(MODEL.BAGS.GROUP_THRESHOLDS, MODEL.LONG_TAIL, the training set); make them "
                    "agree, or start from a stage-1 checkpoint."
                )
        return incompatible

    def _check_groups(self, name: str, groups: ClassGroups, weights: dict) -> None:
        """Refuse other thresholds, and leave out the groups of other classes.

        Done here since the parent drops single tensors of another shape before it loads the rest.
        """
        loaded = weights.get(f"{name}.class_to_group")
        if loaded is not None and len(loaded) != groups.num_classes:
            # The classifier of other classes is left out for its shape; so are all its groups.
            for key in [k for k in weights if k.startswith(f"{name}.")]:
                del weights[key]
        thresholds = weights.get(f"{name}.thresholds")
        if thresholds is not None and len(thresholds) != len(groups.thresholds):
            raise ConfigError(
                f"Checkpoint '{self._path}' was trained with class groups at "
                f"{tuple(torch.as_tensor(thresholds).tolist())} and the model has "
                f"{tuple(groups.thresholds.tolist())}; set MODEL.BAGS.GROUP_THRESHOLDS to the "
                "checkpoint's."
            )

    def _log_incompatible_keys(self, incompatible):
        misshaped = {key: (old, new) for key, old, new in incompatible.incorrect_shapes}
        missing = {*incompatible.missing_keys, *misshaped}
        parameters = dict(self.model.named_parameters())
        new = [name for name in parameters if name in missing]
        whole = self.evaluating or self._resuming
        unfit = [name for name in new if whole or not parameters[name].requires_grad]
        unfit += [name for name in self._frozen_norm_tensors() if name in missing]
        if unfit:
            raise ConfigError(self._unfit_message(unfit, misshaped))
        if new and self.stage2:
            logger.info(
                "Newly initialised, as intended, since they train and '%s' has no such weights: %s",
                self._path,
                ", ".join(new),
            )
        # State of a classifier (class groups, counts, what a loss has accumulated) may start
        # afresh; frozen BatchNorm layers need no batch counters.
        known = {*new} if self.stage2 else set()
        known |= {k for k in missing if ".box_predictor" in k and k not in parameters}
        super()._log_incompatible_keys(
            type(incompatible)(
                [k for k in incompatible.missing_keys if k not in known],
                [k for k in incompatible.unexpected_keys if not k.endswith("num_batches_tracked")],
                [row for row in incompatible.incorrect_shapes if row[0] not in known],
            )
        )

    def _frozen_norm_tensors(self) -> list[str]:
        """Frozen layers hold their weights and statistics as buffers; those matter as much."""
        return [
            f"{name}.{buffer}"
            for name, module in self.model.named_modules()
            if isinstance(module, FrozenBatchNorm2d)
            for buffer, _ in module.named_buffers()
            if buffer != "num_batches_tracked"
        ]

    def _unfit_message(self, names: list[str], misshaped: dict) -> str:
        first = names[0]
        if first in misshaped:
            old, new = misshaped[first]
            first += f" (shape {old} in the checkpoint, {new} in the model)"
        remedy = "set MODEL.WEIGHTS to a checkpoint of this model and these classes."
        use = "evaluated without training" if self.evaluating else "kept frozen"
        if self._resuming:
            remedy = "make the config that of the run which is resumed, or name another OUTPUT_DIR."
            use = "resumed"
        return (
            f"Checkpoint '{self._path}' has no weights for {len(names)} parameters that would be "
            f"{use}, the first being {first}: {remedy}"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
