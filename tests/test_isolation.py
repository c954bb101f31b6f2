"""Neither importing the package nor using a carried model asks the network for anything."""

import subprocess
import sys

BLOCKED = """
import socket

def refuse(*_, **__):
    raise AssertionError("a connection was asked for")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = refuse
socket.getaddrinfo = refuse
"""


USE = r"""
import warnings
warnings.filterwarnings("error", module=r"bags_d2\..*")
import numpy as np
import bags_d2, bags_d2.analysis.report, bags_d2.checkpoint.mmdet
from bags_d2 import LongTailPredictor, model_zoo
from bags_d2.analysis.drawing import draw_instances

model_zoo.get_config("lvis_bags_R50.yaml")
predictor = LongTailPredictor.from_config_file("glyphs_bags.yaml")
image = np.full((60, 80, 3), 90, np.uint8)
found = predictor(image)["instances"]
draw_instances(image, found[:5], predictor.class_names, predictor.class_counts)
"""


def test_no_network_and_no_warning_of_its_own(tmp_path):
    """Warnings that the package's own lines cause are errors; its dependencies have theirs."""
    command = [sys.executable, "-c", BLOCKED + USE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
