"""The HTML report: what it says of runs, and that it works in a browser."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from commands import bags_d2_here
from run_folders import write_run

from bags_d2 import ConfigError
from bags_d2.analysis.crops import choose_crops, cut_crops
from bags_d2.analysis.report import write_html_report
from bags_d2.analysis.runs import read_run

CHROMIUM, CHROMEDRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
NAMES = {3: "<script>alert(1)</script>", 8: "Bee", 20: "cat & dog", 21: "ähre"}
COUNTS = {3: 5, 8: 50, 20: 700, 21: 5000}


@pytest.fixture
def make_run(tmp_path, write_lvis, register):
    """``make_run(name, aps)``: the folder of a run with pictures, evaluated on four classes."""
    for i in (1, 2):
        image = np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), image)
    annotations = write_lvis(NAMES, [(1, 3), (1, 8), (2, 20), (2, 21), (2, 21)])
    dataset = register("report_val", annotations, str(tmp_path))

    def make(name, aps):
        measures = {"AP": aps[0], "AP50": 20.0, "AP1": None, "AP2": 1.0, "bAP": aps[0]}
        rows = [
            {"image_id": 1, "category_id": 8, "bbox": [1, 2, 3, 4], "score": 0.5},
            {"image_id": 2, "category_id": 20, "bbox": [15, 10, 3, 4], "score": 0.9},
        ]
        folder = tmp_path / name
        return write_run(folder, dataset, NAMES, COUNTS, aps, rows, measures)

    return make


def page_of(path, folders, **options):
    write_html_report([read_run(folder) for folder in folders], path, **options)
    return path.read_text(encoding="utf-8")


def text_of(page):
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_the_page_is_self_contained_and_escapes_names(make_run, tmp_path):
    folders = [make_run("one", [10.0, None, 30.0, 40.0]), make_run("two", [20.0, 5.0, 25.0, 40.0])]
    for folder, name in zip(folders, ("FastRCNN", "BAGS"), strict=True):
        (folder / "config.yaml").write_text(
            f"MODEL: {{NAME: {name}, SAME: 1}}\nOUTPUT_DIR: {folder}\n"
        )
        loss = {"total_loss": 1.0, "loss_cls": 0.5, "bags/loss_group0": 0.1}
        lines = [json.dumps({"iteration": i, **loss}) for i in (0, 20, 20)]
        (folder / "metrics.json").write_text("\n".join([*lines, '{"iterat']))
    page = page_of(tmp_path / "new" / "report.html", folders)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    addresses = re.findall(r"""(?:src|href)=["']([^"']{5})""", page)
    assert set(addresses) <= {"data:", "#Deja"} | {a for a in addresses if a.startswith("#")}
    assert "data:image/jpeg;base64," in page
    assert "MODEL.NAME" in page
    assert "MODEL.SAME" not in page
    assert page.count("<svg") >= 4  # bins, change, winners, losses
    assert "model_final.pth" in page  # the checkpoint that is not there, and why
    assert re.search(r'class="best">20.0', page)


def test_what_is_absent_is_said_in_a_sentence(make_run, tmp_path):
    folder = make_run("one", [10.0, None, 30.0, 40.0])
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "2.jpg").write_bytes(b"no image")
    page = page_of(tmp_path / "r.html", [folder])
    for sentence in ("has no readable config.yaml", "no run has a metrics.json", "cannot be read"):
        assert sentence in page
    (folder / "inference" / "report_val" / "lvis_instances_results.json").unlink()
    page = page_of(tmp_path / "r.html", [folder])
    assert "No crops: " in page
    assert "has no detections" in page


def test_crops_are_limited_in_number(make_run, tmp_path):
    folders = [make_run("one", [10.0, None, 30.0, 40.0])]
    page = page_of(tmp_path / "r.html", folders, max_crops=2)
    assert page.count("data:image/jpeg") <= 2
    assert "classes have no crops, to keep this page small" in page
    assert "data:image/jpeg" not in page_of(tmp_path / "r.html", folders, max_crops=0)


