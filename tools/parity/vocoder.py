"""A mel to samples (case 08e): pitch, source, short spectrum, the filter's steps and the waveform, with the case's own noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dina.audio import hift, hift_source
from dina.convert import hift as released
from tools.parity.case import Case


def is_case(case: Case) -> bool:
    """Whether the arrays are those of this component."""
    return "phase_vec_sampled" in case and "sine_noise" in case


def run(case: Case) -> None:
    """Compares all arrays of the case."""
    read = released.folding(case.weight, case.weight_names)
    found = released.settings(read, case.weight_names)
    module = hift.make_hift(released.audio_config(found))
    params = jax.tree.map(jnp.asarray, released.parameters(read, case.weight_names, found))
    mel_BTM = case.input("mel").swapaxes(1, 2)
    frames_B = np.full(len(mel_BTM), mel_BTM.shape[1], np.int32)
    drawn = case.input("phase_vec_sampled")[..., 0], case.input("sine_noise").swapaxes(1, 2)
    apply = lambda params, *inputs: module.apply({"params": params}, *inputs, capture_intermediates=True)
    (wave_BN, f0_BT), state = jax.jit(apply)(params, mel_BTM, frames_B, *drawn)
    seen = state["intermediates"]
    step = lambda name: np.swapaxes(seen["filter"][name]["__call__"][0], 1, 2)
    source_BN = seen["source"]["__call__"][0]
    case.compare("f0", f0_BT)
    case.compare_ids("uv", np.repeat(np.asarray(f0_BT) > hift_source.VOICED_HZ, module.source.hop, axis=1))
    case.compare("source", source_BN[:, None])
    short_BFS = np.swapaxes(hift_source.spectrum(source_BN, frames_B * module.source.hop, module.filter.n_fft, module.filter.hop), 1, 2)
    case.compare("stft_real", short_BFS[:, : short_BFS.shape[1] // 2])
    case.compare("stft_imag", short_BFS[:, short_BFS.shape[1] // 2 :])
    for golden, name in [("conv_pre", "pre"), ("conv_post", "post"), *((f"up{i}", f"up{i}") for i in range(len(module.filter.rates)))]:
        case.compare(golden, step(name))
    case.compare("waveform", wave_BN)
    silent = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs, method="filtered"))
    case.compare("waveform_from_zero_source", silent(params, mel_BTM, jnp.zeros_like(source_BN), frames_B))
