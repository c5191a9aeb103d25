"""The jitter of colours: hue, saturation and value do what their names say, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_yolo.data_prep.augment import Layout, Paste, colour_matrix, render


def recoloured(image: np.ndarray, hue: float, saturation: float, value: float) -> np.ndarray:
    layout = Layout(
        (Paste(0, (0, 0, *image.shape[1::-1]), (0, 0, *image.shape[1::-1])),),
        (False, False),
        colour_matrix(hue, saturation, value),
    )
    out = np.empty_like(image)
    render(layout, [image], image.shape[:2], out)
    return out


NOISE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)


def test_a_colour_jitter_of_nothing_changes_nothing():
    assert np.abs(recoloured(NOISE, 0, 1, 1).astype(int) - NOISE).max() <= 1


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 1.5])
def test_value_multiplies_all_channels(value):
    expected = np.clip(NOISE * value, 0, 255)
    assert np.abs(recoloured(NOISE, 0, 1, value) - expected).max() <= 1


@settings(deadline=None, derandomize=True, max_examples=100)
@given(hue=st.floats(-1, 1), saturation=st.floats(0, 2), grey=st.integers(0, 255))
def test_grey_stays_grey(hue, saturation, grey):
    image = np.full((2, 2, 3), grey, np.uint8)
    assert np.abs(recoloured(image, hue, saturation, 1).astype(int) - grey).max() <= 1


@settings(deadline=None, derandomize=True, max_examples=100)
@given(hue=st.floats(-1, 1), saturation=st.floats(0, 2))
def test_hue_and_saturation_keep_the_brightness(hue, saturation):
    luma = np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(luma @ colour_matrix(hue, saturation, 1), luma, atol=1e-5)


def test_without_saturation_there_is_only_brightness():
    result = recoloured(NOISE, 0.3, 0, 1)
    luma = NOISE @ np.array([0.299, 0.587, 0.114])
    assert np.abs(result - luma[..., None]).max() <= 1


def test_hues_turn_and_come_back():
    third = colour_matrix(1 / 3, 1, 1)
    np.testing.assert_allclose(third @ third @ third, np.eye(3), atol=1e-4)
    red, green, blue = third.T  # what becomes of each
    assert red.argmax() != 0  # another primary colour leads
    assert {red.argmax(), green.argmax(), blue.argmax()} == {0, 1, 2}
    np.testing.assert_allclose(
        colour_matrix(0.2, 1, 1) @ colour_matrix(-0.2, 1, 1), np.eye(3), atol=1e-4
    )
