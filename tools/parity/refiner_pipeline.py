"""The release's whole refiner pipeline (case 07c): reference latents, every step's passes, and the image."""

from __future__ import annotations

import re

import jax
import numpy as np

from dina.convert import visual
from dina.vision import refine, refiner
from dina.vision.kl import KLAutoencoder
from tools.parity import load
from tools.parity.case import Case
from tools.parity.refiner import channels_first, channels_last, module

PROJECTION = "image_refiner.cond_proj"


def is_case(case: Case) -> bool:
    """Whether the arrays are those of this component."""
    return "posterior_noise" in case


def autoencoder(case: Case, c) -> KLAutoencoder:
    """The latent space of a case's config `c`."""
    return KLAutoencoder(
        channels=tuple(c["block_out_channels"]), layers=c["layers_per_block"], latent=c["latent_channels"], groups=c["norm_num_groups"],
        scale=c.get("scaling_factor") or 1.0, shift=c.get("shift_factor") or 0.0,
        point_convs="both" if "image_refiner.vae.quant_conv.weight" in case.weight_names else "none",
    )  # fmt: skip


class Pipeline:
    """Our modules with the weights and inputs of a case."""

    def __init__(self, case: Case):
        c, cond = case.config, case.input("quant_tokens")
        self.auto, self.cond = autoencoder(case, c["vae"]), cond
        projected = f"{PROJECTION}.weight" in case.weight_names
        if f"{PROJECTION}._dummy" in case.weight_names:
            case.drop_weight(f"{PROJECTION}._dummy", "stands in for a projection that does nothing")
        self.flow = module(case, c["tr"], c["tr"]["text_feat_dim"] if projected else 0)
        tables = ((visual.refiner(self.flow), *visual.refiner_sizes(self.flow, cond.shape[-1])),
                  (visual.autoencoder(self.auto), *visual.autoencoder_sizes(self.auto)))
        self.params = load.variables(case, *tables)["params"]["refiner"]
        self.posterior, self.noise = (channels_last(case.input(name)) for name in ("posterior_noise", "init_noise"))
        image = case.input("ref_image")
        self.image = channels_last(image if image.ndim == 4 else image[None])
        self.guidance = refiner.Guidance(c.get("text_guidance_scale", 1.5), c.get("image_guidance_scale", 1.5))
        self.patch = c["tr"]["patch_size"]

    def reference(self):
        """Latents [B, h, w, L] of the reference image."""
        encode = jax.jit(lambda params, image: self.auto.encode(params, refine.canvas(image, self.patch * self.auto.factor), self.posterior))
        return encode(self.params["autoencoder"], self.image)

    def steps(self, z_BHWL, times):
        """(x, velocities of the passes) of each step, as latents."""
        b, h, w, _ = z_BHWL.shape
        pack, layout = refine.cell_pack(b, self.cond.shape[1]), refine.token_layout(b, h, w, self.patch)
        passes = jax.jit(lambda params, x, t: refiner.velocities(
            self.guidance, self.flow, params, x, t, self.cond, refine.to_tokens(z_BHWL, self.patch), pack, layout))  # fmt: skip
        image = lambda x_BTC: channels_first(refine.from_tokens(x_BTC, h, w, self.patch))
        x_BTC = refine.to_tokens(self.noise, self.patch)
        for now, then in zip(times, times[1:]):
            velocities = passes(self.params["dit"], x_BTC, now)
            yield image(x_BTC), [image(v_BTC) for v_BTC in velocities]
            x_BTC = x_BTC + (then - now) * self.guidance.combine(velocities)

    def whole(self, steps: int):
        """Pixels [B, H, W, 3] in [0, 1] in one go."""
        run = lambda params, cond, image: refine.refine(
            self.auto, self.flow, params, cond, image, self.noise, self.posterior, steps, self.guidance)
        return jax.jit(run)(self.params, self.cond, self.image)


def run(case: Case) -> None:
    """Compares all arrays of the case."""
    pipeline, steps = Pipeline(case), case.config["steps"]
    for name in case.arrays:
        if match := re.fullmatch(r"pipeline_timesteps(?:_(\d+)_dyn_true)?", name):
            case.compare(name, refiner.times(int(match[1] or steps)))
    times = refiner.times(steps)
    case.compare("step_t", np.repeat(times[:-1], len(pipeline.guidance.passes))[:, None])
    z_BHWL = pipeline.reference()
    case.compare("ref_latents", channels_first(z_BHWL))
    seen = list(pipeline.steps(z_BHWL, times))
    case.compare("step_x", np.stack([x for x, _ in seen]))
    case.compare("velocities", np.stack([v for _, velocities in seen for v in velocities]))
    case.compare("images_pt", channels_first(pipeline.whole(steps)))
