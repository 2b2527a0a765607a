"""The commands and scripts of docs/search.md."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, SMALL_FLAGS, read_metrics, run

import arguments

TEXT = (ROOT / "docs/search.md").read_text(encoding="utf-8")
FOLDS, SEARCH = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)


def test_commands_parse(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "datasets")
    import split

    parsers = {"train.py": arguments.build_parser, "datasets/split.py": split.build_parser}
    commands = re.findall(r"^ +python (\S+) (.*)", TEXT.replace("\\\n", " "), flags=re.M)
    assert {script for script, _ in commands} == set(parsers)
    for script, flags in commands:
        parsers[script]().parse_args(shlex.split(flags))
    (flags,) = re.findall(r'FLAGS = "(.*)"', SEARCH)
    arguments.parse_arguments(flags.split())


def test_mean_and_spread_over_folds(tmp_path, monkeypatch, capsys):
    for fold, values in enumerate(((0.1, 0.3, 0.2), (0.2, 0.5))):
        folder = tmp_path / f"output/folds/fold{fold}"
        folder.mkdir(parents=True)
        lines = [{"kind": "start"}, *({"kind": "eval", "AP": AP} for AP in values)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(tmp_path)
    exec(FOLDS, {})
    assert capsys.readouterr().out == "AP 0.400, standard deviation 0.141, [0.3, 0.5]\n"


FAKE_TRAINING = """
import json, sys, time
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--output-dir") + 1])
number = int(folder.name.removeprefix("trial"))
folder.mkdir()
if number > 5:
    sys.exit(number - 5)
with (folder / "metrics.jsonl").open("w") as file:
    file.write(json.dumps({"kind": "eval", "AP": 0.1 if number == 5 else 0.5}) + "\\n")
if number == 5:
    time.sleep(100)
"""


def test_search_ends_bad_trials(tmp_path, monkeypatch):
    """The first five trials are good, the next one is bad, the next ones fail."""
    optuna = pytest.importorskip("optuna")
    (tmp_path / "train.py").write_text(FAKE_TRAINING)
    monkeypatch.chdir(tmp_path)
    variables = {}
    with pytest.raises(subprocess.CalledProcessError, match="exit status 2"):
        exec(SEARCH.replace("sleep(5)", "sleep(0.1)"), variables)
    study = variables["study"]
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE"] * 5 + ["PRUNED"] * 2 + ["FAIL"]
    assert study.trials[5].intermediate_values == {0: 0.1}
    assert study.best_value == 0.5
    assert len({trial.params["lr"] for trial in study.trials}) == 8
    storage = f"sqlite:///{tmp_path}/output/search/study.db"
    assert len(optuna.load_study(study_name="lr", storage=storage).trials) == 8


@pytest.mark.slow
def test_search_trains(tiny, tmp_path):
    pytest.importorskip("optuna")
    flags = [*SMALL_FLAGS, "--data-path", str(tiny), "--max-steps", "1"]
    code = SEARCH.replace("train.py", str(ROOT / "train.py")).replace("n_trials=20", "n_trials=2")
    (tmp_path / "search.py").write_text(re.sub("FLAGS = .*", f"FLAGS = {flags}", code))
    done = run(sys.executable, "search.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("{'lr': ")
    for number in range(2):
        (start,) = read_metrics(tmp_path / f"output/search/trial{number}", "start")
        assert 1e-4 < start["args"]["lr"] < 0.1
