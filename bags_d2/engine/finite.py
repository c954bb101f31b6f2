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
    "lower SOLVER.BASE_LR or fix these images, and go on with --resume from the last good "
    "checkpoint (OUTPUT_DIR/last_checkpoint names it)"
)


class _NonFiniteGuard:
    """Looks at the losses between the backward pass and the optimizer's step."""

    skips_left = 0

    def __init__(self, model: nn.Module, *args, max_skips: int = 0, **kwargs) -> None:
        """``max_skips``: how many steps with such losses to leave out before training stops."""
        super().__init__(model, *args, **kwargs)
        self.max_skips = self.skips_left = max_skips
        self._images = "unknown"
        model.register_forward_pre_hook(self._remember_images)

    def _remember_images(self, _, inputs) -> None:
        batch = inputs[0] if inputs and isinstance(inputs[0], list) else []
        names = [str(d.get("file_name", d.get("image_id", "?"))) for d in batch]
        self._images = ", ".join(map(os.path.basename, names)) or "unknown"

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
                f"{self._images}; {_REMEDY}."
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
            super()._write_metrics(loss_dict, *args, **kwargs)
            return
        message = self._describe(loss_dict)
        if self.skips_left <= 0:
            raise NonFiniteLossError(
                f"{message}; {_REMEDY}, or let SOLVER.MAX_NONFINITE_STEPS such steps pass."
            )
        self.skips_left -= 1
        logger.warning("%s; the step is left out, %d more may be", message, self.skips_left)
        if not isinstance(self, AMPTrainer):  # whose GradScaler skips such a step
            for parameter in self.model.parameters():
                parameter.grad = None

    def _describe(self, loss_dict) -> str:
        names = [name for name, loss in loss_dict.items() if not loss.isfinite().all()]
        where = ", ".join(names) or "of another process"
        predictors = [m for m in self.model.modules() if isinstance(m, BAGSOutputLayers)]
        groups = [
            f"{stage}.{group}" if len(predictors) > 1 else str(group)
            for stage, predictor in enumerate(predictors)
            if predictor.last_group_losses is not None
            for group in (~predictor.last_group_losses.isfinite()).nonzero().flatten().tolist()
        ]
        if groups:
            where += f" (class group {', '.join(groups)})"
        return (
            f"Infinite or NaN loss at iteration {self.iter}: {where}, on the images {self._images}"
        )


class GuardedSimpleTrainer(_NonFiniteGuard, SimpleTrainer):
    """``SimpleTrainer`` that stops at, or leaves out, steps whose losses are not finite."""


class GuardedAMPTrainer(_NonFiniteGuard, AMPTrainer):
    """``AMPTrainer`` that stops at, or leaves out, steps whose losses are not finite."""
