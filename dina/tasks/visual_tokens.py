"""Stage V1: the visual quantizer on top of the frozen encoder (reference/tokenizers.md I, V1a; paper §1.4).

Trains the perceptron before the codes and the light feature decoder; the codebooks start by k-means on real features
and follow by moving averages. Terms: commit (keeps vectors near their codes), cosine and smooth_l1 (the quantised sum
must still tell the feature), and where gradient moves the codes codebook (keeps them near their vectors; `code_terms`).

Letters: B rows, N cells of a row, L levels, Z bridge width, D code width, I images.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dina.config import InputError
from dina.quantize import health, rvq
from dina.tasks.base import LossOut, Sums, Task, merge_options
from dina.tasks.vision_batches import data_options, make_batches
from dina.vision import bridge, tokenizer
from dina.vision.tokenizer import PART, with_quantizer

WINDOW = "vision_quantizer_window"  # statistics of this stage alone: hits of the codes, for the log
CODEBOOK_SHARE = 4.0  # codebook loss over commitment: 1 and 0.25 in VQ-VAE and DAC (tokenizers.md C.2)


def default_options() -> ConfigDict:
    """`stage.options` of this task.

    dropout: share of images cut at a random level. kmeans_vectors, kmeans_iterations: of the codebooks' start.
    pixel_share: weight of pixels in the geometry that quant_conv starts with, see `quant_conv_start`. health_window: cells
    that a logged health of the codebooks covers (tokenizers.md I). The data's: `vision_batches.data_options`.
    """
    return ConfigDict({"dropout": 0.25, "kmeans_vectors": 8192, "kmeans_iterations": 12, "pixel_share": 0.5,
                       "health_window": 65536, **data_options()})


class VisualTokens(Task):
    """Trains `vision_quantizer` under a frozen `vision_encoder`."""

    def __init__(self, config, stage):
        super().__init__(config, stage)
        self.tokenizer = tokenizer.make_tokenizer(config.vision)
        self.options = merge_options(default_options(), stage)

    def init(self, key):
        first, second = jax.random.split(key)
        params, stats = tokenizer.init_quantizer(self.config.vision, second)
        encoder = bridge.init_encoder(self.config.vision, first)
        windows = health.rolling(self.tokenizer.rvq.sizes)
        return {"params": {"vision_encoder": encoder, PART: params}, "stats": {PART: stats, WINDOW: windows}}

    def batches(self):
        return make_batches(self.config, self.stage, self.options)

    def start(self, variables, batches, key):
        """A linear perceptron from the first batches, and k-means on what it makes of them."""
        continuous = jax.jit(self.tokenizer.continuous)
        features, pixels, count, used = [], [], 0, 0
        for batch in batches:
            inputs = {name: batch[name] for name in tokenizer.ENCODER_INPUTS}
            real_BN = batch["cell_segment"] > 0
            features.append(np.asarray(continuous(variables["params"], inputs))[real_BN])
            pixels.append(batch["patches"].reshape(*real_BN.shape, -1)[real_BN])
            count, used = count + len(features[-1]), used + 1
            if count >= self.options.kmeans_vectors:
                break
        z_NZ, pixel_NV = (np.concatenate(x)[: self.options.kmeans_vectors] for x in (features, pixels))
        conv = quant_conv_start(variables["params"][PART]["quant_conv"], z_NZ, pixel_NV, self.options.pixel_share)
        params = variables["params"] | {PART: variables["params"][PART] | {"quant_conv": conv}}
        sample_ND = jax.jit(self.tokenizer.project)(params, z_NZ)
        trained, stats = rvq.start(
            self.tokenizer.rvq, sample_ND, np.ones(len(sample_ND)), key, count / used, self.options.kmeans_iterations
        )
        params = params | {PART: with_quantizer(params[PART], trained)}
        return {"params": params, "stats": variables["stats"] | {PART: stats}}

    def loss(self, params, stats, batch, key, axes):
        tokens = self.tokenizer
        weight_BN = (batch["cell_segment"] > 0).astype(jnp.float32)
        z_BNZ = jax.lax.stop_gradient(tokens.continuous(params, batch))
        x_BND = tokens.project(params, z_BNZ)
        x_ND, mask_N = x_BND.reshape(-1, tokens.rvq.dim), weight_BN.reshape(-1)
        drop_key, draw_key = jax.random.split(key)
        cell_keys = image_keys(drop_key, batch["example"], batch["cell_segment"])
        view = tokens.view(params, stats)
        out = rvq.quantize(tokens.rvq, view, x_ND, mask_N, cell_keys, self.options.dropout)
        predicted_BNZ = tokens.reconstruct(params, out.q_ND.reshape(x_BND.shape))
        cosine_BN, smooth_BN = feature_errors(predicted_BNZ, z_BNZ)
        total = lambda value_BN: (jnp.sum(value_BN * weight_BN), jnp.sum(weight_BN))
        terms = code_terms(tokens.rvq, out, self.stage.loss_weights)
        terms |= {"cosine": total(cosine_BN), "smooth_l1": total(smooth_BN)}
        seen = health.observe(out.codes_NL, mask_N, tokens.rvq.sizes, jax.lax.stop_gradient(out.energy_L), axes)
        metrics = {"feature_cosine": total(1 - cosine_BN)} | self._health(out, seen, jnp.sum(mask_N), stats[WINDOW])
        keys_N = rvq.token_keys(draw_key, batch["example"], x_BND.shape[1])
        updates = rvq.statistics(tokens.rvq, view, x_ND, out.codes_NL, mask_N, keys_N, axes)
        return LossOut(terms, metrics, {PART: updates, WINDOW: seen})

    def _health(self, out: rvq.QuantizeOut, seen: health.Window, weight: Array, windows) -> dict[str, tuple[Array, Array]]:
        """Usage and perplexity of the global batch and residual energy, per level; under window/ those of the last full
        window before it, with its length and its dead codes."""
        now, before = health.report(seen), health.report(health.latest(windows))
        energy, total = out.energy_L
        metrics = {"window/cells": (before.pop("vectors") * weight, weight)}
        for level in range(self.tokenizer.rvq.levels):
            metrics |= {f"{name}/{level}": (now[name][level] * weight, weight) for name in ("usage", "perplexity")}
            metrics[f"energy/{level}"] = (energy[level], total[level])
            metrics |= {f"window/{name}/{level}": (values_L[level] * weight, weight) for name, values_L in before.items()}
        return metrics

    def update_stats(self, stats, updates, key, step):
        del step
        books = rvq.apply(self.tokenizer.rvq, stats[PART], updates[PART], key)
        return stats | {PART: books, WINDOW: health.roll(stats[WINDOW], updates[WINDOW], self.options.health_window)}


def code_terms(cfg: rvq.RVQConfig, out: rvq.QuantizeOut, weights) -> Sums:
    """Terms of the codes themselves: commit, and where gradient moves the codes codebook.

    If the stage's `weights` have no codebook, that loss is part of commit, CODEBOOK_SHARE times: another quantizer is then
    a change of the quantizer's config alone.
    """
    if not cfg.books_are_trained:
        return {"commit": out.commit}
    if "codebook" in weights:
        return {"commit": out.commit, "codebook": out.codebook}
    return {"commit": (out.commit[0] + CODEBOOK_SHARE * out.codebook[0], out.commit[1])}


def quant_conv_start(params, z_NZ: np.ndarray, pixel_NV: np.ndarray, pixel_share: float):
    """Parameters with which quant_conv is the linear map whose distances weigh features and pixels as asked.

    Trained from random values, the perceptron keeps the geometry of the features, where pixels lie in directions of
    little variance: a linear map then read held-out digit cells from the codes with a squared error of 0.52 (0.15 from
    the features themselves). From this start, before any training, it was 0.34, 0.30 and 0.29 at shares of 0, 0.5 and
    0.75, and a linear probe named 0.91, 0.90 and 0.89 of the digits (one encoder, one seed, test pictures).

    gelu(u) - gelu(-u) = u, so a hidden layer of pairs makes the perceptron exactly linear.

    Args:
        params: of `tokenizer.QuantConv`: norm, fc1 [Z, Z], fc2 [Z, D], with 2 D <= Z.
        z_NZ: bridge features.
        pixel_NV: pixels of the same cells.
        pixel_share: 0 weighs features only, 1 what pixels can be read from them only.
    """
    mean = z_NZ.mean(1, keepdims=True)
    u_NZ = ((z_NZ - mean) / np.sqrt(((z_NZ - mean) ** 2).mean(1, keepdims=True) + 1e-5)).astype(np.float64)
    centre_Z, dim = u_NZ.mean(0), params["fc2"]["kernel"].shape[1]
    if 2 * dim > u_NZ.shape[1]:
        raise InputError(f"vision.quantizer.dim {dim}: at most half of vision.bridge.out_dim ({u_NZ.shape[1]})")
    u_NZ -= centre_Z
    covariance_ZZ = u_NZ.T @ u_NZ / len(u_NZ)
    ridge_ZZ = 1e-3 * np.trace(covariance_ZZ) / len(covariance_ZZ) * np.eye(len(covariance_ZZ))
    read_ZV = np.linalg.solve(covariance_ZZ + ridge_ZZ, u_NZ.T @ (pixel_NV - pixel_NV.mean(0)) / len(u_NZ))
    pixels_ZZ = read_ZV @ read_ZV.T
    metric_ZZ = (1 - pixel_share) * np.eye(len(covariance_ZZ)) / max(np.trace(covariance_ZZ), 1e-9)
    metric_ZZ += pixel_share * pixels_ZZ / max(np.trace(covariance_ZZ @ pixels_ZZ), 1e-9)
    values_Z, vectors_ZZ = np.linalg.eigh(metric_ZZ)
    root_ZZ = vectors_ZZ * np.sqrt(np.maximum(values_Z, 0)) @ vectors_ZZ.T
    axes_ZD = np.linalg.eigh(root_ZZ @ covariance_ZZ @ root_ZZ)[1][:, ::-1][:, :dim]
    map_ZD = root_ZZ @ axes_ZD * np.sqrt(dim)  # about unit variance a dimension
    fc1_ZZ, fc2_ZD = np.zeros_like(covariance_ZZ), np.zeros((len(covariance_ZZ), dim))
    fc1_ZZ[:, :dim], fc1_ZZ[:, dim : 2 * dim] = map_ZD, -map_ZD
    fc2_ZD[:dim], fc2_ZD[dim : 2 * dim] = np.eye(dim), -np.eye(dim)
    cast = lambda kernel, bias: {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    return params | {"fc1": cast(fc1_ZZ, -centre_Z @ fc1_ZZ), "fc2": cast(fc2_ZD, np.zeros(dim))}


def image_keys(key: Array, example_B: Int[Array, " B"], segment_BN: Int[Array, "B N"]) -> Array:
    """Keys [B * N], equal for the cells of one image, by (step, global row, image)."""

    def one(example, segment_N):
        row_key = jax.random.fold_in(key, example)
        return jax.vmap(lambda segment: jax.random.fold_in(row_key, segment))(segment_N)

    return jax.vmap(one)(example_B, segment_BN).reshape(-1)


def feature_errors(
    predicted: Float[Array, "*N Z"], target: Float[Array, "*N Z"]
) -> tuple[Float[Array, "*N"], Float[Array, "*N"]]:
    """(1 - cosine, mean smooth-L1 with unit width) of each vector."""
    dot = jnp.sum(predicted * target, -1)
    norms = jnp.sqrt(jnp.maximum(jnp.sum(predicted**2, -1) * jnp.sum(target**2, -1), 1e-12))
    error = jnp.abs(predicted - target)
    smooth = jnp.mean(jnp.where(error < 1, 0.5 * error**2, error - 0.5), -1)
    return 1 - dot / norms, smooth


# ---------------------------------------------------------------------------------------------------- the digit gate
def pooled_features(feature_BNZ: np.ndarray, segment_BN: np.ndarray, images: int) -> np.ndarray:
    """Mean and maximum over the cells of each image, side by side: [B, I, 2 Z]; zero where there is no image."""
    b, _, z = feature_BNZ.shape
    out = np.zeros((b, images, 2 * z), np.float32)
    for image in range(images):
        here = (segment_BN == image + 1)[..., None]
        count = np.maximum(here.sum(1), 1)
        out[:, image, :z] = np.where(here, feature_BNZ, 0).sum(1) / count
        out[:, image, z:] = np.where(here.any(1), np.where(here, feature_BNZ, -np.inf).max(1, initial=-1e30), 0)
    return out


def probe_accuracy(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> float:
    """Accuracy of a logistic regression (standardised inputs) fitted on one set and scored on another."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    return float(model.fit(train_x, train_y).score(test_x, test_y))


