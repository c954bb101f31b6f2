"""What importing the package imports, and registers."""

import subprocess
import sys

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, *_):
        root = name.partition(".")[0]
        if root in ("detectron2", "fvcore", "iopath", "yacs", "cv2", "matplotlib", "torchvision"):
            raise ModuleNotFoundError(f"No module named '{root}'", name=root)

sys.meta_path.insert(0, Blocked())
"""
REGISTERED = """
from detectron2.data import DatasetCatalog
from detectron2.modeling import ROI_HEADS_REGISTRY
ROI_HEADS_REGISTRY.get("LongTailCascadeROIHeads")
from bags_d2.modeling.box_predictors.build import ROI_BOX_PREDICTOR_REGISTRY
ROI_BOX_PREDICTOR_REGISTRY.get("SeesawOutputLayers")
"""


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_groups_and_their_loss_need_torch_alone():
    done = python(
        f"{BLOCKED}\n"
        "from bags_d2 import ClassGroups, group_softmax_loss, merge_group_probs, sample_others\n"
        "import torch, bags_d2\n"
        "groups = ClassGroups.from_counts({'a': 5, 'b': 2000})\n"
        "logits = torch.zeros(3, groups.num_logits)\n"
        "group_softmax_loss(logits, torch.tensor([0, 1, 2]), groups)\n"
        "merge_group_probs(logits, groups)\n"
        "bags_d2.BAGSTrainer"
    )
    assert done.stderr.splitlines()[-1].startswith(
        "ModuleNotFoundError: bags_d2 needs detectron2: install"
    )


USES = [
    "from bags_d2 import BAGSTrainer",
    "from bags_d2 import build_box_predictor",
    "import bags_d2.modeling; bags_d2.modeling.LongTailROIHeads",
    "from bags_d2.config import add_bags_config; from detectron2.config import get_cfg\n"
    "add_bags_config(get_cfg())",
]
NAMES = """
import bags_d2, bags_d2.modeling as m
assert set(bags_d2.__all__) <= set(dir(bags_d2))
from bags_d2 import *; from bags_d2.modeling import *
assert m.ClassGroups is ClassGroups and not hasattr(bags_d2, "nothing")
assert not hasattr(m, "nothing")
"""


def test_a_first_use_registers_heads_predictors_and_data_sets_and_all_names_are_there():
    """Each in a fork of an interpreter that has imported Detectron2, which takes seconds."""
    cases = [NAMES]
    for use in USES:
        sets = "" if "modeling" in use else "assert 'glyphs_train' in DatasetCatalog"
        cases.append(f"{use}\n{REGISTERED}\n{sets}")
    done = python(
        "import os, sys, traceback\n"
        "import detectron2.data, detectron2.engine, detectron2.evaluation, detectron2.modeling\n"
        f"for case in {cases!r}:\n"
        "    if child := os.fork():\n"
        "        status = os.waitpid(child, 0)[1]\n"
        "        if status: sys.exit(case)\n"
        "        continue\n"
        "    try:\n"
        "        assert 'bags_d2' not in sys.modules\n"
        "        exec(case, {})\n"
        "        os._exit(0)\n"
        "    except BaseException: traceback.print_exc()\n"
        "    os._exit(1)\n"
    )
    assert done.returncode == 0, done.stderr
