"""The patch autoencoder is a rearrangement: exact round trip, unit scale, right places."""

import numpy as np
import pytest
import ml_collections

from dina.vision import autoencoder, preprocess
from tests.vision import packs


@pytest.mark.parametrize("side", [14, 7])
def test_round_trip_and_places(side):
    vision = packs.tiny_config().vision
    batch = packs.batch(vision, [[(1, 2)]])
    auto = autoencoder.make_autoencoder(ml_collections.ConfigDict({"name": "patch", "side": side}))
    tokens, layout = auto.encode({}, batch["patches"], batch), auto.layout(batch)
    assert tokens.shape == (1, auto.tokens(6), auto.token_dim) == (1, *layout["row"].shape[1:], 3 * side**2)
    np.testing.assert_allclose(auto.decode({}, tokens, batch), batch["patches"], atol=1e-5)
    image = preprocess.patches_to_image(batch["patches"][0], (1, 2)) / 127.5 - 1
    for t in np.flatnonzero(layout["segment"][0] == 1):
        y, x = int(layout["row"][0, t]) * side, int(layout["col"][0, t]) * side
        np.testing.assert_allclose(tokens[0, t].reshape(side, side, 3), image[y : y + side, x : x + side], atol=1e-5)


def test_unknown_name():
    with pytest.raises(ValueError, match="patch"):
        autoencoder.make_autoencoder(ml_collections.ConfigDict({"name": "kl"}))