def digit_gate(config, variables, train, test, levels: int | None = None) -> dict[str, float]:
    """How much of the digit survives quantisation, by linear probes on image-pooled cell features.

    Args:
        config: the experiment.
        variables: {'params', 'stats'} with vision_encoder and vision_quantizer.
        train, test: iterables of batches of `VisionBatches` (uses the pack arrays and `digit`); a few thousand
            training images are needed for the probe to be near its limit.
        levels: quantise with the first so many levels only.

    Returns:
        {'continuous', 'quantised': accuracies on `test` from bridge features and from the features predicted out of
        the codes, 'images': number of test images}.
    """
    rows = {}
    for name, batches in (("train", train), ("test", test)):
        parts = [_pooled_batch(config.vision, variables, batch, levels) for batch in batches]
        rows[name] = [np.concatenate(column) for column in zip(*parts)]
    z, q, y = rows["train"]
    test_z, test_q, test_y = rows["test"]
    return {
        "continuous": probe_accuracy(z, y, test_z, test_y),
        "quantised": probe_accuracy(q, y, test_q, test_y),
        "images": float(len(test_y)),
    }


def _pooled_batch(config_vision, variables, batch, levels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    codes_BNL = tokenizer.tokenize(config_vision, variables, batch)
    z_BNZ = np.asarray(bridge.encode(config_vision, variables["params"]["vision_encoder"], batch))
    predicted_BNZ = np.asarray(tokenizer.features(config_vision, variables, codes_BNL, levels)[1])
    real_BI = batch["digit"] >= 0
    pooled = [pooled_features(f, batch["cell_segment"], real_BI.shape[1])[real_BI] for f in (z_BNZ, predicted_BNZ)]
    return pooled[0], pooled[1], batch["digit"][real_BI]
