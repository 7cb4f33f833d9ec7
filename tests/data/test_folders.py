"""Image folders lose what is damaged, and name it."""

import PIL.Image

from dina.data import sources
from tests.data import layouts


def test_damaged_folders_lose_what_is_damaged_and_name_it(tmp_path):
    root = tmp_path / "set"
    config = layouts.make(root, "folder-jsonl", range(10))
    (root / "torn.png").write_bytes(layouts.png(11)[:900])
    (root / "mute.png").write_bytes(layouts.png(12))
    PIL.Image.new("RGB", (300, 30), "red").save(root / "strip.png")
    PIL.Image.new("RGB", (30, 20), "red").save(root / "small.png")
    more = ["", "no json", '{"text": "no name"}', '{"file_name": "gone.png", "text": "gone"}',
            '{"file_name": "torn.png", "text": "torn"}', '{"file_name": "00001.png", "text": "again"}',
            '{"file_name": "/etc/x.png", "text": "outside"}',
            '{"file_name": "strip.png", "text": "s"}', '{"file_name": "small.png", "text": "s"}']
    with (root / "metadata.jsonl").open("a") as file:
        file.write("\n".join(["", *more]))
    config.data.update({"max_corrupt": 0.5, "shares": layouts.ALL})
    sources.prepare(config, tmp_path)
    assert sorted(layouts.read(config, tmp_path, ["train"])["train"]["caption"]) == [f"json {i}" for i in range(10)]
    assert layouts.quarantine(config, tmp_path) == {
        ("metadata.jsonl line 12", "corrupt"), ("metadata.jsonl line 13", "corrupt"), ("gone.png", "no image"),
        ("metadata.jsonl line 16", "duplicate key"), ("metadata.jsonl line 17", "corrupt"), ("torn.png", "corrupt"),
        ("mute.png", "no caption"), ("strip.png", "aspect ratio"), ("small.png", "too small")}
