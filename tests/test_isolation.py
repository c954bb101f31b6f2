"""Neither importing the package nor using a carried model asks the network for anything."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKED = """
import socket

def refuse(*_, **__):
    raise AssertionError("a connection was asked for")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = refuse
socket.getaddrinfo = refuse
"""


@pytest.mark.parametrize(
    "code",
    [
        "import bags_d2, bags_d2.analysis.report, bags_d2.checkpoint.mmdet",
        "from bags_d2 import model_zoo; model_zoo.get('glyphs_bags.yaml', trained=True)",
        "from bags_d2 import model_zoo; model_zoo.get_config('lvis_bags_R50.yaml')",
    ],
)
def test_no_network(code, tmp_path):
    command = [sys.executable, "-c", BLOCKED + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_own_code_warns_of_nothing(tmp_path):
    """Warnings that the package's own lines cause are errors; its dependencies have theirs."""
    code = (
        "import warnings\n"
        "warnings.filterwarnings('error', module=r'bags_d2\\..*')\n"
        "import cv2, numpy as np\n"
        "from bags_d2 import LongTailPredictor\n"
        "from bags_d2.analysis.drawing import draw_instances\n"
        "p = LongTailPredictor.from_config_file('glyphs_bags.yaml')\n"
        "image = np.full((60, 80, 3), 90, np.uint8)\n"
        "found = p(image)['instances']\n"
        "draw_instances(image, found[:5], p.class_names, p.class_counts)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
