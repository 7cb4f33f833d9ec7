"""Experiment files: overrides, their errors, identity, exit codes."""

import pytest

from dina import config as configs

FILE = """
import ml_collections
def get_config(arg=''):
    c = ml_collections.ConfigDict({'seed': 1, 'data': {'rate': 2.5, 'sizes': (1, 2)}, 'mesh': {'data': 1}, 'name': arg})
    return c
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(FILE)
    return str(path)


def test_names_and_overrides(file):
    config = configs.load(f"{file}:smoke,data.rate=0.5,data.sizes=[3],seed=9")
    assert (config.name, config.data.rate, config.data.sizes, config.seed) == ("smoke", 0.5, (3,), 9)


@pytest.mark.parametrize("arg,words", [
    ("data.rats=1", "data.rats.*did you mean 'rate'"),
    ("nothing.at.all=1", "nothing"),
    ("seed=abc", "seed.*wrong type"),
])
def test_a_wrong_key_or_type_is_named(file, arg, words):
    with pytest.raises(configs.InputError, match=words):
        configs.load(f"{file}:{arg}")


def test_a_missing_file_is_named():
    with pytest.raises(configs.InputError, match="nowhere.py"):
        configs.load("nowhere.py")


def test_identity_ignores_where_it_runs_but_not_what(file):
    base = configs.identity(configs.load(file))
    assert configs.identity(configs.load(f"{file}:mesh.data=8")) == base
    assert configs.identity(configs.load(f"{file}:data.rate=1.0")) != base


@pytest.mark.parametrize("error,code", [(configs.InputError("x"), 2), (KeyboardInterrupt(), 75), (ValueError("y"), 1)])
def test_exit_codes(error, code, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as end:
        configs.run_main(main, [])
    assert end.value.code == code
    if code == 2:
        assert capsys.readouterr().err == "dina: x\n"
