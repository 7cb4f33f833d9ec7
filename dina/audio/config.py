"""Defaults of `config.audio`: the laptop-sized speech tokenizer, true in kind (tokenizers.md section 0 is the big one)."""

from __future__ import annotations

from ml_collections import ConfigDict


# Networks work on (mel - mean) / scale; measured on the synthetic words. Released weights: mean 0, scale 1.
NORMAL = {"mean": -6.0, "scale": 2.5}


def default_config() -> ConfigDict:
    """All of `config.audio`. Released values in brackets where they differ."""
    return ConfigDict(
        {
            # What the encoder reads. tail: 'pad' completes the last 80 ms with silence, 'drop' loses it [drop].
            "features": {
                "rate": 16000,
                "n_fft": 400,
                "hop": 160,
                "mels": 80,  # [128]
                "max_frames": 128,  # one chunk: 1.28 s [3000]
                "resample": "soxr",  # 'soxr', or 'linear': no low-pass [linear]
                "tail": "pad",
            },
            # What the vocoder reads, and the flow-matching target.
            "target": {"rate": 24000, "n_fft": 1920, "hop": 480, "mels": 80, "low": 0.0, "high": 8000.0} | NORMAL,
            # What the mel decoder is trained on.
            "recon": {"rate": 16000, "n_fft": 1024, "hop": 256, "mels": 80, "low": 0.0, "high": 8000.0} | NORMAL,
            "encoder": {"width": 96, "layers": 2, "heads": 4, "ff": 288},  # [1280, 32, 20, 5120]
            "bridge": {"pool": 4},
            "quantizer": {
                "sizes": (384, 320, 256, 256, 256, 256, 256, 256),  # [8192, 4096, 2048, 1024 x 5]
                "decay": 0.97,
                "eps": 1e-5,
                "restart_fraction": 0.2,
                "restart_cap": 0.03,
                "commitment": "cumulative",
                "dropout": 0.5,
                "residual": "float32",  # or 'activation': rounded to the activations' type per level [activation]
            },
            "decoder": {
                "width": 96,  # [1280]
                "layers": 2,  # [8]
                "heads": 4,  # [20]
                "ff": 288,  # [5120]
                "statistics": "masked",  # of group norms: 'masked', or 'padded': depend on the batch [padded]
                "post_channels": (64, 64, 64),  # [256 x 5]; the last entry is not used
            },
            "flow": {
                "prenet": {"width": 96, "layers": 2, "heads": 4, "ff": 288, "ratio": 1.0},  # [512, 12, 8, 2048]
                "estimator": {
                    "channels": 64,  # [256]
                    "middle": 2,  # [12]
                    "blocks": 1,  # [4]
                    "heads": 4,  # [8]
                    "head_dim": 16,  # [64]
                    "chunk": 100,
                },
                "prediction": "clean",  # or 'velocity' [velocity]
                "sigma_min": 1e-6,
                "drop_condition": 0.2,
                "steps": 10,
                "guidance": 0.0,  # [0.7]
                "grid": "float32",  # of the solver's times, or 'bfloat16' [bfloat16]
            },
            "vocoder": {"name": "griffin_lim", "iterations": 32, "momentum": 0.99, "seed": 0},
            # Training only; decibels and seconds.
            "augment": {
                "speed_share": 0.8,
                "speed": (0.85, 1.2),
                "gain_db": (-8.0, 0.0),
                "noise_share": 0.3,
                "snr_db": (5.0, 30.0),
                "noise_slope": (0.0, 2.0),  # power falls as f^-slope
                "reverb_share": 0.2,
                "reverb_seconds": (0.1, 0.4),
                "reverb_wet": (0.1, 0.5),
            },
            "reader": {"width": 96},
        }
    )


def hift_vocoder() -> ConfigDict:
    """`config.audio.vocoder` of the trained vocoder, in the place of Griffin-Lim's. Released values in brackets where they differ."""
    return ConfigDict(
        {
            "name": "hift",
            "channels": 64,  # [512]
            "f0_channels": 64,  # [512]
            "harmonics": 8,
            "rates": (8, 5, 3),  # times hop: samples of a mel frame
            "up_kernels": (16, 11, 7),
            "source_kernels": (7, 7, 11),
            "kernels": (3, 7, 11),
            "dilations": (1, 3, 5),
            "n_fft": 16,
            "hop": 4,
            "seed": 0,  # of random phases and noise
        }
    )
