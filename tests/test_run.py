"""The folder of a run: what may be written where, and a run that is replaced is whole until there is another."""

import json
import os
import re
import shutil
import signal
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

from genfast.models import VAE, registry
from genfast.run import CHECKPOINTS, TENSORBOARD, RunFolder, check_out, make_folder, read_settings
from genfast.training import Checkpoints

OLD = {"run.json", "config.json", "model.safetensors", "metrics.jsonl", "samples.png", "samples-3.png", "forward.png"}
OLD |= {"reverse.png", "reverse-3.png", "reverse-3.mp4", "reverse-3.gif"}


def model(width=4):
    torch.manual_seed(0)
    return VAE(latent_dim=2, hidden_dims=(width,), image_shape=(1, 4, 4))


def save_checkpoint(folder, step, network, history=(), **more):
    tensors = {"model": network.state_dict(), **more}
    Checkpoints(folder / CHECKPOINTS).save(
        step, {"history": list(history)}, tensors, {"config.json": network.config_json()}
    )


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path):
    """A run with all that one may leave, and a file that is no part of it."""
    folder = tmp_path / "run"
    folder.mkdir()
    run = RunFolder(folder, {"genfast": "old"})
    save_checkpoint(folder, 9, model(), [{"epoch": 1}])
    run.copy_model()
    run.write_metrics([{"epoch": 1}])
    run.write_settings("finished")
    for name in OLD - {path.name for path in folder.iterdir()}:
        (folder / name).write_bytes(b"picture")
    (folder / TENSORBOARD).mkdir()
    (folder / TENSORBOARD / "events").write_bytes(b"events")
    (folder / "note.txt").write_bytes(b"mine")
    return folder


def test_a_fresh_run(tmp_path):
    run = RunFolder(tmp_path, {"genfast": "1", "lr": 0.1})
    assert not any(tmp_path.iterdir())
    run.write_settings("running")
    assert read_settings(tmp_path) == {"genfast": "1", "lr": 0.1, "status": "running"}
    assert not run.copy_model()
    assert run.history() == []
    run.write_metrics([{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}])
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2.0, 1.0]
    run.save_model(model())
    assert registry.load(tmp_path).latent_dim == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.json", "metrics.jsonl", "config.json", "model.safetensors",
    }  # fmt: skip


def test_the_model_is_that_of_the_last_checkpoint(tmp_path):
    run = RunFolder(tmp_path, {})
    weights = model()
    save_checkpoint(tmp_path, 3, weights, [{"epoch": 1}])
    run.write_settings("running")
    assert run.copy_model()
    assert torch.equal(registry.load(tmp_path).fc1.weight, weights.fc1.weight)
    run = RunFolder(tmp_path, {}, resume=True)
    assert run.history() == [{"epoch": 1}]
    # Once for each checkpoint.
    assert run.copy_model()
    (tmp_path / "model.safetensors").unlink()
    assert run.copy_model()
    assert not (tmp_path / "model.safetensors").exists()
    save_checkpoint(tmp_path, 4, model(width=5))
    assert run.copy_model()
    assert registry.load(tmp_path).fc1.out_features == 5


@pytest.mark.parametrize("saves", [RunFolder.save_model, RunFolder.copy_model])
def test_a_run_is_replaced_at_the_first_model(saves, old):
    before = contents(old)
    run = RunFolder(old, {"genfast": "new"})
    run.write_settings("running")
    run.write_metrics([{"epoch": 1}])
    files = {name: text for name, text in before.items() if "/" not in name}
    kept = {name: text for name, text in contents(old).items() if "/" not in name and not name.startswith(".")}
    assert kept == files
    save_checkpoint(old, 1, model(width=5))
    (old / TENSORBOARD).mkdir()
    (old / TENSORBOARD / "newer").touch()
    assert read_settings(old)["genfast"] == "old"
    if saves is RunFolder.save_model:
        run.save_model(model(width=5))
    else:
        run.copy_model()
    assert read_settings(old) == {"genfast": "new", "status": "running"}
    assert registry.load(old).fc1.out_features == 5
    assert {path.name for path in old.iterdir()} == {
        "run.json", "config.json", "model.safetensors", "note.txt", CHECKPOINTS, TENSORBOARD,
    }  # fmt: skip
    assert Checkpoints(old / CHECKPOINTS).steps() == [1]
    assert [path.name for path in (old / TENSORBOARD).iterdir()] == ["newer"]
    # Nothing is put back any more.
    after = contents(old)
    RunFolder(old, {"genfast": "new"}, resume=True)
    assert contents(old) == after


