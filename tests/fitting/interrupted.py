"""A fit that Ctrl-C ends."""

from pathlib import Path

import pytest

from bags_d2.fitting.train import ClassifierTrainer, fit_classifier


def interrupt_fit(cfg, cache, step=6):
    """Fit as if Ctrl-C were pressed after a step, and return the file of its progress."""
    save = ClassifierTrainer.after_step

    def after_step(self):
        save(self)
        if self.iter == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassifierTrainer, "after_step", after_step)
        with pytest.raises(KeyboardInterrupt):
            fit_classifier(cfg, cache)
    return Path(cfg.OUTPUT_DIR) / "fitting.pth"
