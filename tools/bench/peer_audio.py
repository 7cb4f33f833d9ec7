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


class Speech:
    """What the parts of the speech chain share: layers of reference/tokenizers.md B by the names of their weights."""

    def __init__(self, config, weights):
        self.c, self.w = config, dict(weights)

    def _dense(self, name, x):
        return F.linear(x, self.w[f"{name}.kernel"], self.w.get(f"{name}.bias"))

    def _conv(self, name, x, **how):
        return F.conv1d(x, self.w[f"{name}.kernel"], self.w[f"{name}.bias"], **how)

    def _norm(self, name, x):
        if f"{name}.bias" in self.w:
            return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.scale"], self.w[f"{name}.bias"], 1e-5)
        return F.rms_norm(x, x.shape[-1:], self.w[f"{name}.scale"], 1e-6)

    def _attend(self, name, x, heads, **how):
        q, k, v = (self._dense(f"{name}.{part}", x).unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv")
        return self._dense(f"{name}.out", F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2).flatten(2))

    def _layer(self, name, x, heads, **how):
        x = x + self._attend(name, self._norm(f"{name}.attention_norm", x), heads, **how)
        h = F.gelu(self._dense(f"{name}.fc1", self._norm(f"{name}.ff_norm", x)))
        return x + self._dense(f"{name}.fc2", h)

    def _positions(self, length, width):
        frequency = torch.exp(-math.log(1e4) / (width // 2 - 1) * torch.arange(width // 2, dtype=torch.float64))
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], 1).float().to(next(iter(self.w.values())).device)


