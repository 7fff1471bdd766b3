"What a command says where the packages of an extra are not installed. It says it before it does anything."

import importlib.util, json

import pytest


@pytest.fixture
def without(monkeypatch):
    "A function that takes packages away."
    real = importlib.util.find_spec

    def take(*packages):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name in packages else real(name, *a)
        )

    return take


@pytest.mark.parametrize("package", ["papermill", "nbformat", "ipykernel"])
def test_nli_run_names_the_extra_and_the_command_that_works_without_it(without, capsys, tmp_path, package):
    from nli_ft.launch import run_cli

    without(package)
    with pytest.raises(SystemExit) as e:
        run_cli(["--config", "minimal_test", "--runs_dir", str(tmp_path)])
    said = capsys.readouterr().err
    assert (
        e.value.code == 2
        and f'package {package}: `pip install -e ".[notebook]"`' in said
        and "nli_train" in said
    )
    assert not list(tmp_path.iterdir())


def test_a_teacher_without_its_client_is_refused_before_a_file_is_made(without, capsys, tmp_path):
    from nli_ft.teacher import think_cli

    pair = dict(id="1", premise="A dog runs.", hypothesis="An animal runs.", label=1)
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    paths = ["--input", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "thoughts.jsonl")]
    without("openai")
    with pytest.raises(SystemExit) as e:
        think_cli([*paths, "--model", "m", "--base_url", "http://localhost:1/v1"])
    assert e.value.code == 2 and 'pip install -e ".[teacher]"' in capsys.readouterr().err
    assert not (tmp_path / "thoughts.jsonl").exists()


def test_wandb_is_asked_for_in_the_preflight_and_only_if_the_config_wants_it(without):
    from nli_ft.config_loader import load_config
    from nli_ft.ready import _missing_trackers

    without("wandb")
    assert _missing_trackers(load_config("minimal_test")) == []
    [said] = _missing_trackers(load_config("minimal_test", "use_wandb=true"))
    assert 'pip install -e ".[wandb]"' in said and "use_wandb to false" in said
