"""Parts of a trained model: from the last finished stage that has them, else from an import, which is said."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from dina import checkpoint, stages
from dina.config import InputError
from dina.convert import settings


def test_parts_come_from_stages_or_else_are_said_to_come_from_an_import(tmp_path, capsys, monkeypatch):
    config = ConfigDict({"order": ("V0", "V1"), "stages": {"V0": {}, "V1": {}}, "imports": {"released": "i"}})
    monkeypatch.setattr(stages, "stage_identity", lambda config, name: name)
    held = {"params": {"encoder": {"w": np.ones(2)}, "decoder": {"w": np.ones(2)}}, "stats": {"decoder": {"b": np.ones(2)}}}
    monkeypatch.setattr(settings, "load", lambda config, folder, parts: {
        kind: {part: held[kind][part] for part in parts if part in held[kind]} for kind in held})
    checkpoint.finish(tmp_path / "V0", {"params": {"encoder": {"w": np.zeros(2)}}, "stats": {}}, {"identity": "V0"})
    params, _ = stages.load_parts(config, tmp_path, ["encoder"])
    assert not params["encoder"]["w"].any() and capsys.readouterr().out == ""
    params, stats = stages.load_parts(config, tmp_path, ["encoder", "decoder"])
    assert not params["encoder"]["w"].any() and params["decoder"]["w"].all() and set(stats) == {"decoder"}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("dina: decoder: ") and str(tmp_path / "released") in said[0]
    with pytest.raises(InputError, match="no trained vocoder"):
        stages.load_parts(config, tmp_path, ["encoder", "vocoder"])