def test_confusions_of_a_class_have_their_numbers(make_run, tmp_path):
    folder = make_run("one", [10.0, None, 30.0, 40.0])
    rows = [{"image_id": 2, "category_id": 8, "bbox": [1, 2, 3, 4], "score": 0.9}]
    where = folder / "inference" / "report_val"
    (where / "lvis_instances_results.json").write_text(json.dumps(rows))
    page = page_of(tmp_path / "r.html", [folder])
    text = text_of(page)
    # All objects stand at the same place, and only the second image has detections.
    assert "Its objects are taken for: Bee (2). Taken for it: none other." in text  # ähre
    assert (
        "Its objects are taken for: none other. Taken for it: ähre (2), cat &amp; dog (1)" in text
    )
    assert re.search(r"ähre\s+Bee\s+2\s+2 \(100%\)", text)


def test_doubtful_labels_are_shown_with_ids_and_what_the_model_says(make_run, tmp_path):
    folder = make_run("one", [10.0, None, 30.0, 40.0])
    page = page_of(tmp_path / "r.html", [folder])
    assert "No run has a label_check.csv: evaluate again" in page
    path = folder / "inference" / "report_val" / "label_check.csv"
    path.write_text(
        "annotation_id,name,probability,model_name,model_probability,contradiction\n"
        "4,ähre,0.01,<i>Bee,0.9,3.5\n77,of another set,0,Bee,1,3\n1,Bee,0.9,ähre,0.1,-2\n"
    )
    page = page_of(tmp_path / "r.html", [folder])
    assert page.count('<div class="card">') == 1
    card = text_of(page[page.index('<div class="card">') :])
    assert "labelled ähre (1.00%) rather &lt;i&gt;Bee (90.00%) annotation 4" in card
    assert 'alt="annotation 4" src="data:image/jpeg' in page
    assert str(path) in page


def test_classes_without_objects_are_marked_and_empty_bins_have_a_dash(make_run, tmp_path):
    folder = make_run("one", [10.0, None, 30.0, 40.0])
    path = folder / "inference" / "report_val" / "per_class_bbox.csv"
    path.write_text(path.read_text().replace("8,Bee,,50,1", "8,Bee,,0,0"))
    page = page_of(tmp_path / "r.html", [folder], thresholds=(1, 6, 10))
    assert page.count("never trained</span>") == page.count("no objects here</span>") == 1
    row = text_of(page[page.index('<td class="text">one') :]).split()
    assert row[1:8] == ["10.0", "20.0", "-", "10.0", "-", "35.0", "22.5"]  # AP, AP50, bins, bAP


def test_runs_that_cannot_be_compared_are_refused(make_run, tmp_path):
    folder = make_run("one", [10.0, None, 30.0, 40.0])
    run = read_run(folder)
    with pytest.raises(ConfigError, match="share a name"):
        write_html_report([run, run], tmp_path / "r.html")
    other = read_run(folder, label="other")
    other.category_ids.append(99)
    with pytest.raises(ConfigError, match="not evaluated on the same classes"):
        write_html_report([run, other], tmp_path / "r.html")


def _box(image_id, box, score=None):
    row = {"image_id": image_id, "category_id": 7, "bbox": box}
    return row if score is None else {**row, "score": score}


def test_right_wrong_and_missed():
    objects = [_box(1, [0, 0, 10, 10]), _box(2, [0, 0, 10, 10]), _box(2, [30, 0, 10, 10])]
    detections = [
        _box(1, [0, 0, 10, 10], 0.2),  # right, but not sure enough to count as found
        _box(1, [0, 0, 10, 9], 0.1),  # a second one on the same object
        _box(2, [30, 0, 10, 10], 0.9),
        _box(3, [0, 0, 5, 5], 0.8),
    ]
    crops = choose_crops(7, objects, detections, {}, per_kind=9)
    found = [(c.kind, c.image_id, c.score) for c in crops]
    assert found == [
        ("right", 2, 0.9),
        ("right", 1, 0.2),
        ("wrong", 3, 0.8),
        ("wrong", 1, 0.1),
        ("missed", 1, None),
        ("missed", 2, None),
    ]
    assert crops[-1].box == (0, 0, 10, 10)
    few = choose_crops(7, objects, detections, {}, per_kind=1)
    assert [c.kind for c in few] == ["right", "wrong", "missed"]


def test_nothing_is_wrong_where_a_class_was_not_annotated():
    detections = [_box(i, [0, 0, 5, 5], 0.8) for i in (1, 2, 3)]
    images = {
        1: {"neg_category_ids": []},
        2: {"neg_category_ids": [7]},
        3: {"neg_category_ids": [7], "not_exhaustive_category_ids": [7]},
    }
    crops = choose_crops(7, [], detections, images, 9)
    assert [(c.kind, c.image_id) for c in crops] == [("wrong", 2)]


