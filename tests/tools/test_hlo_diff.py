"""Two compiled programs compared."""

import json

import pytest

from dina.config import InputError
from tools import hlo_diff

TEXT = """ENTRY %main (a: bf16[64,32]) -> f32[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %w = bf16[32,16]{1,0} constant({...})
  %y = f32[64,16]{1,0} convolution(%a, %w), dim_labels=bf_io->bf, metadata={op_name="jit(step)/jvp(Backbone)/layers/ffn_0/dot_general"}
  ROOT %g = f32[64,16]{1,0} KIND(%y), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def write(folder, kind="all-reduce", temp=1000):
    folder.mkdir()
    (folder / "program.txt").write_text(TEXT.replace("KIND", kind))
    (folder / "record.json").write_text(json.dumps({"temp": temp, "argument": 10, "generated_code": 5, "peak": 2000}))
    (folder / "plan.json").write_text(json.dumps({"mesh": {"data": 4}, "slice_size": 0}))
    return folder


def test_the_same_program_has_no_difference(tmp_path, capsys):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    assert hlo_diff.main([str(a), str(b)]) == 0
    assert capsys.readouterr().out == "no difference\n"


def test_another_collective_and_more_memory_are_listed(tmp_path, capsys):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", "reduce-scatter", 1500)
    assert hlo_diff.main([str(a), str(b)]) == 1
    lines = capsys.readouterr().out.splitlines()
    found = {line[:48].strip(): line[48:].split() for line in lines[:-1]}
    size = 64 * 16 * 4
    assert found["bytes all-reduce over data"][0] == f"{2 * size * 3 // 4:,}" and found["bytes reduce-scatter over data"][2] == f"{size * 3 // 4:,}"
    assert found["memory temp"][3:] == ["(1.500x)"] and not any(name.startswith("FLOPs") for name in found)
    assert lines[-1] == f"{len(found)} numbers differ"


@pytest.mark.parametrize("args,words", [
    (["a", "b"], "a has no program.txt.*--keep"),
    (["HEAD", ".", "--config=experiments/digits.py"], "go together"),
    (["no-such-revision", ".", "--config=x.py", "--topology=v5e:2x2"], "'no-such-revision' is no revision"),
])
def test_bad_input_is_named(args, words):
    with pytest.raises(InputError, match=words):
        hlo_diff.main(args)
