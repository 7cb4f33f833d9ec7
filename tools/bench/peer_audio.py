"""The peers of the speech side, in PyTorch; see peer.py, which runs them. Knows nothing of dina."""

import math

import torch

F = torch.nn.functional


class Vocoder:
    """reference/tokenizers.md B.7 in plain PyTorch on folded weights: mel, phases and noise to samples."""

    def __init__(self, config, weights):
        self.c = config
        self.given = {name: weights.pop(name) for name in ("mel", "phase", "noise")}  # [B, M, T], [B, H, 1], [B, H, N]
        self.w = dict(weights)
        self.window = torch.hann_window(config["n_fft"], device=self.given["mel"].device)

    def _conv(self, name, x, stride=1, padding=0, dilation=1):
        return F.conv1d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], stride, padding, dilation)

    def _same(self, name, x, dilation=1):
        return self._conv(name, x, padding=dilation * (self.w[f"{name}.weight"].shape[2] - 1) // 2, dilation=dilation)

    def _snake(self, name, x):
        alpha = self.w[f"{name}.alpha"][:, None]
        return x + torch.sin(alpha * x) ** 2 / (alpha + 1e-9)

    def _block(self, name, x):
        for j, dilation in enumerate(self.c["dilations"]):
            h = self._same(f"{name}.convs1.{j}", self._snake(f"{name}.activations1.{j}", x), dilation)
            x = x + self._same(f"{name}.convs2.{j}", self._snake(f"{name}.activations2.{j}", h))
        return x

    def _source(self, mel):
        x = mel
        for i in range(5):
            x = F.elu(self._same(f"f0_predictor.condnet.{2 * i}", x))
        name = "f0_predictor.classifier"
        f0 = F.linear(x.transpose(1, 2), self.w[f"{name}.weight"], self.w[f"{name}.bias"])[..., 0].abs()
        f0 = f0.repeat_interleave(self.c["hop"] * math.prod(self.c["rates"]), dim=1)[:, None]
        order = torch.arange(1, self.c["harmonics"] + 2, device=f0.device)[:, None]
        turns = torch.cumsum(f0 * order / self.c["rate"], dim=-1) % 1
        sines = 0.1 * torch.sin(2 * math.pi * turns + self.given["phase"])
        voiced = (f0 > 10).float()
        mixed = sines * voiced + (0.003 * voiced + 0.1 / 3 * (1 - voiced)) * self.given["noise"]
        name = "m_source.l_linear"
        return torch.tanh(F.linear(mixed.transpose(1, 2), self.w[f"{name}.weight"], self.w[f"{name}.bias"])[..., 0])

    def run(self, weights):
        c, mel = self.c, self.given["mel"]
        short = torch.stft(self._source(mel), c["n_fft"], c["hop"], window=self.window, return_complex=True)
        short = torch.cat([short.real, short.imag], dim=1)
        x = self._same("conv_pre", mel)
        blocks = len(c["kernels"])
        for i, rate in enumerate(c["rates"]):
            name = f"ups.{i}"
            trim = (self.w[f"{name}.weight"].shape[2] - rate) // 2
            x = F.conv_transpose1d(F.leaky_relu(x, 0.1), self.w[f"{name}.weight"], self.w[f"{name}.bias"], rate, trim)
            if i == len(c["rates"]) - 1:
                x = F.pad(x, (1, 0), mode="reflect")
            stride = math.prod(c["rates"][i + 1 :])
            down = self._conv(f"source_downs.{i}", short, stride, stride // 2 if stride > 1 else 0)
            x = x + self._block(f"source_resblocks.{i}", down)
            x = sum(self._block(f"resblocks.{i * blocks + j}", x) for j in range(blocks)) / blocks
        level, angle = self._same("conv_post", F.leaky_relu(x, 0.01)).chunk(2, dim=1)
        spectrum = torch.polar(torch.exp(level).clamp(max=100), torch.sin(angle))
        return torch.istft(spectrum, c["n_fft"], c["hop"], window=self.window).clamp(-0.99, 0.99)


WORKLOADS = {"vocoder": Vocoder}