def test_boxes_of_any_place_and_size_are_cut(tmp_path):
    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((20, 400, 3), np.uint8))
    boxes = [[0, 0, 400, 20], [399, 19, 1, 1], [-5, -5, 4, 4], [390, 5, 100, 100], [5, 5, 0, 0]]
    detections = [_box(1, box, 0.5) for box in boxes]
    crops = choose_crops(7, [], detections, {}, 9)
    cut = cut_crops([*crops, *crops], {1: {"file_name": str(tmp_path / "1.png")}})
    assert len(cut) == len(set(crops)) == 5
    assert cut_crops(crops, {}) == {}


def test_the_tool_writes_it_or_one_sentence(make_run, tmp_path):
    folder = make_run("one", [10.0, None, 30.0, 40.0])
    config = tmp_path / "data.yaml"
    config.write_text(
        "DATASETS:\n  REGISTER:\n"
        f'    - ["report_val", "lvis", "{tmp_path}/annotations.json", "{tmp_path}"]\n'
    )
    tool = ("report", "--output", tmp_path / "r.html")
    done = bags_d2_here(*tool, folder, "--config-file", config)
    assert done.returncode == 0, done.stderr
    assert "data:image/jpeg" in (tmp_path / "r.html").read_text()
    done = bags_d2_here(*tool, "none")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: 'none' has no bbox evaluation")


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium."""
    selenium = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM.is_file() and CHROMEDRIVER.is_file()):
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        *(f"user-data-dir={tmp_path / 'profile'}", "window-size=1200,900"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = selenium.ChromeService(executable_path=str(CHROMEDRIVER))
    driver = selenium.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def test_the_page_works_in_a_browser(browser, make_run, tmp_path):
    folders = [make_run("one", [10.0, None, 30.0, 40.0]), make_run("two", [9.0, 5.0, 32.0, 40.0])]
    page_of(tmp_path / "r.html", folders)
    browser.get((tmp_path / "r.html").as_uri())

    def find(selector):
        return browser.find_elements("css selector", selector)

    def names():
        return [
            row.text.split("\n")[0] for row in find("#classes tbody tr[data-name] td:first-child")
        ]

    headers = find("#classes thead button")
    by_count = [NAMES[i] for i in (3, 8, 20, 21)]
    assert names() == by_count
    # By name, then by AP of the first run: descending, then ascending, unknown values last.
    headers[0].click()
    assert names() == ["<script>alert(1)</script>", "ähre", "Bee", "cat & dog"]
    headers[3].click()
    assert names() == ["ähre", "cat & dog", NAMES[3], "Bee"]
    assert find("#classes th")[3].get_attribute("aria-sort") == "descending"
    headers[3].send_keys("\ue007")  # Enter: the keyboard does as well
    assert names() == [NAMES[3], "cat & dog", "ähre", "Bee"]
    assert find("#classes th")[0].get_attribute("aria-sort") is None

    button = next(b for b in find(".open") if b.text == "cat & dog")
    assert not any(image.is_displayed() for image in find(".crop img"))
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    images = [image for image in find(".crop img") if image.is_displayed()]
    assert len(images) == 4  # of each run one wrong detection and one missed object
    sizes = [browser.execute_script("return arguments[0].naturalWidth", i) for i in images]
    assert min(sizes) > 0

    field = find("#filter")[0]
    field.send_keys("BEE")
    assert [row for row in names() if row] == ["Bee"]
    assert not any(image.is_displayed() for image in find(".crop img"))
    assert find("#shown")[0].text == "1 of 4 classes"
    field.send_keys("\b\b\b")
    assert sum(image.is_displayed() for image in find(".crop img")) == 4
    button.click()
    assert not any(image.is_displayed() for image in find(".crop img"))

    assert browser.get_log("browser") == []
    messages = [json.loads(row["message"])["message"] for row in browser.get_log("performance")]
    requests = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    asked = {params["request"]["url"].partition(":")[0] for params in requests}
    assert "file" in asked
    assert asked <= {"file", "data", "chrome"}  # the last is the empty tab before it
