"""The small set written in formats of folders, as other programs would write it."""

import json
import shutil

import small_set


def write_all(folder, images, split="train", data=None):
    """Write ``yolo/``, ``voc/``, ``labelme/`` and ``coco/`` with the images of a split.

    Returns:
        For each kind its annotations and its folder of images, as in DATASETS.REGISTER.
    """
    data = data or small_set.content(split)
    rows = {}
    for kind, write in (("yolo", _yolo), ("voc", _voc), ("labelme", _labelme), ("coco", _coco)):
        root = folder / kind
        source, place = write(root, split, data)
        place.mkdir(parents=True, exist_ok=True)
        for image in data["images"]:
            shutil.copy(images / image["file_name"], place)
        rows[kind] = (str(source), str(place))
    return rows


def _by_image(data):
    """Each image, its objects and the path without suffix."""
    for image in data["images"]:
        objects = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        yield image, objects, image["file_name"].rpartition(".")[0]


def _name(annotation):
    return small_set.NAMES[annotation["category_id"] - 1]


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _yolo(root, split, data):
    for image, objects, stem in _by_image(data):
        lines = []
        for a in objects:
            x, y, w, h = a["bbox"]
            center = (x + w / 2) / image["width"], (y + h / 2) / image["height"]
            box = *center, w / image["width"], h / image["height"]
            lines.append(f"{a['category_id'] - 1} " + " ".join(map(str, box)))
        _write(root / "labels" / split / f"{stem}.txt", "\n".join(lines))
    names = "".join(f"  {n}: {name}\n" for n, name in enumerate(small_set.NAMES))
    _write(root / "data.yaml", f"train: images/train\nval: images/val\nnames:\n{names}")
    return root / "data.yaml", root / "images" / split


def _voc(root, split, data):
    for image, objects, stem in _by_image(data):
        text = f"<annotation><filename>{image['file_name']}</filename><size>"
        text += f"<width>{image['width']}</width><height>{image['height']}</height></size>"
        for a in objects:
            x, y, w, h = a["bbox"]
            text += f"<object><name>{_name(a)}</name><pose>Left</pose><bndbox>"
            text += f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax>"
            text += f"<ymax>{y + h}</ymax></bndbox></object>"
        _write(root / "Annotations" / f"{stem}.xml", text + "</annotation>")
    stems = [stem for *_, stem in _by_image(data)]
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    _write(path, "\n".join(stems))
    return path, root / "JPEGImages"


def _labelme(root, split, data):
    for image, objects, stem in _by_image(data):
        shapes = []
        for a in objects:
            x, y, w, h = a["bbox"]
            shape = {"label": _name(a), "shape_type": "rectangle", "flags": {}, "group_id": None}
            shapes.append({**shape, "points": [[x, y], [x + w, y + h]]})
        content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imageData": "aGVsbG8="}
        content["imagePath"] = image["file_name"]
        content.update(imageHeight=image["height"], imageWidth=image["width"])
        _write(root / split / f"{stem}.json", json.dumps(content))
    return root / split, root / split


def _coco(root, split, data):
    _write(root / "annotations" / f"instances_{split}.json", json.dumps(data))
    return root / "annotations" / f"instances_{split}.json", root / split
