"""Checkpoints of a training run: folders that are whole or absent, and what goes into them."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.optim import Optimizer

import genfast

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "load_optimizer_state",
    "load_random_state",
    "optimizer_state",
    "random_state",
    "read",
]

FORMAT = 1
STATE_NAME = "state.json"
_SUFFIX = ".safetensors"
_FINAL = re.compile(r"step-(\d{8}|[1-9]\d{8,})")
# "new": being written; "old": set aside while its replacement takes its place; "trash": being deleted.
_TEMPORARY = re.compile(r"\.(?P<final>step-\d{8,})\.(?P<kind>new|old|trash)\.(?P<pid>\d+)\.[0-9a-f]{8}\.(?P<host>.+)")
_HOST = re.sub(r"[^\w.-]", "_", socket.gethostname()) or "host"
# This process's own folders in use: in a container, the killed run that left one may have had the same pid.
_in_use: set[str] = set()
# How a step is computed belongs to the run, what it computes to the checkpoint.
_EXECUTION = ("fused", "foreach", "capturable", "differentiable")


class Checkpoints:
    """The checkpoints of a run: one folder each, ``step-00000468``, in `folder`; written whole or not at all.

    Each is written under a temporary name, flushed to the disk, and renamed: a folder of that name is complete,
    whenever the process or the machine stops. One process at a time may write to `folder`; others may read.

    Saving a step again replaces its checkpoint. The old one is first set aside under a temporary name; where a kill
    came between the two renames, `steps`, `latest` and `clean` of the next process put it back.

    Args:
        folder: made at the first save.
        keep: how many of the last checkpoints `prune` leaves.

    Raises:
        ValueError: `keep` is less than 1.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = Checkpoints(folder, keep=2)
        ...     for step in (100, 200, 300):
        ...         _ = checkpoints.save(step, {"epoch": step // 100}, {"model": {"weight": torch.ones(3)}})
        ...         checkpoints.prune()
        ...     print(checkpoints.steps(), read(checkpoints.latest()).state)
        [200, 300] {'epoch': 3}
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected a positive int, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str] = {},
    ) -> Path:
        """Write the checkpoint of a step; all is on the disk when this returns.

        With the tensors of a model's state_dict under "model" and its ``config.json`` among the texts, the folder is
        one that the model's ``from_pretrained`` loads.

        Args:
            step: at least 0.
            state: what JSON can hold: keys are strings, tuples come back as lists; ints of any size, floats to the
                last bit, NaN and infinities.
            tensors: by the name of their file, as in ``{"model": {"fc1.weight": ...}}``, of any device, dtype and
                layout; tensors may share memory, and come back as separate ones.
            texts: further files by name, in UTF-8.

        Returns:
            The checkpoint's folder.

        Raises:
            TypeError: `state` holds what JSON cannot, or `tensors` other things than tensors.
            ValueError: a file name that is none, or is given twice.
            OSError: it cannot be written, as on a full disk; names the checkpoint, and the last one, which is whole.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = Checkpoints(folder).save(7, {}, {"ema": {"weight": torch.ones(3)}}, {"note.txt": "hello"})
            ...     print(path.name, sorted(file.name for file in path.iterdir()))
            step-00000007 ['ema.safetensors', 'note.txt', 'state.json']
        """
        with self.writing(step) as folder:
            self.fill(folder, step, state, tensors, texts)
        return self.path(step)

    @staticmethod
    def fill(
        folder: Path,
        step: int,
        state: Mapping[str, Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str] = {},
    ) -> None:
        """Write into the folder of `writing` what `save` writes.

        Args:
            folder: that of the block. Files that it holds already are part of the checkpoint: `read` compares their
                sizes too.
            step, state, tensors, texts: as for `save`, as is what is raised.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     checkpoints = Checkpoints(folder)
            ...     with checkpoints.writing(7) as path:
            ...         checkpoints.fill(path, 7, {"epoch": 1}, {})
            ...     print(read(checkpoints.path(7)).state)
            {'epoch': 1}
        """
        _check_names(tensors, texts)
        for key, named in tensors.items():
            (folder / (key + _SUFFIX)).write_bytes(_to_safetensors(key, named))
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        content = {
            "format": FORMAT,
            "genfast": genfast.__version__,
            "torch": str(torch.__version__),
            "step": step,
            "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
            "state": dict(state),
        }
        try:
            text = json.dumps(content, indent=2)
        except TypeError as error:
            raise TypeError(f"state: expected what JSON can hold: {error}") from error
        # Last, for it says that the others are there.
        (folder / STATE_NAME).write_bytes(text.encode() + b"\n")

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A temporary folder beside the checkpoints, which becomes that of `step` when the block succeeds.

        When the block fails the folder is removed, and an earlier checkpoint of that step stays.

        Raises:
            OSError: as for `save`; an OSError of the block about a file elsewhere is passed on as it is.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     checkpoints = Checkpoints(folder)
            ...     with checkpoints.writing(7) as path:
            ...         _ = (path / "note.txt").write_text("whole")
            ...     print((checkpoints.path(7) / "note.txt").read_text())
            whole
        """
        final = self.path(step)
        temporary = self._temporary(final, "new")
        _in_use.add(temporary.name)
        try:
            with self._naming(final):
                _make_folder(self.folder)
                temporary.mkdir()
            with self._naming(final, within=temporary):
                yield temporary
            with self._naming(final):
                for parent, _, files in os.walk(temporary, topdown=False):
                    for path in (*files, ""):
                        _sync(Path(parent, path))
                self._publish(temporary, final)
        finally:
            self._put_back()
            shutil.rmtree(temporary, ignore_errors=True)
            _in_use.discard(temporary.name)

    def prune(self, protect: Collection[int] = ()) -> None:
        """Delete all but the last `keep` checkpoints and those of the steps in `protect`.

        Raises:
            OSError: a checkpoint cannot be deleted; it is still whole.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     checkpoints = Checkpoints(folder, keep=1)
            ...     for step in (1, 2, 3, 4):
            ...         _ = checkpoints.save(step, {}, {})
            ...     checkpoints.prune(protect={2})
            ...     print(checkpoints.steps())
            [2, 4]
        """
        superfluous = [self.path(step) for step in self.steps()[: -self.keep] if step not in protect]
        # A killed run's old version of such a step would come back once the step itself has gone.
        stale = [path for path, found in self._temporaries("old") if self.folder / found["final"] in superfluous]
        self._delete(stale + superfluous)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending.

        Example:
            >>> Checkpoints("no-such-folder").steps()
            []
        """
        self._put_back()
        found = ((path, _FINAL.fullmatch(path.name)) for path in self._entries())
        return sorted(int(match[1]) for path, match in found if match and path.is_dir())

    def latest(self) -> Path | None:
        """The folder of the last step that has a checkpoint; None if there is none.

        Example:
            >>> Checkpoints("no-such-folder").latest() is None
            True
        """
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether it is there or not.

        Raises:
            ValueError: `step` is negative.

        Example:
            >>> Checkpoints("run").path(468).name
            'step-00000468'
        """
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        return self.folder / f"step-{step:08d}"

    def clean(self) -> None:
        """Remove the temporary folders of processes of this host that run no more.

        Those of another host stay: whether their process runs cannot be known.

        Raises:
            OSError: a folder cannot be removed.

        Example:
            >>> Checkpoints("no-such-folder").clean()
        """
        self._put_back()
        abandoned = [path for path, found in self._temporaries() if self._is_abandoned(path, found)]
        self._delete(abandoned, ignore_errors=False)

    def _publish(self, temporary: Path, final: Path) -> None:
        """Give a complete, flushed folder its name, in the place of an older one if need be."""
        self._put_back()
        # At most one is ever set aside, so that what is put back is the newest.
        self._delete(self._set_aside(final))
        while True:
            if final.is_dir():
                os.rename(final, self._temporary(final, "old"))
            try:
                os.rename(temporary, final)
                break
            except OSError as error:
                # A reader has put the old one back in between.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not final.is_dir():
                    raise
        _sync(self.folder)
        self._delete(self._set_aside(final))

    def _set_aside(self, final: Path) -> list[Path]:
        return [path for path, found in self._temporaries("old") if found["final"] == final.name]

    def _put_back(self) -> None:
        """Give a set-aside checkpoint its name again where no replacement has come."""
        for path, found in self._temporaries("old"):
            final = self.folder / found["final"]
            if not final.exists():
                # A writer at work may be faster; a reader may lack the right.
                with suppress(OSError):
                    os.rename(path, final)

    def _delete(self, paths: Iterable[Path], *, ignore_errors: bool = True) -> None:
        """Delete folders such that none is ever half deleted under a name that counts; `clean` tries again."""
        trash = []
        for path in paths:
            found = _TEMPORARY.fullmatch(path.name)
            trash.append(self._temporary(self.folder / (found["final"] if found else path.name), "trash"))
            with suppress(FileNotFoundError):
                os.rename(path, trash[-1])
        if trash:
            _sync(self.folder)
        for path in trash:
            with suppress(FileNotFoundError):
                shutil.rmtree(path, ignore_errors)

    def _is_abandoned(self, path: Path, found: re.Match[str]) -> bool:
        """Whether the process that made a temporary folder is known to need it no more."""
        if found["host"] != _HOST or (found["kind"] == "old" and not (self.folder / found["final"]).exists()):
            return False
        pid = int(found["pid"])
        return path.name not in _in_use if pid == os.getpid() else not _is_running(pid)

    def _temporary(self, final: Path, kind: Literal["new", "old", "trash"]) -> Path:
        return final.with_name(f".{final.name}.{kind}.{os.getpid()}.{secrets.token_hex(4)}.{_HOST}")

    def _temporaries(self, kind: str | None = None) -> list[tuple[Path, re.Match[str]]]:
        found = ((path, _TEMPORARY.fullmatch(path.name)) for path in self._entries())
        return [(path, match) for path, match in found if match and kind in (None, match["kind"])]

    def _entries(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []

    @contextmanager
    def _naming(self, final: Path, within: Path | None = None) -> Iterator[None]:
        """Have an OSError, of a file in `within` if that is given, name the checkpoint and the one that is left."""
        try:
            yield
        except OSError as error:
            elsewhere = within and error.filename is not None and within not in _with_parents(error.filename)
            if error.errno is None or elsewhere:
                raise
            latest = self.latest()
            left = "there is no earlier checkpoint" if latest is None else f"the last checkpoint is {latest}"
            raise OSError(error.errno, f"{error.strerror}; {left}", str(final)) from error


class Checkpoint(NamedTuple):
    """A checkpoint in memory: where it was read, its step, and the state and tensors that were saved.

    Example:
        >>> Checkpoint(Path("run/step-00000007"), 7, {"epoch": 1}, {}).step
        7
    """

    path: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def read(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Checkpoint:
    """Read the checkpoint that `Checkpoints.save` wrote; nothing in it can run code.

    Args:
        path: its folder, under whatever name.
        device: where the tensors go.

    Raises:
        FileNotFoundError: there is no such folder, or it is none of a checkpoint.
        ValueError: a file is damaged, missing or of another length than was written, or the format is another one.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Checkpoints(folder).save(7, {"epoch": 1}, {"model": {"weight": torch.ones(3)}})
        ...     checkpoint = read(path)
        >>> checkpoint.step, checkpoint.state, checkpoint.tensors
        (7, {'epoch': 1}, {'model': {'weight': tensor([1., 1., 1.])}})
    """
    folder = Path(path)
    content = _read_state(folder / STATE_NAME)
    for name, size in content["files"].items():
        got = (folder / name).stat().st_size if (folder / name).is_file() else None
        if got != size:
            state = "no such file" if got is None else f"got {got}"
            raise ValueError(f"{folder / name}: expected {size} bytes, {state}; the checkpoint is damaged")
    tensors = {
        name.removesuffix(_SUFFIX): _from_safetensors(folder / name, device)
        for name in content["files"]
        if name.endswith(_SUFFIX) and "/" not in name
    }
    return Checkpoint(folder, content["step"], content["state"], tensors)


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an optimizer has learnt and how it is set, in a form that a checkpoint can hold.

    Returns:
        The tensors of its state, not copied, named by the index of the parameter over all groups ("3.exp_avg"); and
        the rest, for JSON: the class, the shapes of the parameters, the options of each group but those that say how
        a step is executed (fused, foreach, capturable, differentiable), and state that is no tensor. Options that are
        tensors, such as a learning rate for CUDA graphs, become numbers.

    Raises:
        ValueError: the optimizer holds what neither a tensor nor JSON can, as LBFGS does.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> tensors, rest = optimizer_state(optimizer)
        >>> tensors, rest["groups"][0]["lr"]
        ({'0.momentum_buffer': tensor([1., 1., 1.])}, 0.1)
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, (parameter, _) in enumerate(_parameters(optimizer)):
        # Asking by [] would make an entry.
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.detach()
            else:
                values.setdefault(str(index), {})[key] = _plain(value, f"state {key!r} of parameter {index}")
    left_out = ("params", "param_names", *_EXECUTION)
    groups = [
        {key: _plain(value, f"option {key!r}") for key, value in group.items() if key not in left_out}
        for group in optimizer.param_groups
    ]
    return tensors, {**_identity(optimizer), "groups": groups, "state": values}


def load_optimizer_state(optimizer: Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Give an optimizer the state and the options that `optimizer_state` returned, bit for bit.

    How its steps are executed stays as it is: fused or not, and on which device the learning rate is. Tensors that
    are there already are written to in place, so that a captured CUDA graph goes on with them.

    Args:
        optimizer: of the same class, over as many parameters of the same shapes and dtypes, in the same groups.
        tensors, rest: on any device; copied.

    Raises:
        ValueError: the optimizer is another one: says what differs, and nothing is changed.

    Example:
        >>> def optimizer(lr):
        ...     return torch.optim.Adam([torch.nn.Parameter(torch.ones(3))], lr=lr)
        >>> other = optimizer(lr=0.1)
        >>> load_optimizer_state(other, *optimizer_state(optimizer(lr=0.2)))
        >>> other.param_groups[0]["lr"]
        0.2
    """
    _check_identity(_identity(optimizer), rest)
    parameters = _parameters(optimizer)
    states: list[dict[str, Any]] = [dict(rest["state"].get(str(index), {})) for index in range(len(parameters))]
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        states[int(index)][key] = tensor
    with torch.no_grad():
        for (parameter, group), state in zip(parameters, states, strict=True):
            current = optimizer.state.pop(parameter, {})
            if state:
                optimizer.state[parameter] = {
                    key: _placed(key, value, current.get(key), parameter, group) if isinstance(value, Tensor) else value
                    for key, value in state.items()
                }
        for group, options in zip(optimizer.param_groups, rest["groups"], strict=True):
            group.update({key: _as_before(group.get(key), value) for key, value in options.items()})


