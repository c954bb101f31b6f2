"""Losses that are no longer numbers: stop before they reach the weights, and say where they are."""

import logging
import os

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from torch import nn

from ..errors import NonFiniteLossError, worker_error
from ..modeling.box_predictors import BAGSOutputLayers

__all__ = ["GuardedAMPTrainer", "GuardedSimpleTrainer"]

logger = logging.getLogger(__name__)

_REMEDY = (
    "lower SOLVER.BASE_LR or fix these images, and go on from the last checkpoint with --resume"
)


class _NonFiniteGuard:
    """Looks at the losses between the backward pass and the optimizer's step.

    Attributes:
        skips_left: how many steps with such losses may still be left out.
    """

    skips_left = 0

    def __init__(self, model: nn.Module, *args, max_skips: int = 0, **kwargs) -> None:
        """
        Args:
            model: the model.
            *args: as for the parent.
            max_skips: how many steps with such losses to leave out.
            **kwargs: as for the parent.
        """
        super().__init__(model, *args, **kwargs)
        self.max_skips = self.skips_left = max_skips
        self._images: list[str] = []
        model.register_forward_pre_hook(self._remember_images)

    def _remember_images(self, _, inputs) -> None:
        batch = inputs[0] if inputs and isinstance(inputs[0], list) else []
        self._images = [str(d.get("file_name", d.get("image_id", "?"))) for d in batch]

    def state_dict(self) -> dict:
        return {**super().state_dict(), "skips": self.max_skips - self.skips_left}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.skips_left = self.max_skips - state_dict.get("skips", 0)

    def run_step(self) -> None:
        try:
            super().run_step()
        except NonFiniteLossError:
            raise
        except FloatingPointError:  # Detectron2's, before there are losses
            raise NonFiniteLossError(
                f"Infinite or NaN proposals of the RPN at iteration {self.iter}, on the images "
                f"{self._image_names()}; {_REMEDY}."
            ) from None
        except RuntimeError as error:
            if own := worker_error(error):
                raise own from None
            raise

    def _write_metrics(self, loss_dict, *args, **kwargs):
        # Called after backward and before step; it waits for the device in any case.
        finite = torch.stack([loss.detach().isfinite().all() for loss in loss_dict.values()]).all()
        if comm.get_world_size() > 1:
            # All processes have to come to the same decision.
            finite = finite.int()
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        if finite:
            return super()._write_metrics(loss_dict, *args, **kwargs)
        message = self._describe(loss_dict)
        if self.skips_left <= 0:
            raise NonFiniteLossError(
                f"{message}; {_REMEDY}, or let SOLVER.MAX_NONFINITE_STEPS such steps pass."
            )
        self.skips_left -= 1
        logger.warning("%s; the step is left out, %d more may be", message, self.skips_left)
        if not isinstance(self, AMPTrainer):  # whose GradScaler leaves such a step out by itself
            for parameter in self.model.parameters():
                parameter.grad = None
        return None

    def _describe(self, loss_dict) -> str:
        odd = [name for name, loss in loss_dict.items() if not bool(loss.isfinite().all())]
        where = ", ".join(odd) or "of another process"
        groups = [
            f"{stage}{i}"
            for stage, losses in _group_losses(self.model)
            for i, loss in enumerate(losses.tolist())
            if loss != loss or loss in (float("inf"), float("-inf"))
        ]
        if groups:
            where += f" (class group {', '.join(groups)})"
        images = self._image_names()
        return f"Infinite or NaN loss at iteration {self.iter}: {where}, on the images {images}"

    def _image_names(self) -> str:
        return ", ".join(map(os.path.basename, self._images)) or "unknown"


class GuardedSimpleTrainer(_NonFiniteGuard, SimpleTrainer):
    """``SimpleTrainer`` that stops at, or leaves out, steps whose losses are not finite."""


class GuardedAMPTrainer(_NonFiniteGuard, AMPTrainer):
    """``AMPTrainer`` that stops at, or leaves out, steps whose losses are not finite."""


def _group_losses(model: nn.Module):
    """The losses of the groups in the last step, and what to write before a group's number."""
    predictors = [m for m in model.modules() if isinstance(m, BAGSOutputLayers)]
    for i, predictor in enumerate(predictors):
        if predictor.last_group_losses is not None:
            stage = f"{i}." if len(predictors) > 1 else ""
            yield stage, predictor.last_group_losses
