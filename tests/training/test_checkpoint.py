"""Checkpoints: whole or absent whenever a run is killed or the disk is full, and every bit comes back."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import genfast
from genfast.training.checkpoint import (
    Checkpoints,
    load_optimizer_state,
    load_random_state,
    optimizer_state,
    random_state,
    read,
)

ROOT = Path(__file__).parents[2]


def _run(function: Callable, *arguments: object, prefix: tuple[str, ...] = ()) -> str:
    """Call a function of this file in a process of its own."""
    run = subprocess.run(
        [*prefix, sys.executable, __file__, function.__name__, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN and negative zero too."""
    return a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)


def _bytes(x: Tensor) -> bytes:
    return bytes(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist())


# What is saved comes back.


def _tensors_of_all_kinds() -> dict[str, Tensor]:
    weight = torch.randn(4, 6)
    kinds = {
        "tied": weight,
        "tied again": weight,
        "row of it": weight[1],
        "transposed": weight.t(),
        "strided": weight[:, ::2],
        "expanded": torch.tensor([1.5]).expand(3, 5),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(-0.0),
        "empty": torch.empty(0),
        "empty too": torch.empty(3, 0, 2, dtype=torch.int64),
        "special": torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45]),
        "nan with a payload": torch.tensor([0x7FC12345, 0x7F812345], dtype=torch.int32).view(torch.float32),
        "bfloat16": torch.randn(7).bfloat16(),
        "half": torch.randn(7).half(),
        "double": torch.randn(7, dtype=torch.float64),
        "bool": torch.tensor([True, False, True]),
        "bool scalar": torch.tensor(True),
        "int64": torch.tensor([2**63 - 1, -(2**63), 0]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "parameter": nn.Parameter(torch.randn(3)),
    }
    return kinds


def test_tensors_of_all_kinds_come_back_bit_for_bit(tmp_path, device):
    named = {name: tensor.detach().to(device) for name, tensor in _tensors_of_all_kinds().items()}
    path = Checkpoints(tmp_path).save(3, {}, {"model": named, "ema": named, "random": {}})
    checkpoint = read(path, device)
    assert checkpoint.path == path
    assert checkpoint.step == 3
    assert set(checkpoint.tensors) == {"model", "ema", "random"}
    assert checkpoint.tensors["random"] == {}
    for group in ("model", "ema"):
        loaded = checkpoint.tensors[group]
        assert set(loaded) == set(named)
        for name, tensor in named.items():
            assert _same(loaded[name], tensor), name
            assert loaded[name].device.type == device
    # Tied ones come back apart.
    loaded["tied"].fill_(7)
    assert _same(loaded["tied again"], named["tied again"])


def test_state_comes_back_exactly(tmp_path):
    state = {
        "seed": 2**64 - 1,
        "large": -(7**300),
        "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, float(torch.tensor(0.1)), math.inf, -math.inf],
        "nothing": None,
        "truth": [True, False],
        "text": 'Zürich "\n\t\\ \u2028 \U0001f40d',
        "rows": [{"epoch": 1, "loss": 0.25}],
        "empty": {},
    }
    loaded = read(Checkpoints(tmp_path).save(0, {**state, "nan": math.nan}, {})).state
    assert math.isnan(loaded.pop("nan"))
    assert repr(loaded) == repr(state)


