"""Puts golden torch tensors of the audio cases into our parameter trees (layout rules: reference tokenizers.md H)."""


def dense(weights, name):
    """Linear: kernel transposed, bias where there is one."""
    tree = {"kernel": weights[f"{name}.weight"].T}
    return tree | ({"bias": weights[f"{name}.bias"]} if f"{name}.bias" in weights else {})


def conv(weights, name):
    """Conv1d [O, I, K] -> [K, I, O]."""
    return {"kernel": weights[f"{name}.weight"].transpose(2, 1, 0), "bias": weights[f"{name}.bias"]}


def pointwise(weights, name):
    """Conv1d with kernel 1 as a matrix product."""
    return {"kernel": weights[f"{name}.weight"][..., 0].T, "bias": weights[f"{name}.bias"]}


def joined(weights, name):
    """Conv1d k = stride [O, I, K] on K joined frames."""
    kernel = weights[f"{name}.weight"].transpose(2, 1, 0)
    return {"kernel": kernel.reshape(-1, kernel.shape[-1])}


def norm(weights, name):
    """Layer, group (scale, bias) or RMS (scale) norm."""
    tree = {"scale": weights[f"{name}.weight"]}
    return tree | ({"bias": weights[f"{name}.bias"]} if f"{name}.bias" in weights else {})


def layer(weights, name):
    """One transformer layer of encoder, decoder or prenet."""
    projections = {ours: dense(weights, f"{name}.self_attn.{ours}_proj") for ours in ("q", "k", "v", "out")}
    return projections | {
        "attention_norm": norm(weights, f"{name}.self_attn_layer_norm"),
        "ff_norm": norm(weights, f"{name}.final_layer_norm"),
        "fc1": dense(weights, f"{name}.fc1"),
        "fc2": dense(weights, f"{name}.fc2"),
    }


def encoder(weights, prefix, layers):
    """`WhisperEncoder`."""
    tree = {name: conv(weights, f"{prefix}.{name}") for name in ("conv1", "conv2")}
    tree |= {f"layer{i}": layer(weights, f"{prefix}.layers.{i}") for i in range(layers)}
    return tree | {"norm": norm(weights, f"{prefix}.layer_norm")}


def bridge(weights, prefix):
    """`Bridge`."""
    tree = {name: joined(weights, f"{prefix}.{name}_proj") for name in ("gate", "up")}
    return tree | {"down": dense(weights, f"{prefix}.down_proj"), "norm": norm(weights, f"{prefix}.layer_norm")}


def upsample(weights, name):
    """Transposed convolution [I, O, K] -> [K, I, O], and its group norm."""
    kernel = weights[f"{name}.conv.weight"].transpose(2, 0, 1)
    return {"kernel": kernel, "bias": weights[f"{name}.conv.bias"], "norm": norm(weights, f"{name}.norm")}


def mel_decoder(weights, prefix, layers, convs):
    """`MelDecoder`."""
    frames = {"dconv1": upsample(weights, f"{prefix}.dconv1"), "norm": norm(weights, f"{prefix}.layer_norm")}
    frames |= {f"layer{i}": layer(weights, f"{prefix}.layers.{i}") for i in range(layers)}
    post = {f"conv{i}": conv(weights, f"{prefix}.post_net.layers.{3 * i}") for i in range(convs)}
    post |= {f"norm{i}": norm(weights, f"{prefix}.post_net.layers.{3 * i + 1}") for i in range(convs)}
    post |= {"out": pointwise(weights, f"{prefix}.post_net.layers.{3 * convs}")}
    return {"frames": frames, "head": {"dconv2": upsample(weights, f"{prefix}.dconv2"), "post_net": post}}


def prenet(weights, prefix, layers):
    """`Prenet`."""
    tree = {"in1": dense(weights, f"{prefix}.in_mlp.0"), "in2": dense(weights, f"{prefix}.in_mlp.2")}
    tree |= {f"layer{i}": layer(weights, f"{prefix}.transformer_layers.{i}") for i in range(layers)}
    return tree | {"norm": norm(weights, f"{prefix}.final_norm"), "out": dense(weights, f"{prefix}.out_proj")}


def causal_block(weights, name):
    """Convolution and LayerNorm of a causal block."""
    return {"conv": conv(weights, f"{name}.block.0"), "norm": norm(weights, f"{name}.block.2")}


def _res(weights, name):
    blocks = {f"block{i}": causal_block(weights, f"{name}.block{i}") for i in (1, 2)}
    return blocks | {"time": dense(weights, f"{name}.mlp.1"), "shortcut": pointwise(weights, f"{name}.res_conv")}


def _attention(weights, name):
    tree = {ours: dense(weights, f"{name}.attn1.to_{ours}") for ours in ("q", "k", "v")}
    tree |= {"out": dense(weights, f"{name}.attn1.to_out.0"), "norm1": norm(weights, f"{name}.norm1")}
    tree |= {"norm2": norm(weights, f"{name}.norm3"), "fc1": dense(weights, f"{name}.ff.net.0.proj")}
    return tree | {"fc2": dense(weights, f"{name}.ff.net.2")}


def estimator(weights, prefix, middle, blocks):
    """`Estimator`."""
    names = {"down": "down_blocks.0", "up": "up_blocks.0"} | {f"middle{i}": f"mid_blocks.{i}" for i in range(middle)}
    tree = {}
    for ours, theirs in names.items():
        tree[f"{ours}_res"] = _res(weights, f"{prefix}.{theirs}.0")
        for i in range(blocks):
            tree[f"{ours}_attention{i}"] = _attention(weights, f"{prefix}.{theirs}.1.{i}")
    tree |= {f"{ours}_conv": conv(weights, f"{prefix}.{ours}_blocks.0.2") for ours in ("down", "up")}
    tree |= {f"time{i}": dense(weights, f"{prefix}.time_mlp.linear_{i}") for i in (1, 2)}
    tree["final_block"] = causal_block(weights, f"{prefix}.final_block")
    return tree | {"final": pointwise(weights, f"{prefix}.final_proj")}
