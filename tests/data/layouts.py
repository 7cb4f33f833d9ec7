"""The same captioned images in every layout that dina/data/collected.py reads."""

import io
import json
import tarfile

import ml_collections
import numpy as np
import PIL.Image

from dina.data import folders, sources, webdataset

LAYOUTS = ["folder-txt", "folder-jsonl", "webdataset-txt", "webdataset-json"]
ALL = {"valid": 0.0, "test": 0.0}  # in train
NAMES = [f"{i:05d}" for i in range(60)]


def pixels(i):
    return np.random.default_rng(i).integers(0, 256, (30 + i % 5, 40, 3), np.uint8)


def png(i):
    out = io.BytesIO()
    PIL.Image.fromarray(pixels(i)).save(out, "PNG")
    return out.getvalue()


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def members(i, name=None):
    name = name or NAMES[i]
    note = json.dumps({"caption": f"json {i}", "url": "x"}).encode()
    return [(f"{name}.png", png(i)), (f"{name}.txt", f" text {i}\n".encode()), (f"{name}.json", note)]


def make(root, layout, numbers=range(60), folder=""):
    """The same images in a layout; returns the config to read them."""
    name, captions = layout.split("-")
    if name == "webdataset":
        for shard in range(3):
            tar(root / folder / f"{shard:05d}.tar", [m for i in numbers if i % 3 == shard for m in members(i)])
        config = webdataset.default_config()
    else:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in numbers:
            (root / folder / f"{NAMES[i]}.png").write_bytes(png(i))
            (root / folder / f"{NAMES[i]}.txt").write_text(f"text {i}")
        lines = [json.dumps({"file_name": f"{NAMES[i]}.png", "text": f"json {i}"}) for i in numbers]
        (root / folder / "metadata.jsonl").write_text("\n".join(lines))
        config = folders.default_config()
    config.update({"path": str(root), "captions": captions, "shares": {"valid": 0.2, "test": 0.3}, "native_pixels": 28 * 28})
    return ml_collections.ConfigDict({"data": config})


def quarantine(config, data_dir):
    lines = (sources.cache_path(config, data_dir) / "quarantine.jsonl").read_text().splitlines()
    return {(line["source"], line["reason"]) for line in map(json.loads, lines)}


def read(config, data_dir, splits=("train", "valid", "test")):
    return {split: sources.load_all(config, "images", split, data_dir) for split in splits}
