"""Every way of cutting must cover each pixel exactly once, and keep what it promises about sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadyq.errors import ArgumentError
from cadyq.functional.tiling import Grid, published_patches, strips

LENGTH = st.integers(1, 300)


def _coverage(boxes, height, width):
    count = np.zeros((height, width), int)
    for y0, y1, x0, x1 in boxes:
        count[y0:y1, x0:x1] += 1
    return count


@settings(max_examples=60, deadline=None)
@given(LENGTH, LENGTH, st.integers(1, 100))
def test_grid_covers_every_pixel_once(height, width, tile):
    grid = Grid(height, width, tile)
    assert (_coverage(grid.boxes, height, width) == 1).all()
    assert grid.boxes.shape == (grid.rows * grid.cols, 4)
    assert grid.areas.sum() == height * width
    assert grid.areas.max() <= tile * tile


def test_grid_is_in_reading_order_and_hashable():
    grid = Grid(5, 7, 4)
    assert (grid.rows, grid.cols) == (2, 2)
    assert grid.boxes.tolist() == [[0, 4, 0, 4], [0, 4, 4, 7], [4, 5, 0, 4], [4, 5, 4, 7]]
    assert grid.areas.tolist() == [16, 12, 4, 3]
    assert len({grid, Grid(5, 7, 4)}) == 1


@settings(max_examples=60, deadline=None)
@given(LENGTH, LENGTH, st.integers(1, 96), st.integers(0, 30))
def test_published_patches_paste_every_pixel_once(height, width, step, overlap):
    size = step + overlap
    read, paste = published_patches(height, width, size, step)
    assert (_coverage(paste, height, width) == 1).all()
    assert (read[:, ::2] <= paste[:, ::2]).all()
    assert (read[:, 1::2] >= paste[:, 1::2]).all()
    assert (read[:, 1] - read[:, 0]).max() <= size + step - 1


def test_published_patches_as_released():
    read, paste = published_patches(180, 320)
    assert read.tolist() == [[0, 180, 0, 96], [0, 180, 90, 186], [0, 180, 180, 320]]
    assert paste.tolist() == [[0, 180, 0, 93], [0, 180, 93, 183], [0, 180, 183, 320]]
    largest, _ = published_patches(185, 20)
    assert largest.tolist() == [[0, 185, 0, 20]]
    assert len(published_patches(186, 20).read) == 2


@settings(max_examples=60, deadline=None)
@given(LENGTH, st.integers(1, 64), st.integers(1, 4), st.integers(0, 80))
def test_strips_keep_every_row_once_and_read_enough_whole_tiles(height, tile, rows, halo):
    result = strips(height, tile, rows, halo)
    kept = [y for strip in result for y in range(*strip.keep)]
    assert kept == list(range(height))
    for read, keep in result:
        assert read[0] <= max(0, keep[0] - halo)
        assert read[1] >= min(height, keep[1] + halo)
        for edge in (*read, *keep):
            assert edge % tile == 0 or edge == height


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Grid(0, 5, 4), "height is 0"),
        (lambda: Grid(5, 5, -1), "tile is -1"),
        (lambda: published_patches(9, 9, 4, 5), "step is 5"),
        (lambda: published_patches(9, 9, 4, 0), "step is 0"),
        (lambda: strips(9, 4, 0, 1), "rows is 0"),
        (lambda: strips(9, 4, 1, -1), "halo is -1"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
