"""Grids are decoded again and compared with their images."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from salun_core.errors import DataError
from salun_core.evaluation.generated_images import COLUMNS, LIMIT, ROWS, SIDE, grid_image, rows_shown, thumbnails


def noise(count, height=10, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def decoded(uri):
    head, data = uri.split(",", 1)
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert head == f"data:image/{image.format.lower()};base64"
    return image


def test_a_small_grid_is_lossless_and_row_after_row():
    images = noise(6, 10, 12)
    image = decoded(grid_image(images, 3))
    assert (image.format, image.size) == ("PNG", (3 * 12 + 2 * 2, 2 * 10 + 2))
    pixels = np.array(image)
    for index in range(6):
        row, column = divmod(index, 3)
        tile = pixels[row * 12 : row * 12 + 10, column * 14 : column * 14 + 12]
        assert np.array_equal(tile, images[index].permute(1, 2, 0).numpy())


def test_large_images_become_thumbnails():
    images = noise(2, 300, 200)
    assert thumbnails(images).shape == (2, 3, SIDE, 64)
    assert decoded(grid_image(images, 2)).size == (64 * 2 + 2, SIDE)
    assert thumbnails(images[:0]).shape == (0, 3, SIDE, 64)
    small = noise(2)
    assert torch.equal(thumbnails(small), small)
    flat = torch.full((1, 3, 200, 200), 77, dtype=torch.uint8)
    assert thumbnails(flat).eq(77).all()


def test_a_grid_that_would_be_too_long_as_png_is_a_jpeg():
    smooth = torch.linspace(0, 255, 96).view(1, 1, 1, 96).expand(24, 3, 96, 96)
    some = (smooth + noise(24, 96, 96) * 0.05).clamp(0, 255).to(torch.uint8)
    uri = grid_image(some, 8)
    image = decoded(uri)
    assert image.format == "JPEG"
    assert image.size == (8 * 96 + 14, 3 * 96 + 4)
    assert len(uri) <= LIMIT


def test_the_largest_grid_of_noise_stays_below_the_limit():
    uri = grid_image(noise(ROWS * COLUMNS, 96, 96), COLUMNS)
    assert len(uri) <= LIMIT
    assert len(uri) > LIMIT / 4
    assert min(decoded(uri).size) > 100
    with pytest.raises(DataError, match="too large for a report"):
        grid_image(noise(8000, 8, 8), 8)


def test_blurred_images_lose_their_detail_and_do_not_mix():
    black_white = torch.cat([torch.zeros(1, 3, 48, 48), torch.full((1, 3, 48, 48), 255)]).to(torch.uint8)
    pixels = np.array(decoded(grid_image(black_white, 2, blur=True)))
    assert pixels[:, :48].max() == 0
    assert pixels[:, 50:].min() == 255
    checks = ((torch.arange(48) // 6) % 2 * 255).to(torch.uint8).view(1, 1, 1, 48).expand(1, 3, 48, 48)
    sharp, blurred = (np.array(decoded(grid_image(checks, 1, blur=blur)))[:, 12:-12].std() for blur in (False, True))
    assert blurred < sharp / 10


@pytest.mark.parametrize(
    ("images", "columns"),
    [(noise(6), 4), (noise(0), 1), (noise(2), 0), (noise(2).float(), 1), (noise(2)[:, :1], 1), (noise(2)[0], 1)],
)
def test_what_fills_no_grid_is_refused(images, columns):
    with pytest.raises(DataError, match="images"):
        grid_image(images, columns)


def test_the_forgotten_rows_are_always_shown():
    assert rows_shown([3], [5], 10) == list(range(10))
    many = rows_shown([190, 7], [150], 200)
    assert len(many) == ROWS
    assert {7, 150, 190} <= set(many)
    assert many == sorted(many)