class AudioEncode(Speech):
    """B.1 to B.3: wave [B, N] to codes [U, L]."""

    def __init__(self, config, weights):
        super().__init__(config, weights)
        self.window = torch.hann_window(config["n_fft"], device=self.w["wave"].device)
        width = self.w["encoder.conv1.bias"].shape[0]
        self.positions = self._positions(self.w["wave"].shape[1] // config["hop"] // 2, width)
        for name in ("gate", "up"):  # joined frames, the earlier first, as a convolution of stride four
            kernel = self.w[f"bridge.{name}.kernel"]
            self.w[f"bridge.{name}.kernel"] = kernel.view(len(kernel), -1, width).transpose(1, 2).contiguous()

    def run(self, weights):
        spectrum = torch.stft(self.w["wave"], self.c["n_fft"], self.c["hop"], window=self.window, return_complex=True)[..., :-1]
        level = (self.w["filters"].T @ spectrum.abs() ** 2).clamp(min=1e-10).log10()
        level = (torch.maximum(level, level.amax((1, 2), keepdim=True) - 8) + 4) / 4
        x = F.gelu(self._conv("encoder.conv1", level, padding=1))
        x = F.gelu(self._conv("encoder.conv2", x, stride=2, padding=1)).transpose(1, 2) + self.positions
        for i in range(self.c["layers"]):
            x = self._layer(f"encoder.layer{i}", x, self.c["heads"])
        x = self._norm("encoder.norm", x)
        gate, up = (F.conv1d(x.transpose(1, 2), self.w[f"bridge.{name}.kernel"], stride=4).transpose(1, 2) for name in ("gate", "up"))
        joined = x.reshape(x.shape[0], -1, gate.shape[-1])
        x = self._norm("bridge.norm", self._dense("bridge.down", F.silu(gate) * up) + joined)[0]
        codes = []
        for i in range(self.c["levels"]):
            book = self.w[f"book.{i}"]
            squared = x.pow(2).sum(1, keepdim=True) + book.pow(2).sum(1) - 2 * (x @ book.t())
            codes.append((-squared.clamp(min=0).sqrt()).argmax(1))
            x = x - book[codes[-1]]
        return torch.stack(codes, 1).int()


class AudioDecode(Speech):
    """B.3, B.5: codes [B, U, L] to the refined mel [B, T, M]."""

    def _up(self, name, x, stride):
        x = F.conv_transpose1d(x, self.w[f"{name}.kernel"], self.w[f"{name}.bias"], stride)
        x = F.group_norm(x, 1, self.w[f"{name}.norm.scale"], self.w[f"{name}.norm.bias"], 1e-5)
        return x[..., : x.shape[-1] - max(0, self.w[f"{name}.kernel"].shape[-1] - stride)]

    def run(self, weights):
        codes = self.w["codes"]
        x = sum(F.embedding(codes[..., i], self.w[f"book.{i}"]) for i in reversed(range(self.c["levels"])))
        x = self._up("frames.dconv1", self._dense("proj_decoder", x).transpose(1, 2), self.c["stride"]).transpose(1, 2)
        x = x + self._positions(x.shape[1], x.shape[2])
        for i in range(self.c["layers"]):
            x = self._layer(f"frames.layer{i}", x, self.c["heads"], is_causal=True)
        x = self._up("head.dconv2", self._norm("frames.norm", x).transpose(1, 2), self.c["half"])
        coarse = F.interpolate(x, size=self.c["frames"], mode="nearest")
        x = coarse
        for i in range(self.c["post"]):
            x = self._conv(f"head.post_net.conv{i}", x, padding=2)
            x = F.mish(F.group_norm(x, 1, self.w[f"head.post_net.norm{i}.scale"], self.w[f"head.post_net.norm{i}.bias"], 1e-5))
        return coarse.transpose(1, 2) + self._dense("head.post_net.out", x.transpose(1, 2))


class Flow(Speech):
    """B.6: hidden frames [B, T, D] and noise to the mel [B, T, M], convolutions over [B, C, T]."""

    def _block(self, name, x):
        h = self._conv(f"{name}.conv", F.pad(x, (2, 0)))
        return F.mish(self._norm(f"{name}.norm", h.transpose(1, 2)).transpose(1, 2))

    def _stage(self, name, x, time, mask):
        name = f"estimator.{name}"
        h = self._block(f"{name}_res.block1", x) + self._dense(f"{name}_res.time", F.mish(time))[..., None]
        x = self._block(f"{name}_res.block2", h) + F.conv1d(x, self.w[f"{name}_res.shortcut.kernel"][..., None], self.w[f"{name}_res.shortcut.bias"])
        x = x.transpose(1, 2)
        for i in range(self.c["blocks"]):
            part = f"{name}_attention{i}"
            x = x + self._attend(part, self._norm(f"{part}.norm1", x), self.c["inner"], attn_mask=mask)
            x = x + self._dense(f"{part}.fc2", F.gelu(self._dense(f"{part}.fc1", self._norm(f"{part}.norm2", x))))
        return x.transpose(1, 2)

    def _velocity(self, x, mu, t, mask):
        bands = 2 * mu.shape[1]
        frequency = torch.exp(-math.log(1e4) / (bands // 2 - 1) * torch.arange(bands // 2, device=x.device))
        angle = self.c["scale"] * t * frequency[None]
        time = F.silu(self._dense("estimator.time1", torch.cat([angle.sin(), angle.cos()], 1)))
        time = self._dense("estimator.time2", time).expand(len(x), -1)
        skip = self._stage("down0", torch.cat([x, mu], 1), time, mask)
        x = self._conv("estimator.down0_conv", F.pad(skip, (2, 0)))
        for i in range(self.c["middle"]):
            x = self._stage(f"middle{i}", x, time, mask)
        x = self._stage("up0", torch.cat([x, skip], 1), time, mask)
        x = self._block("estimator.final_block", self._conv("estimator.up0_conv", F.pad(x, (2, 0))))
        return self._dense("estimator.final", x.transpose(1, 2)).transpose(1, 2)

    def run(self, weights):
        x = self._dense("prenet.in2", F.silu(self._dense("prenet.in1", self.w["frames"])))
        for i in range(self.c["layers"]):
            x = self._layer(f"prenet.layer{i}", x, self.c["heads"], is_causal=True)
        mu = self._dense("prenet.out", self._norm("prenet.norm", x)).transpose(1, 2)
        both, x, g = torch.cat([mu, torch.zeros_like(mu)]), self.w["noise"].transpose(1, 2), self.c["guidance"]
        at = torch.arange(mu.shape[-1], device=mu.device)
        seen = at < (at[:, None] // self.c["chunk"] + 1) * self.c["chunk"]
        mask = torch.zeros(seen.shape, device=mu.device).masked_fill(~seen, torch.finfo(torch.float32).min)
        for t, following in zip(self.w["grid"][:-1], self.w["grid"][1:]):
            v, plain = self._velocity(torch.cat([x, x]), both, t, mask).chunk(2)
            x = x + (following - t) * ((1 + g) * v - g * plain)
        return x.transpose(1, 2)


WORKLOADS = {"vocoder": Vocoder, "audio_encode": AudioEncode, "audio_decode": AudioDecode, "flow": Flow}
