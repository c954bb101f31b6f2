"""Splitting by image: what goes to validation, and that the format does not matter."""

import format_sets
import numpy as np
import pytest
import small_set
from hypothesis import given
from hypothesis import strategies as st

from bags_d2 import DataError
from bags_d2.data.formats.split import choose_val, split_dataset

IMAGES = st.lists(st.sets(st.integers(0, 8), max_size=4), min_size=2, max_size=40)


def count(classes, chosen):
    """Images of each class among those that are chosen."""
    return {
        c: sum(c in own for own, is_in in zip(classes, chosen, strict=True) if is_in)
        for c in set().union(*classes)
    }


@given(IMAGES, st.floats(0.05, 0.5), st.integers(0, 5))
def test_each_class_of_two_images_is_validated_where_possible(classes, share, seed):
    total = count(classes, [True] * len(classes))
    if all(any(total[c] < 2 for c in own) for own in classes if own):
        with pytest.raises(DataError, match="No image can be left out"):
            choose_val(classes, share, seed)
        return
    chosen = choose_val(classes, share, seed)
    in_val = count(classes, chosen)
    assert all(in_val[c] <= total[c] // 2 for c in total)
    for c in total:
        if total[c] >= 2 and in_val[c] == 0:  # each of its images has a class that has its half
            assert all(any(in_val[o] >= total[o] // 2 for o in own) for own in classes if c in own)
    assert np.array_equal(chosen, choose_val(classes, share, seed))


def test_with_one_class_an_image_the_shares_are_exact():
    total = {0: 50, 1: 24, 2: 9, 3: 2, 4: 1}
    classes = [{c} for c, n in total.items() for _ in range(n)]
    chosen = choose_val(classes, 0.2, seed=1)
    assert count(classes, chosen) == {0: 10, 1: 4, 2: 1, 3: 1, 4: 0}
    assert not np.array_equal(chosen, choose_val(classes, 0.2, seed=2))


def test_images_without_objects_are_validated_in_proportion():
    classes = [{0}, {0}, *[set()] * 50]
    assert choose_val(classes, 0.2, seed=1)[2:].sum() == 10


def test_the_format_does_not_matter(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    small_set.write_images(images)
    found = {}
    for kind, (source, root) in format_sets.write_all(tmp_path, images).items():
        contents, folder = split_dataset([("s_train", kind, source, root)], [], 0.3, seed=3)
        assert folder == root
        found[kind] = {
            split: (
                [(row["file_name"], row["width"], row["height"]) for row in content["images"]],
                sorted(
                    (a["image_id"], names[a["category_id"]], a["bbox"])
                    for a in content["annotations"]
                ),
            )
            for split, content in contents.items()
            for names in [{row["id"]: row["name"] for row in content["categories"]}]
        }
    assert found["coco"]["val"][0]
    assert found["coco"]["train"][0]
    assert all(other == found["coco"] for other in found.values())


def test_sets_in_several_folders_are_put_together(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    small_set.write_images(images)
    rows = [
        (f"s_{split}", "coco", small_set.write(tmp_path / f"{split}.json", data), str(images))
        for split, data in (("train", small_set.content()), ("val", small_set.content("val")))
    ]
    contents, folder = split_dataset(rows[:1], rows[1:])
    assert folder == str(images)
    for split, content in contents.items():
        expected = small_set.content(split)
        names = [[row["file_name"] for row in c["images"]] for c in (content, expected)]
        assert names[0] == sorted(names[1])
        assert len(content["annotations"]) == len(expected["annotations"])
    bad = small_set.edited(lambda data: data["categories"][1].update(name="red"))
    path = small_set.write(tmp_path / "bad.json", bad)
    with pytest.raises(DataError, match="two classes of one name"):
        split_dataset([("s", "coco", path, str(images))], [])
