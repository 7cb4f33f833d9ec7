"""The bridge, and the encoder as others call it (the reference's numbers: tools/parity, case 04)."""

import jax
import jax.numpy as jnp
import numpy as np

from dina.vision import bridge, preprocess
from dina.vision.config import encoder_config


def test_encode_uses_the_config():
    config = encoder_config()
    config.encoder.update(width=16, depth=2, heads=2, ff=24, full_layers=(1,))
    config.bridge.out_dim = 12
    params = bridge.init_encoder(config, jax.random.key(0))
    image = np.random.default_rng(0).integers(0, 256, (28, 56, 3)).astype(np.uint8)
    packs = [preprocess.pack_images([image], cells, 3, 2) for cells in (2, 4)]
    features = [bridge.encode(config, params, {k: v[None] for k, v in pack.items()}) for pack in packs]
    assert features[0].shape == (1, 2, 12) and features[1].shape == (1, 4, 12)
    np.testing.assert_allclose(features[0][0], features[1][0, :2], atol=1e-5)
    assert float(jnp.abs(features[0][0, 0] - features[0][0, 1]).max()) > 1e-3
