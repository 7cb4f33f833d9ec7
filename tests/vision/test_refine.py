"""Canvas and tokens of the released refiner pipeline (its numbers: tools/parity, case 07c)."""

import numpy as np

from dina.vision import refine


def test_canvas_is_signed_and_rounded_up():
    signed = np.linspace(-1, 1, 5 * 9 * 3, dtype=np.float32).reshape(1, 5, 9, 3)
    wide = refine.canvas(signed, 4)
    assert wide.shape == (1, 8, 12, 3)
    np.testing.assert_allclose(wide[:, [0, -1]][:, :, [0, -1]], signed[:, [0, -1]][:, :, [0, -1]], atol=1e-6)  # corners stay
    for scale in (1, 255):  # 0 to 1, 0 to 255
        np.testing.assert_allclose(refine.canvas((signed + 1) / 2 * scale, 1), signed, atol=1e-5)


def test_tokens_are_squares_in_raster_order():
    latents = np.arange(4 * 6 * 5, dtype=np.float32).reshape(1, 4, 6, 5)
    tokens, layout = refine.to_tokens(latents), refine.token_layout(1, 4, 6)
    for t in range(6):
        row, col = 2 * layout["row"][0, t], 2 * layout["col"][0, t]
        np.testing.assert_array_equal(tokens[0, t].reshape(2, 2, 5), latents[0, row : row + 2, col : col + 2])
    np.testing.assert_array_equal(refine.from_tokens(tokens, 4, 6), latents)