def test_checkpoint_is_a_folder_that_from_pretrained_loads(tmp_path):
    model = genfast.VAE(latent_dim=3, hidden_dims=(17,))
    model.save_pretrained(tmp_path / "pretrained")
    config = (tmp_path / "pretrained" / "config.json").read_text()
    tensors = {"model": model.state_dict(), "optimizer": {"0.exp_avg": torch.ones(3)}}
    path = Checkpoints(tmp_path / "checkpoints").save(468, {"epoch": 1}, tensors, {"config.json": config})
    assert path == tmp_path / "checkpoints" / "step-00000468"
    loaded = genfast.VAE.from_pretrained(path)
    assert loaded.latent_dim == 3
    assert all(_same(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    content = json.loads((path / "state.json").read_text())
    assert content["format"] == 1
    assert content["genfast"] == genfast.__version__
    assert content["torch"] == torch.__version__
    assert content["files"] == {file.name: file.stat().st_size for file in path.iterdir() if file.name != "state.json"}
    assert (path / "config.json").read_text() == config


def test_further_files_are_part_of_the_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with checkpoints.writing(4) as folder:
        (folder / "shards").mkdir()
        (folder / "shards" / "0.safetensors").write_bytes(b"0123456789")
        (folder / "shards" / ".metadata").write_bytes(b"")
        checkpoints.fill(folder, 4, {"epoch": 1}, {"ema": {"weight": torch.ones(3)}}, {"note.txt": "hello"})
    checkpoint = read(checkpoints.path(4))
    assert (checkpoint.step, checkpoint.state, set(checkpoint.tensors)) == (4, {"epoch": 1}, {"ema"})
    (checkpoint.path / "shards" / "0.safetensors").write_bytes(b"012345678")
    with pytest.raises(ValueError, match=r"shards/0\.safetensors: expected 10 bytes, got 9"):
        read(checkpoint.path)


def test_tensors_outlive_their_file(tmp_path):
    tensor = torch.randn(1000)
    path = Checkpoints(tmp_path).save(1, {}, {"model": {"weight": tensor}})
    loaded = read(path).tensors["model"]["weight"]
    with open(path / "model.safetensors", "r+b") as file:
        file.write(bytes((path / "model.safetensors").stat().st_size))
    assert _same(loaded, tensor)


@pytest.mark.parametrize(
    ("tensors", "texts", "named"),
    [
        ({"../model": {}}, {}, "../model.safetensors"),
        ({"": {}}, {}, ".safetensors"),
        ({}, {"": ""}, "''"),
        ({}, {"a/b": ""}, "a/b"),
        ({}, {"..": ""}, "'..'"),
        ({}, {"state.json": ""}, "state.json"),
        ({"model": {}}, {"model.safetensors": ""}, "model.safetensors"),
        ({}, {"notes.safetensors": ""}, "notes.safetensors"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path, tensors, texts, named):
    with pytest.raises(ValueError, match=r"expected .*got") as raised:
        Checkpoints(tmp_path).save(1, {}, tensors, texts)
    assert named in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(TypeError, match=r"state: expected what JSON can hold: .*Tensor"):
        checkpoints.save(1, {"loss": torch.ones(())}, {"model": {"weight": torch.ones(3)}})
    with pytest.raises(TypeError, match=r"tensors\['model'\]\['lr'\]: expected a tensor, got float"):
        checkpoints.save(1, {}, {"model": {"lr": 0.1}})
    assert not list(tmp_path.iterdir())


def test_arguments_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="keep: expected a positive int, got 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
        Checkpoints(tmp_path).save(-1, {}, {})


# Folders come and go as wholes.


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def _temporary_name(checkpoints: Checkpoints, step: int) -> str:
    with pytest.raises(KeyboardInterrupt), checkpoints.writing(step) as path:
        raise KeyboardInterrupt
    return path.name


def test_steps_are_in_order_of_their_numbers(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a" / "b")
    assert checkpoints.steps() == []
    assert checkpoints.latest() is None
    checkpoints.prune()
    checkpoints.clean()
    assert not (tmp_path / "a").exists()
    for step in (100_000_000, 99_999_999, 7):
        checkpoints.save(step, {}, {})
    for name in ("step-0000008", "step-00000008.bak", "step-000000008", "best"):
        (checkpoints.folder / name).mkdir()
    (checkpoints.folder / "step-00000009").write_text("a file")
    assert checkpoints.steps() == [7, 99_999_999, 100_000_000]
    assert checkpoints.latest() == checkpoints.path(100_000_000) == checkpoints.folder / "step-100000000"


def test_prune_leaves_the_last_and_the_protected(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / "notes").mkdir()
    for step in range(6):
        checkpoints.save(step, {}, {"model": {"weight": torch.ones(3)}})
    checkpoints.prune(protect=[1, 5, 77])
    assert _names(tmp_path) == ["notes", "step-00000001", "step-00000004", "step-00000005"]
    checkpoints.prune()
    assert checkpoints.steps() == [4, 5]


def _fail_within(checkpoints: Checkpoints, step: int, error: BaseException) -> None:
    with checkpoints.writing(step) as path:
        assert path.parent == checkpoints.folder
        (path / "folder").mkdir()
        (path / "folder" / "file").write_text("half")
        raise error


@pytest.mark.parametrize("error", [KeyError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_a_block_that_fails_leaves_nothing(tmp_path, error):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, {"is": "old"}, {})
    for step in (1, 2):
        with pytest.raises(type(error)):
            _fail_within(checkpoints, step, error)
        assert _names(tmp_path) == ["step-00000002"]
    assert read(checkpoints.path(2)).state == {"is": "old"}


def test_a_step_saved_again_replaces_its_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, {"is": "old"}, {"model": {}, "ema": {}})
    checkpoints.save(2, {"is": "new"}, {"model": {}})
    assert _names(tmp_path) == ["step-00000002"]
    assert _names(tmp_path / "step-00000002") == ["model.safetensors", "state.json"]
    assert read(checkpoints.path(2)).state == {"is": "new"}


def test_a_set_aside_checkpoint_is_put_back_unless_replaced(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    old = _temporary_name(checkpoints, 2).replace(".new.", ".old.").replace(f".{os.getpid()}.", f".{_dead_pid()}.")
    for look in (checkpoints.latest, checkpoints.steps, checkpoints.clean, lambda: checkpoints.prune({2})):
        os.rename(checkpoints.save(2, {"is": "old"}, {}), tmp_path / old)
        look()
        assert _names(tmp_path) == ["step-00000002"]
    shutil.copytree(checkpoints.path(2), tmp_path / old)
    checkpoints.save(2, {"is": "new"}, {})
    assert _names(tmp_path) == ["step-00000002"]
    assert read(checkpoints.path(2)).state == {"is": "new"}
    shutil.copytree(checkpoints.path(2), tmp_path / old)
    checkpoints.save(3, {}, {})
    checkpoints.prune()
    assert checkpoints.steps() == [3]
    assert _names(tmp_path) == ["step-00000003"]


def test_a_reader_that_puts_back_too_early_does_no_harm(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, {"is": "older"}, {})
    shutil.copytree(checkpoints.path(2), tmp_path / "copy")
    checkpoints.save(2, {"is": "old"}, {})
    os.rename(tmp_path / "copy", tmp_path / _temporary_name(checkpoints, 2).replace(".new.", ".old."))
    seen = []

    def rename(source: Path, target: Path, original: Callable = os.rename) -> None:
        original(source, target)
        if ".old." in Path(target).name and not seen:
            # What a killed run left is not put back in the place of a later version.
            assert len([name for name in _names(tmp_path) if ".old." in name]) == 1
            seen.append(read(Checkpoints(tmp_path).latest()).state)

    monkeypatch.setattr(os, "rename", rename)
    checkpoints.save(2, {"is": "new"}, {})
    assert seen == [{"is": "old"}]
    assert read(checkpoints.latest()).state == {"is": "new"}
    assert _names(tmp_path) == ["step-00000002"]


def test_an_interruption_between_the_renames_puts_back_at_once(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, {"is": "old"}, {})

    def rename(source: Path, target: Path, original: Callable = os.rename) -> None:
        original(source, target)
        if ".old." in Path(target).name:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, {"is": "new"}, {})
    assert _names(tmp_path) == ["step-00000002"]
    assert read(tmp_path / "step-00000002").state == {"is": "old"}


def test_clean_removes_what_dead_processes_of_this_host_left(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {}, {})
    own = _temporary_name(checkpoints, 2)
    assert own.startswith(".")
    assert f".{os.getpid()}." in own
    dead = own.replace(f".{os.getpid()}.", f".{_dead_pid()}.")
    living = own.replace(f".{os.getpid()}.", f".{os.getppid()}.")
    gone = {own, own.replace(".new.", ".trash."), dead, dead.replace(".new.", ".trash.")}
    kept = {living, living.replace(".new.", ".trash."), dead + "-of-another-host", ".cache", ".step-00000002.new"}
    for name in gone | kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    with checkpoints.writing(3) as writing:
        Checkpoints(tmp_path).clean()
        assert set(_names(tmp_path)) == kept | {writing.name, "step-00000001"}
    assert set(_names(tmp_path)) == kept | {"step-00000001", "step-00000003"}


def test_files_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    events = []

    def fsync(descriptor: int, original: Callable = os.fsync) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        original(descriptor)
        events.append(("sync", path))

    def rename(source: Path, target: Path, original: Callable = os.rename) -> None:
        original(source, target)
        events.append(("rename", Path(source), Path(target)))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("/proc tells which file a descriptor is of")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    folder = tmp_path / "new" / "folder"
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, {}, {"model": {}, "ema": {}}, {"config.json": "{}"})
    renamed = next(index for index, event in enumerate(events) if event[0] == "rename")
    temporary = events[renamed][1]
    assert events[renamed][2] == checkpoints.path(1)
    before = [event[1] for event in events[:renamed]]
    files = {temporary / name for name in ("model.safetensors", "ema.safetensors", "config.json", "state.json")}
    assert {tmp_path, tmp_path / "new"} | files <= set(before[:-1])
    assert before[-1] == temporary
    assert events[renamed + 1] == ("sync", folder)

    # A replaced one: the new folder's name is on the disk before the old one begins to go.
    events.clear()
    checkpoints.save(1, {}, {})
    kinds = [(event[0], event[2].name.split(".")[:3] if event[0] == "rename" else event[1]) for event in events]
    published = kinds.index(("rename", ["step-00000001"]))
    trashed = kinds.index(("rename", ["", "step-00000001", "trash"]))
    assert kinds[published - 1] == ("rename", ["", "step-00000001", "old"])
    assert published < kinds.index(("sync", folder)) < trashed


# The disk refuses.


@contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size`; Python ignores the signal, and gets EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _assert_refused(raised: OSError, code: int, path: Path, last: Path | None) -> None:
    assert raised.errno == code, raised
    assert raised.filename == str(path)
    left = "there is no earlier checkpoint" if last is None else f"the last checkpoint is {last}"
    assert raised.strerror == f"{os.strerror(code)}; {left}"


def test_a_file_that_may_not_grow(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    large = {"model": {"weight": torch.zeros(100_000)}}
    with _file_size_limit(100_000), pytest.raises(OSError, match="no earlier checkpoint") as raised:
        checkpoints.save(100, {}, large)
    _assert_refused(raised.value, errno.EFBIG, checkpoints.path(100), None)
    first = checkpoints.save(100, {"is": "old"}, large)
    for step in (100, 200):
        with _file_size_limit(100_000), pytest.raises(OSError, match="the last checkpoint is") as raised:
            checkpoints.save(step, {"is": "new"}, large)
        _assert_refused(raised.value, errno.EFBIG, checkpoints.path(step), first)
        assert _names(checkpoints.folder) == ["step-00000100"]
        assert read(first).state == {"is": "old"}
    assert read(checkpoints.save(200, {}, large)).step == 200


def test_a_device_without_space(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space left") as raised, checkpoints.writing(5):
        Path("/dev/full").write_bytes(b"x")
    _assert_refused(raised.value, errno.ENOSPC, checkpoints.path(5), None)
    assert not list(tmp_path.iterdir())


def test_errors_about_other_files_are_passed_on(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, Checkpoints(tmp_path / "checkpoints").writing(5):
        (tmp_path / "no such file").read_text()
    assert raised.value.filename == str(tmp_path / "no such file")
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("folder", ["file", "file/within"])
def test_a_file_in_the_folders_place(tmp_path, folder):
    (tmp_path / "file").write_text("mine")
    checkpoints = Checkpoints(tmp_path / folder)
    with pytest.raises(NotADirectoryError) as raised:
        checkpoints.save(5, {}, {})
    _assert_refused(raised.value, errno.ENOTDIR, checkpoints.path(5), None)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_and_one_that_is_read_only(tmp_path):
    allowed = shutil.which("unshare") and subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if not allowed or allowed.returncode:
        pytest.skip("needs the right to mount a small disk (root)")
    _run(save_to_a_full_disk, tmp_path, prefix=("unshare", "--mount"))


def save_to_a_full_disk(folder: str) -> None:
    """In a process with mounts of its own."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    checkpoints = Checkpoints(Path(folder) / "checkpoints")
    tensors = {"model": {"weight": torch.zeros(150_000)}}
    first = checkpoints.save(100, {"is": "old"}, tensors)
    for step in (100, 200):
        with pytest.raises(OSError, match="No space left on device; the last checkpoint") as raised:
            checkpoints.save(step, {"is": "new"}, tensors)
        _assert_refused(raised.value, errno.ENOSPC, checkpoints.path(step), first)
        assert _names(checkpoints.folder) == ["step-00000100"]
        assert read(first).state == {"is": "old"}
    checkpoints.save(300, {}, {})
    checkpoints.save(400, {}, {})
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    with pytest.raises(OSError, match="Read-only file system") as raised:
        checkpoints.save(200, {}, {})
    _assert_refused(raised.value, errno.EROFS, checkpoints.path(200), checkpoints.path(400))
    with pytest.raises(OSError, match="Read-only file system"):
        checkpoints.prune()
    assert checkpoints.steps() == [100, 300, 400]
    elsewhere = Checkpoints(Path(folder) / "new" / "folder")
    with pytest.raises(OSError, match="no earlier checkpoint") as raised:
        elsewhere.save(1, {}, {})
    _assert_refused(raised.value, errno.EROFS, elsewhere.path(1), None)


# What is damaged is not loaded.


@pytest.fixture
def saved(tmp_path) -> Path:
    tensors = {"model": {"weight": torch.ones(100)}, "ema": {"weight": torch.ones(100)}}
    return Checkpoints(tmp_path).save(1, {"epoch": 1}, tensors, {"config.json": "{}"})


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "longer", "removed"])
def test_a_file_of_another_length_is_named(saved, name, damage):
    file = saved / name
    content = file.read_bytes()
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else content + b"\0")
    got = {"cut": f"got {len(content) - 1}", "longer": f"got {len(content) + 1}", "removed": "no such file"}[damage]
    with pytest.raises(ValueError, match=f"expected {len(content)} bytes, {got}") as raised:
        read(saved)
    assert str(raised.value).startswith(str(file))


def test_a_damaged_header_is_named(saved):
    file = saved / "ema.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(ValueError, match="not a whole safetensors file") as raised:
        read(saved)
    assert str(raised.value).startswith(str(file))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "not readable as JSON"),
        (lambda text: "", "not readable as JSON"),
        (lambda text: "\udcff" + text, "not readable as JSON"),
        (lambda text: "[1]", "not the state of a genfast checkpoint"),
        (lambda text: "{}", "not the state of a genfast checkpoint"),
        (lambda text: text.replace('"format": 1', '"format": 2'), r"expected format 1, .*, got 2, written by genfast"),
        (lambda text: text.replace('"step": 1', '"step": "1"'), "step: expected int, got '1'"),
        (lambda text: text.replace('"files"', '"fields"'), "files: expected dict, got None"),
        (lambda text: text.replace("ema.", "../ema."), "files: expected paths within the folder, got '../ema.safet"),
        (lambda text: text.replace("ema.", "/ema."), "files: expected paths within the folder, got '/ema.safetensors'"),
    ],
)
def test_a_damaged_state_is_named(saved, change, message):
    file = saved / "state.json"
    file.write_bytes(change(file.read_text()).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as raised:
        read(saved)
    assert str(raised.value).startswith(str(file))


def test_what_is_no_checkpoint_is_not_found(saved):
    with pytest.raises(FileNotFoundError, match="step-00000002: no such checkpoint"):
        read(saved.with_name("step-00000002"))
    (saved / "state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"state\.json: no such file; the folder holds no checkpoint"):
        read(saved)


# Killed at any moment.


def test_kills_at_random_moments(tmp_path):
    assert _run(kill_at_random_moments, tmp_path, 50).split()[-1] == "50"


def test_kills_before_every_file_operation(tmp_path):
    operations = int(_run(kill_before_every_operation, tmp_path).split()[-1])
    assert operations > 50


def _save(checkpoints: Checkpoints, step: int, version: int) -> None:
    """A checkpoint each of whose files says of which step and version it is."""
    mark = torch.tensor([step, version])
    tensors = {"model": {"mark": mark, "weight": torch.full((999,), float(step))}, "optimizer": {"mark": mark}}
    checkpoints.save(step, {"mark": [step, version]}, tensors, {"config.json": f"{step} {version}"})


def _assert_consistent(path: Path) -> list[int]:
    checkpoint = read(path)
    mark = checkpoint.state["mark"]
    assert path.name == f"step-{mark[0]:08d}"
    assert checkpoint.step == mark[0]
    assert checkpoint.tensors["model"]["mark"].tolist() == checkpoint.tensors["optimizer"]["mark"].tolist() == mark
    assert checkpoint.tensors["model"]["weight"].tolist() == [mark[0]] * 999
    assert (path / "config.json").read_text() == "{} {}".format(*mark)
    return mark


def _fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _reap(pid: int) -> bool:
    """Whether the child was killed; else it must have ended well."""
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0
    return killed


def _assert_whole(folder: Path, reported: list[int] | None) -> list[int] | None:
    """After a kill: what has a checkpoint's name is one, and the last that was reported, or a later one, is there."""
    for path in folder.glob("step-*"):
        _assert_consistent(path)
    checkpoints = Checkpoints(folder)
    latest = checkpoints.latest()
    mark = None if latest is None else _assert_consistent(latest)
    assert reported is None or (mark is not None and mark >= reported), (mark, reported)
    for step in checkpoints.steps():
        _assert_consistent(checkpoints.path(step))
    return mark


def kill_at_random_moments(folder: str, kills: str) -> None:
    torch.set_num_threads(1)
    chance = random.Random(0)
    folder = Path(folder) / "checkpoints"
    last = None
    found = 0
    for kill in range(int(kills)):
        receiver, sender = os.pipe()
        pid = _fork(lambda kill=kill, sender=sender: save_forever(folder, kill, sender))
        os.close(sender)
        report = os.read(receiver, 1)
        for _ in range(chance.randrange(100)):
            report += os.read(receiver, 1)
        for _ in range(chance.randrange(100_000)):
            pass
        os.kill(pid, signal.SIGKILL)
        while rest := os.read(receiver, 4096):
            report += rest
        os.close(receiver)
        assert _reap(pid)
        lines = report.decode().split("\n")[:-1]
        if lines:
            last = [int(number) for number in lines[-1].split()]
        mark = _assert_whole(folder, last)
        checkpoints = Checkpoints(folder, keep=2)
        # One that was killed between its first save and prune leaves one more than it found.
        assert len(checkpoints.steps()) <= max(found + 1, 3)
        found = len(checkpoints.steps())
        checkpoints.clean()
        assert _names(folder) == [checkpoints.path(step).name for step in checkpoints.steps()]
        last = mark
    checkpoints.prune()
    assert len(checkpoints.steps()) == 2
    print(int(kills))


def save_forever(folder: Path, seed: int, sender: int) -> None:
    chance = random.Random(seed)
    checkpoints = Checkpoints(folder, keep=2)
    latest = checkpoints.latest()
    step, version = (0, 0) if latest is None else read(latest).state["mark"]
    while True:
        step, version = (step, version + 1) if chance.random() < 0.4 else (step + 1, 0)
        _save(checkpoints, step, version)
        os.write(sender, b"%d %d\n" % (step, version))
        checkpoints.prune()


def kill_before_every_operation(folder: str) -> None:
    """Python announces every open, mkdir, rename and removal; a child dies at its first, its second, and so on."""
    torch.set_num_threads(1)
    folder = Path(folder)
    # What is imported at the first use is no operation of a save.
    _save(Checkpoints(folder / "first"), 1, 0)
    _assert_whole(folder / "first", [1, 0])
    for operation in count(1):
        path = folder / str(operation)
        killed, reported = _run_and_die(path, operation, first=True)
        mark = _assert_whole(path, reported)
        if operation % 3 == 0:
            # Killed again in the middle of what it resumes, with the leftovers still there.
            _, reported = _run_and_die(path, random.Random(operation).randrange(1, 80), first=False)
            mark = _assert_whole(path, max(mark or [0], reported or [0]) if mark or reported else None)
        checkpoints = Checkpoints(path, keep=1)
        checkpoints.clean()
        assert all(name.startswith("step-") for name in _names(path)) if path.exists() else mark is None
        _save(checkpoints, 9, 0)
        checkpoints.prune()
        assert _names(path) == ["step-00000009"]
        shutil.rmtree(path)
        if not killed:
            break
    print(operation)


def _run_and_die(folder: Path, operation: int, *, first: bool) -> tuple[bool, list[int] | None]:
    receiver, sender = os.pipe()
    pid = _fork(lambda: save_and_die(folder, operation, sender, first))
    os.close(sender)
    report = b""
    while part := os.read(receiver, 4096):
        report += part
    os.close(receiver)
    lines = report.decode().split("\n")[:-1]
    return _reap(pid), [int(number) for number in lines[-1].split()] if lines else None


def save_and_die(folder: Path, operation: int, sender: int, first: bool) -> None:
    events = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal events
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"):
            events += 1
            if events == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    checkpoints = Checkpoints(folder, keep=1)
    version = 0 if first else 7
    for step, again in ((1, 0), (2, 0), (2, 1), (3, 0)) if first else ((3, 0), (3, 1), (4, 0)):
        _save(checkpoints, step, version + again)
        os.write(sender, b"%d %d\n" % (step, version + again))
        checkpoints.prune()


# Optimizers.


def _network(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(device)


def _groups(network: nn.Sequential) -> list[dict]:
    return [{"params": network[0].parameters(), "lr": 0.003}, {"params": network[2].parameters()}]


def _train(network: nn.Sequential, optimizer: torch.optim.Optimizer, steps: range) -> None:
    device = network[0].weight.device
    for step in steps:
        x = torch.randn(11, 5, generator=torch.Generator().manual_seed(step)).to(device)
        optimizer.zero_grad()
        (network(x) - x[:, :3].exp()).square().mean().backward()
        optimizer.step()


def _everything(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {
        f"{index}.{key}": value
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    return {**network.state_dict(), **state}


OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "sgd-momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True, weight_decay=lr / 10),
    "sgd-fused": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, fused=True),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(1 - 7 * lr, 1 - lr / 10)),
    "adam-fused": lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True),
    "adam-foreach": lambda p, lr: torch.optim.Adam(p, lr=lr, foreach=True),
    "adam-tensor-lr": lambda p, lr: torch.optim.Adam(p, lr=torch.tensor(lr), fused=True),
    "adamw-amsgrad": lambda p, lr: torch.optim.AdamW(p, lr=lr, amsgrad=True, eps=lr / 1e5),
    "adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=lr, initial_accumulator_value=lr),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, centered=True, momentum=0.5),
    "nadam": lambda p, lr: torch.optim.NAdam(p, lr=lr),
    "radam": lambda p, lr: torch.optim.RAdam(p, lr=lr),
    "adamax": lambda p, lr: torch.optim.Adamax(p, lr=lr),
    "adadelta": lambda p, lr: torch.optim.Adadelta(p, lr=lr),
    "asgd": lambda p, lr: torch.optim.ASGD(p, lr=lr, t0=2),
    "rprop": lambda p, lr: torch.optim.Rprop(p, lr=lr),
    "adafactor": lambda p, lr: torch.optim.Adafactor(p, lr=lr),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, device, name):
    make = OPTIMIZERS[name]
    network = _network(device)
    optimizer = make(_groups(network), 0.01)
    _train(network, optimizer, range(5))
    # As a schedule does.
    for group in optimizer.param_groups:
        group["initial_lr"] = 0.5
        if isinstance(group["lr"], Tensor):
            group["lr"].mul_(0.7)
        else:
            group["lr"] *= 0.7
    tensors, rest = optimizer_state(optimizer)
    path = Checkpoints(tmp_path).save(5, {"optimizer": rest}, {"model": network.state_dict(), "optimizer": tensors})
    _train(network, optimizer, range(5, 10))

    checkpoint = read(path, device)
    resumed = _network(device)
    other = make(_groups(resumed), 0.02)
    # One that has taken steps of its own, too.
    if name in ("adam", "adam-tensor-lr", "sgd-momentum"):
        _train(resumed, other, range(3))
    options = [set(group) for group in other.param_groups]
    resumed.load_state_dict(checkpoint.tensors["model"])
    load_optimizer_state(other, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
    for group, saved, known in zip(other.param_groups, optimizer.param_groups, options, strict=True):
        assert set(group) == known | {"initial_lr"}
        for key in set(group) - {"params"}:
            assert type(group[key]) is type(saved[key]), key
            assert group[key] == saved[key], key
    _train(resumed, other, range(5, 10))
    expected, got = _everything(network, optimizer), _everything(resumed, other)
    assert set(got) == set(expected)
    for key, value in expected.items():
        assert _same(got[key], value), key


@pytest.mark.parametrize(
    ("saved", "running"), [("adam", "adam-fused"), ("adam-fused", "adam"), ("adam", "adam-foreach")]
)
def test_execution_stays_that_of_the_running_optimizer(device, saved, running):
    network = _network(device)
    optimizer = OPTIMIZERS[saved](_groups(network), 0.01)
    _train(network, optimizer, range(5))
    resumed = _network(device)
    other = OPTIMIZERS[running](_groups(resumed), 0.02)
    flags = [(group["fused"], group["foreach"]) for group in other.param_groups]
    resumed.load_state_dict(network.state_dict())
    load_optimizer_state(other, *optimizer_state(optimizer))
    assert [(group["fused"], group["foreach"]) for group in other.param_groups] == flags
    expected, got = _everything(network, optimizer), _everything(resumed, other)
    assert all(_same(got[key], value) for key, value in expected.items())
    fresh_network = _network(device)
    fresh = OPTIMIZERS[running](_groups(fresh_network), 0.02)
    _train(fresh_network, fresh, range(1))
    assert all(got[key].device == value.device for key, value in _everything(fresh_network, fresh).items())
    # Torch's own loading, which takes over the flags, is the other opinion on how it goes on.
    native_network = _network(device)
    native = OPTIMIZERS[running](_groups(native_network), 0.02)
    native_network.load_state_dict(network.state_dict())
    state = optimizer.state_dict()
    for group, (fused, foreach) in zip(state["param_groups"], flags, strict=True):
        group.update(fused=fused, foreach=foreach)
    native.load_state_dict(state)
    _train(resumed, other, range(5, 10))
    _train(native_network, native, range(5, 10))
    expected, got = _everything(native_network, native), _everything(resumed, other)
    assert all(_same(got[key], value) for key, value in expected.items())


def test_a_tensor_learning_rate_is_filled_in_place(device):
    network = _network(device)
    rates = torch.tensor(0.5, device=device), torch.tensor(0.25, device=device)
    groups = [{"params": network[0].parameters(), "lr": rates[0]}, {"params": network[2].parameters(), "lr": rates[1]}]
    optimizer = torch.optim.Adam(groups, fused=True)
    plain = torch.optim.Adam(_groups(_network()), lr=0.1)
    plain.param_groups[0]["lr"] = 0.125
    load_optimizer_state(optimizer, *optimizer_state(plain))
    assert optimizer.param_groups[0]["lr"] is rates[0]
    assert (rates[0], rates[1]) == (0.125, torch.tensor(0.1))
    rates[0].fill_(0.3)
    tensors, rest = optimizer_state(optimizer)
    assert rest["groups"][0]["lr"] == float(torch.tensor(0.3))
    assert json.loads(json.dumps(rest)) == rest
    load_optimizer_state(plain, tensors, rest)
    assert plain.param_groups[0]["lr"] == float(torch.tensor(0.3))
    assert type(plain.param_groups[0]["lr"]) is float


def test_state_that_is_there_is_written_in_place(device):
    network = _network(device)
    optimizer = OPTIMIZERS["adam"](_groups(network), 0.01)
    _train(network, optimizer, range(3))
    tensors, rest = optimizer_state(optimizer)
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    _train(network, optimizer, range(3, 5))
    assert not _same(tensors["0.exp_avg"], saved["0.exp_avg"])
    load_optimizer_state(optimizer, saved, rest)
    assert all(_same(tensors[name], value) for name, value in saved.items())
    assert optimizer.state[network[0].weight]["exp_avg"].data_ptr() == tensors["0.exp_avg"].data_ptr()


def test_loaded_state_is_a_copy():
    network = _network()
    optimizer = OPTIMIZERS["adam"](_groups(network), 0.01)
    _train(network, optimizer, range(3))
    tensors, rest = optimizer_state(optimizer)
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    other_network = _network()
    other = OPTIMIZERS["adam"](_groups(other_network), 0.01)
    load_optimizer_state(other, tensors, rest)
    _train(other_network, other, range(3))
    assert all(_same(tensors[name], value) for name, value in saved.items())


def test_parameters_without_state_have_none_afterwards():
    network = _network()
    network[0].requires_grad_(False)
    optimizer = OPTIMIZERS["adam"](_groups(network), 0.01)
    _train(network, optimizer, range(2))
    tensors, rest = optimizer_state(optimizer)
    assert {name.split(".")[0] for name in tensors} == {"2", "3"}
    assert len(optimizer.state) == 2
    other_network = _network()
    other = OPTIMIZERS["adam"](_groups(other_network), 0.01)
    _train(other_network, other, range(2))
    load_optimizer_state(other, tensors, rest)
    assert set(other.state) == set(other_network[2].parameters())


def test_state_that_is_no_tensor(tmp_path):
    network = _network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    weight = network[0].weight
    optimizer.state[weight] = {"momentum_buffer": None, "count": 2**70, "scale": 0.1, "bits": torch.tensor([True])}
    tensors, rest = optimizer_state(optimizer)
    checkpoint = read(Checkpoints(tmp_path).save(1, rest, {"optimizer": tensors}))
    other_network = _network()
    other = torch.optim.SGD(other_network.parameters(), lr=0.1)
    load_optimizer_state(other, checkpoint.tensors["optimizer"], checkpoint.state)
    assert dict(other.state[other_network[0].weight]) == dict(optimizer.state[weight])


def test_state_keeps_its_own_dtype():
    """As torch's own loading does not: wide moments of narrow parameters."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    optimizer.state[weight]["momentum_buffer"] = torch.tensor([0.1, 0.2, 0.3])
    tensors, rest = optimizer_state(optimizer)
    other_weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    other = torch.optim.SGD([other_weight], lr=0.1, momentum=0.9)
    load_optimizer_state(other, tensors, rest)
    assert _same(other.state[other_weight]["momentum_buffer"], torch.tensor([0.1, 0.2, 0.3]))


@pytest.mark.parametrize("fused", [False, True])
def test_state_is_laid_out_as_its_parameter(tmp_path, device, fused):
    def steps(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for seed in range(3):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            # The gradient's layout is the convolution's affair.
            layer.weight.grad = torch.empty_like(layer.weight).copy_(layer.weight.grad)
            optimizer.step()

    layer = nn.Conv2d(3, 4, 3).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(layer.parameters(), fused=fused)
    steps(layer, optimizer)
    tensors, rest = optimizer_state(optimizer)
    path = Checkpoints(tmp_path).save(1, rest, {"model": layer.state_dict(), "optimizer": tensors})
    checkpoint = read(path, device)
    resumed = nn.Conv2d(3, 4, 3).to(device, memory_format=torch.channels_last)
    resumed.load_state_dict(checkpoint.tensors["model"])
    other = torch.optim.Adam(resumed.parameters(), fused=fused)
    load_optimizer_state(other, checkpoint.tensors["optimizer"], checkpoint.state)
    assert other.state[resumed.weight]["exp_avg"].stride() == resumed.weight.stride() != (27, 9, 3, 1)
    steps(layer, optimizer)
    steps(resumed, other)
    expected, got = _everything(layer, optimizer), _everything(resumed, other)
    assert all(_same(got[key], value) for key, value in expected.items())


def _adam(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    return torch.optim.Adam([nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes], lr=0.5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: torch.optim.SGD([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))], lr=0.5),
            "optimizer: expected Adam, as in the checkpoint, got SGD",
        ),
        (lambda: _adam((2,)), r"optimizer: expected groups of \[2\] parameters, as in the checkpoint, got \[1\]"),
        (
            lambda: torch.optim.Adam([{"params": [nn.Parameter(torch.ones(n))]} for n in (2, 3)], lr=0.5),
            r"optimizer: expected groups of \[2\] parameters, as in the checkpoint, got \[1, 1\]",
        ),
        (lambda: _adam((2,), (3, 1)), r"optimizer: expected shape \[3\] of parameter 1, as in .*, got \[3, 1\]"),
        (
            lambda: _adam((2,), (3,), dtype=torch.bfloat16),
            r"optimizer: expected dtype torch.float32 of parameter 0, as in .*, got torch.bfloat16",
        ),
    ],
)
def test_another_optimizer_is_refused(other, message):
    optimizer = _adam((2,), (3,))
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    other = other()
    with pytest.raises(ValueError, match=message):
        load_optimizer_state(other, *optimizer_state(optimizer))
    assert not other.state
    assert other.param_groups[0]["lr"] == 0.5


def test_an_optimizer_whose_state_has_no_form_is_refused():
    network = _network()
    optimizer = torch.optim.LBFGS(network.parameters())

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = network(torch.ones(4, 5)).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    with pytest.raises(ValueError, match="optimizer: state 'old_dirs' of parameter 0: expected a tensor, or numbers"):
        optimizer_state(optimizer)


# Random numbers.


def test_random_numbers_go_on_where_they_were(tmp_path, device):
    torch.randn(17, device=device)
    path = Checkpoints(tmp_path).save(1, {}, {"random": random_state()})
    expected = torch.randn(5), torch.randn(5, device=device)
    torch.manual_seed(99)
    load_random_state(read(path, device).tensors["random"])
    assert _same(torch.randn(5), expected[0])
    assert _same(torch.randn(5, device=device), expected[1])


def test_random_states_of_absent_devices_are_passed_over():
    load_random_state({**random_state(), "cuda.999": torch.zeros(16, dtype=torch.uint8)})


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
