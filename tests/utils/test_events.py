"""metrics.json is strict JSON."""

import json
import math

from detectron2.utils.events import EventStorage

from bags_d2 import BAGSTrainer
from bags_d2.utils.events import StrictJSONWriter


def test_nan_and_infinity_are_null(tmp_path):
    writer = StrictJSONWriter(str(tmp_path / "metrics.json"))
    with EventStorage(5) as storage:
        scalars = {"AP": math.nan, "loss": math.inf, "lr": 0.5}
        storage.put_scalars(**scalars, smoothing_hint=False)
        writer.write()
    writer.close()

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert content == {"AP": None, "loss": None, "lr": 0.5, "iteration": 5}


def test_the_trainer_writes_it(tiny_cfg, tmp_path):
    trainer = BAGSTrainer.__new__(BAGSTrainer)
    trainer.cfg, trainer.max_iter = tiny_cfg("OUTPUT_DIR", str(tmp_path)), 10
    writers = trainer.build_writers()
    for writer in writers:
        writer.close()
    assert sum(isinstance(writer, StrictJSONWriter) for writer in writers) == 1
    assert (tmp_path / "metrics.json").exists()