@pytest.mark.parametrize("lacking", ["", CHECKPOINTS, TENSORBOARD])
@pytest.mark.parametrize("wrote", [False, True])
@pytest.mark.parametrize("how", ["put_back", "give_up", "killed"])
def test_a_run_that_was_not_replaced_is_put_back(how, wrote, lacking, old):
    if lacking:
        for path in sorted((old / lacking).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (old / lacking).rmdir()
    before = contents(old)
    run = RunFolder(old, {"genfast": "new"})
    if wrote:
        save_checkpoint(old, 1, model(width=5))
        (old / TENSORBOARD).mkdir()
        (old / TENSORBOARD / "newer").touch()
    if how == "put_back":
        run.put_back()
    elif how == "give_up":
        run.give_up("failed")
    else:
        RunFolder(old, {"genfast": "old"}, resume=True)
    assert contents(old) == before
    assert not [path.name for path in old.iterdir() if path.name.startswith(".")]


def killed_before(operation, folder):
    """Replace the run in `folder` in a child that dies before its n-th change of a name; whether it came so far."""
    child = os.fork()
    if child == 0:
        changes = count()

        def die(event, _):
            # Of renames too that a rename within a rename makes.
            if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") and next(changes) == operation:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        run = RunFolder(folder, {"genfast": "new"})
        save_checkpoint(folder, 1, NEW)
        run.copy_model()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


NEW = model(width=5)


def test_a_run_killed_at_any_moment_while_it_replaces_another_is_one_of_the_two(old, tmp_path):
    before, ends = contents(old), []
    for operation in count():
        folder = tmp_path / str(operation)
        shutil.copytree(old, folder)
        if not killed_before(operation, folder):
            break
        # The next command that trains there.
        now = read_settings(folder)["genfast"]
        RunFolder(folder, {"genfast": now}, resume=True)
        ends.append(now)
        if now == "old":
            # But for a file that was never finished, whose name begins with the process that is no more.
            assert {name: text for name, text in contents(folder).items() if not re.match(r"\.\d", name)} == before
        else:
            assert Checkpoints(folder / CHECKPOINTS).steps() == [1]
        assert not [path.name for path in folder.iterdir() if path.name.startswith((".run", ".check", ".tensor"))]
    assert ends == sorted(ends, reverse=True)
    assert set(ends) == {"old", "new"}


def test_giving_up(old, tmp_path):
    fresh = RunFolder(tmp_path, {"genfast": "new"})
    fresh.write_settings("running")
    fresh.give_up("failed")
    assert read_settings(tmp_path)["status"] == "failed"
    resumed = RunFolder(old, {"genfast": "newer"}, resume=True)
    before = contents(old)
    resumed.write_settings("running")
    resumed.give_up("failed")
    assert contents(old) == before
    resumed.write_settings("running")
    save_checkpoint(old, 10, model())
    resumed.give_up("failed")
    assert read_settings(old) == {"genfast": "newer", "status": "failed"}


def test_check_out(old, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for out in (None, Path("empty"), Path("not/yet")):
        check_out(out, overwrite=False, resume=False)
        check_out(out, overwrite=True, resume=False)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="--out: foreign is not empty and not a run of genfast"):
            check_out(Path("foreign"), overwrite, resume=False)
        with pytest.raises(ValueError, match="--out: file is a file"):
            check_out(Path("file"), overwrite, resume=False)
        with pytest.raises(ValueError, match=r"--out: cannot write to file/below \(Not a directory\)"):
            check_out(Path("file/below"), overwrite, resume=False)
    for out in (None, Path("empty"), Path("foreign"), Path("not/yet"), Path("file")):
        with pytest.raises(ValueError, match="--resume: expected --out with the folder of a run, got"):
            check_out(out, overwrite=False, resume=True)
    with pytest.raises(ValueError, match="holds a run; name another folder, or add --resume or --overwrite"):
        check_out(old, overwrite=False, resume=False)
    check_out(old, overwrite=True, resume=False)
    check_out(old, overwrite=False, resume=True)
    assert not (tmp_path / "not").exists()


def test_resuming_needs_a_checkpoint_where_there_is_a_model(old):
    for step in Checkpoints(old / CHECKPOINTS).steps():
        Checkpoints(old / CHECKPOINTS).path(step).rename(old / "elsewhere")
    with pytest.raises(ValueError, match=f"--resume: {old} holds a model, but no checkpoint to go on from"):
        check_out(old, overwrite=False, resume=True)
    # As after a kill before the first checkpoint.
    (old / "model.safetensors").unlink()
    check_out(old, overwrite=False, resume=True)


def test_resuming_after_a_replacement_that_was_killed(old):
    RunFolder(old, {"genfast": "new"})
    check_out(old, overwrite=False, resume=True)


def test_make_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [make_folder(None, "vae-digits") for _ in range(3)]
    assert made == [Path("runs/vae-digits"), Path("runs/vae-digits-2"), Path("runs/vae-digits-3")]
    assert make_folder(Path("a/b"), "unused").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--out: cannot write to file"):
        make_folder(Path("file/b"), "unused")


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_settings_that_are_none(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    assert read_settings(tmp_path) == {}
    assert read_settings(tmp_path / "run.json") == {}
