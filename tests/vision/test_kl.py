"""The convolutional latent space (the reference's numbers: tools/parity, case 07c)."""

import jax
import jax.numpy as jnp
import numpy as np

from dina.vision import kl


def test_sizes_scales_and_the_posterior():
    auto = kl.KLAutoencoder((4, 8), 1, 3, 2, scale=2.0, shift=0.5)
    image, noise = jax.random.normal(jax.random.key(0), (1, 8, 12, 3)), jax.random.normal(jax.random.key(1), (1, 4, 6, 3))
    coder, decoder = kl.Encoder(auto), kl.Decoder(auto)
    initial = lambda module, x: jax.jit(module.init)(jax.random.key(2), x)["params"]
    params = {"encoder": initial(coder, image), "decoder": initial(decoder, noise)}
    moments = jax.jit(coder.apply)({"params": params["encoder"]}, image)
    mean, deviation = moments[..., :3], jnp.exp(0.5 * moments[..., 3:])
    assert auto.factor == 2 and mean.shape == noise.shape
    encode = jax.jit(auto.encode)
    np.testing.assert_allclose(encode(params, image, 0.0), (mean - 0.5) * 2, atol=1e-5)
    np.testing.assert_allclose(encode(params, image, noise), (mean + deviation * noise - 0.5) * 2, atol=1e-5)
    decoded = jax.jit(auto.decode)(params, noise)
    assert decoded.shape == image.shape
    np.testing.assert_allclose(decoded, jax.jit(decoder.apply)({"params": params["decoder"]}, noise / 2 + 0.5), atol=1e-5)