def random_state() -> dict[str, Tensor]:
    """The states of torch's generators, uint8 each: "cpu", and "cuda.0", ... once CUDA is in use.

    Example:
        >>> "cpu" in random_state()
        True
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def load_random_state(tensors: Mapping[str, Tensor]) -> None:
    """Set torch's generators to what `random_state` returned; those of devices that are not here are passed over.

    Example:
        >>> state = random_state()
        >>> first = torch.rand(3)
        >>> load_random_state(state)
        >>> torch.equal(torch.rand(3), first)
        True
    """
    for name, state in tensors.items():
        kind, _, index = name.partition(".")
        if kind == "cpu":
            torch.set_rng_state(state.cpu())
        elif int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state.cpu(), int(index))


def _check_names(tensors: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    names = [key + _SUFFIX for key in tensors] + list(texts)
    for name in names:
        hidden = name.startswith(".")
        if "/" in name or hidden or not _is_within(name) or names.count(name) > 1 or name == STATE_NAME:
            raise ValueError(f"tensors, texts: expected different file names other than {STATE_NAME}, got {name!r}")
    for name in texts:
        if name.endswith(_SUFFIX):
            raise ValueError(f"texts: expected no {_SUFFIX}, which tensors are for, got {name!r}")


def _is_within(name: str) -> bool:
    """Whether a relative path leads to a file in the folder."""
    return "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _to_safetensors(key: str, named: Mapping[str, Tensor]) -> bytes:
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{key!r}][{name!r}]: expected a tensor, got {type(tensor).__name__}")
    # Own copies, because safetensors refuses tensors that share memory, as tied weights do.
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in named.items()
    }
    return safetensors.torch.save(copies, metadata={"format": "pt"})


def _from_safetensors(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    try:
        # Not mapped into memory: the file may be deleted while its tensors are in use.
        tensors = safetensors.torch.load(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _read_state(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such checkpoint")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the folder holds no checkpoint")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{path}: not the state of a genfast checkpoint: it names no format")
    if content["format"] != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT}, which genfast {genfast.__version__} reads, got {content['format']!r}, "
            f"written by genfast {content.get('genfast')}"
        )
    for key, kind in {"step": int, "files": dict, "state": dict}.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{path}: {key}: expected {kind.__name__}, got {content.get(key)!r}")
    for name in content["files"]:
        if not _is_within(name):
            raise ValueError(f"{path}: files: expected paths within the folder, got {name!r}")
    return content


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or which names a folder holds, is on the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _with_parents(path: Any) -> tuple[Path, ...]:
    path = Path(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else Path()
    return (path, *path.parents)


def _parameters(optimizer: Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """Each parameter with its group, in order."""
    return [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]


def _identity(optimizer: Optimizer) -> dict[str, Any]:
    """What two optimizers must have in common for one to take the other's state."""
    return {
        "class": type(optimizer).__name__,
        "sizes": [len(group["params"]) for group in optimizer.param_groups],
        "shapes": [list(parameter.shape) for parameter, _ in _parameters(optimizer)],
        "dtypes": [str(parameter.dtype) for parameter, _ in _parameters(optimizer)],
    }


