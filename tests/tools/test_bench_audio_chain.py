"""The benchmarks of the speech chain: the peer's formulas give our codes and mels, and its arithmetic is counted by hand."""

import json
import pathlib
import subprocess

import numpy as np
import pytest
import safetensors.numpy

from dina.config import InputError
from tools.bench import audio_chain, harness

LAYERS = {"width": 16, "layers": 1, "heads": 2, "ff": 24}
SMALL = {
    "features": {"mels": 8}, "encoder": LAYERS, "quantizer": {"sizes": (12, 8, 8)}, "decoder": LAYERS | {"post_channels": (8, 6, 6)},
    "prenet": LAYERS, "estimator": {"channels": 8, "middle": 1, "blocks": 1, "heads": 2, "head_dim": 4, "chunk": 12},
}  # fmt: skip
MAKERS = {
    "AudioEncode": (lambda: audio_chain.encode(0.8, **SMALL), (10, 3)), "AudioDecode": (lambda: audio_chain.decode(5, **SMALL), (1, 23, 80)),
    "Flow": (lambda: audio_chain.flow(5, **SMALL, flow={"guidance": 0.7}), (1, 19, 80)),
}  # fmt: skip
SCRIPT = """
import json, sys, safetensors.torch, torch
sys.path.insert(0, sys.argv[1])
import peer_audio
with torch.inference_mode():
    for name, config, file in json.loads(sys.argv[2]):
        work = getattr(peer_audio, name)(config, safetensors.torch.load_file(file))
        safetensors.torch.save_file({"result": work.run({}).contiguous()}, file)
"""


def peer():
    try:
        return harness.peer_python()
    except InputError:
        return None


@pytest.fixture(scope="module")
def made():
    return {name: make() for name, (make, _) in MAKERS.items()}


@pytest.fixture(scope="module")
def answers(made, tmp_path_factory):
    """What the peer computes of every workload."""
    folder, asked = tmp_path_factory.mktemp("peer"), []
    for name, work in made.items():
        file = folder / f"{name}.safetensors"
        safetensors.numpy.save_file({key: np.ascontiguousarray(x) for key, x in work.tensors.items()}, file)
        asked.append((name, work.config, str(file)))
    bench = pathlib.Path(audio_chain.__file__).parent
    subprocess.run([peer(), "-c", SCRIPT, str(bench), json.dumps(asked)], check=True, timeout=300)
    return {name: safetensors.numpy.load_file(file)["result"] for name, _, file in asked}


@pytest.mark.skipif(peer() is None, reason="no peer: run `make peers`")
@pytest.mark.parametrize("name", MAKERS)
def test_the_peer_computes_the_same(made, answers, name):
    ours, theirs = np.asarray(made[name].ours()), answers[name]
    assert ours.shape == theirs.shape == MAKERS[name][1] and np.std(theirs.astype(float)) > 0.05
    made[name].check(ours, theirs)
    with pytest.raises(AssertionError):
        made[name].check(ours, theirs[:, ::-1])


def test_arithmetic_is_counted_by_hand(made):
    layer = 4 * 16 * 16 + 2 * 16 * 24
    encode = 80 * 3 * 8 * 16 + 40 * (3 * 16 * 16 + layer) + 2 * 40 * 40 * 16 + 10 * 3 * 64 * 64 + 10 * 28 * 64
    assert made["AudioEncode"].flops == 2 * encode
    decode = 5 * (64 * 16 + 3 * 16 * 16) + 19 * (layer + 3 * 16 * 80) + 19 * 19 * 16 + 23 * (5 * 80 * 8 + 5 * 8 * 6 + 6 * 80)
    assert made["AudioDecode"].flops == 2 * decode
    stage = lambda wide: 3 * wide * 8 + 3 * 8 * 8 + wide * 8 + 4 * 8 * 8 + 2 * 8 * 32
    frame = stage(160) + stage(8) + stage(16) + 3 * (3 * 8 * 8) + 8 * 80
    time = 160 * 32 + 32 * 32 + 3 * 32 * 8
    prenet = 19 * (16 * 64 + 64 * 16 + layer + 16 * 80) + 19 * 19 * 16
    assert made["Flow"].flops == 2 * prenet + 2 * 20 * (19 * frame + time) + 4 * 20 * 3 * 19 * 19 * 8
