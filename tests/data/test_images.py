"""Images are read as 8 bits a channel, or refused in one sentence."""

import io

import numpy as np
import pytest
from PIL import Image

from bags_d2 import BagsError, DataError
from bags_d2.data.images import check_image, read_image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def test_an_image_is_bgr(tmp_path):
    PICTURE.save(tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png"), np.asarray(PICTURE)[:, :, ::-1])


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "none"])
@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_the_mode_tells_the_depth_and_not_the_suffix(tmp_path, mode, suffix):
    deep = Image.fromarray(np.full((20, 30), 4000, dtype=np.uint16))
    path = tmp_path / f"x.{suffix}"
    (deep if mode == "I;16" else deep.convert(mode)).save(path, format="TIFF")
    for function in (check_image, read_image):
        with pytest.raises(DataError, match=rf"x\.{suffix}' has more than 8 bits a channel"):
            function(path)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it makes up for
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_damaged_images_are_read_or_refused_in_one_sentence(tmp_path, format):
    buffer = io.BytesIO()
    PICTURE.save(buffer, format=format)
    whole, path = buffer.getvalue(), tmp_path / "x.png"
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(60):
        damaged = np.frombuffer(whole, dtype=np.uint8).copy()
        places = rng.integers(0, min(len(damaged), 200), size=rng.integers(1, 6))
        damaged[places] = rng.integers(0, 256, size=len(places))
        path.write_bytes(damaged.tobytes()[: rng.integers(1, len(damaged) + 1)])
        image, message = outcome(path)
        refused += bool(message)
        assert "\n" not in message
        assert message or (image.dtype == np.uint8 and image.shape[2] == 3)
    assert refused > 10


def outcome(path):
    try:
        return read_image(path), ""
    except BagsError as error:
        return None, str(error)