def _check_identity(running: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    if running["class"] != saved["class"]:
        raise ValueError(f"optimizer: expected {saved['class']}, as in the checkpoint, got {running['class']}")
    if running["sizes"] != saved["sizes"]:
        raise ValueError(
            f"optimizer: expected groups of {saved['sizes']} parameters, as in the checkpoint, got {running['sizes']}"
        )
    for what in ("shapes", "dtypes"):
        for index, (got, expected) in enumerate(zip(running[what], saved[what], strict=True)):
            if got != expected:
                raise ValueError(
                    f"optimizer: expected {what[:-1]} {expected} of parameter {index}, as in the checkpoint, got {got}"
                )


def _plain(value: Any, what: str) -> Any:
    """Numbers, strings, None, and lists of them."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(item, what) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"optimizer: {what}: expected a tensor, or numbers and strings, got {type(value).__name__}")


def _as_before(current: Any, saved: Any) -> Any:
    """A saved option as the kind of thing that the running optimizer has there."""
    if isinstance(current, Tensor):
        return current.fill_(saved)
    if isinstance(current, (list, tuple)) and isinstance(saved, list) and len(current) == len(saved):
        return type(current)(map(_as_before, current, saved))
    return saved


def _placed(key: str, value: Tensor, current: Any, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A saved state tensor where, and in the layout in which, the running optimizer keeps it."""
    if isinstance(current, Tensor) and current.shape == value.shape and current.dtype == value.dtype:
        return current.copy_(value)
    on_device = bool(group.get("fused") or group.get("capturable"))
    if key == "step" and on_device:
        # Optimizers that keep it elsewhere count in any dtype; these insist.
        value = value.float()
    device = torch.device("cpu") if key in ("step", "mu_product") and not on_device else parameter.device
    if value.shape == parameter.shape and value.dim() > 0:
        # Kernels go through a parameter and its state side by side in memory.
        return torch.empty_like(parameter, dtype=value.dtype, device=device).copy_(value)
    return value.detach().to(device, copy=True)
