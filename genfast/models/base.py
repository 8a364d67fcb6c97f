"""What models share: compiling, saving and loading (`Model`), and images to a code and back (`LatentImageModel`)."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from genfast import profiling
from genfast._files import replacing
from genfast.functional import bernoulli_nll
from genfast.functional._checks import choice as check_choice
from genfast.models.networks import add_mlp, conv_decoder, conv_encoder, largest_activation, run_mlp
from genfast.random import Stream, as_seed, normal, uniform

__all__ = ["LatentImageModel", "Model", "evaluating", "read_config"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_EXTRA_KEY = "extra"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Else all models of a process share one limit of eight graphs, and a sweep over sizes fails at its ninth.
_ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
_DEFAULT_WIDTHS = {"mlp": (400,), "conv": (32, 64)}
# The largest tensor within an own network is unknown: as if it had this many channels at the image's full size.
_OWN_CHANNELS = 64


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No autograd graph and eval mode inside the block; afterwards every module has its own mode again.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Dropout())
        >>> with evaluating(model):
        ...     model.training
        False
        >>> [module.training for module in model.modules()]
        [True, False, True]
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class Model(nn.Module, PyTorchModelHubMixin, library_name="genfast"):
    """An `nn.Module` with a `loss`, whose `compile` covers that loss, and that saves to a folder or to the Hub.

    A subclass defines ``forward`` as its family's scripts expect it, and ``loss(x, *, seed=None, row_offset=0, ...)``,
    which returns a dict of scalars whose entry ``"loss"`` is the batch mean to minimise. Its constructor takes what
    JSON can hold; modules passed to it are named in ``own_networks`` and passed again to `from_pretrained`.

    Example:
        >>> from genfast.models import VAE
        >>> isinstance(VAE(), Model)
        True
    """

    own_networks: tuple[str, ...] = ()

    def loss(self, x: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> dict[str, Tensor]:
        """The loss of a batch, and its parts, as scalars: each family says which."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def make_optimizer(self, lr: float, fused: bool = False) -> torch.optim.Optimizer:
        """The optimizer that this family is usually trained with; `genfast.fit` asks for it where none is given.

        Args:
            lr: its learning rate.
            fused: as of `torch.optim.Adam`.

        Example:
            >>> from genfast.models import VAE
            >>> VAE().make_optimizer(lr=1e-3).defaults["lr"]
            0.001
        """
        return torch.optim.Adam(self.parameters(), lr=lr, fused=fused)

    def compile(self, **kwargs: Any) -> None:
        """Compile ``forward`` and ``loss`` in place, one full graph each (`nn.Module.compile` compiles forward alone).

        The keys of the state_dict stay as they are. A copy or a pickle of a compiled model carries the options, not the
        compiled code: it compiles for itself at its first call, and trains its own weights.

        Args:
            kwargs: options of `torch.compile`; ``fullgraph`` is True unless given.

        Example:
            >>> from genfast.models import VAE
            >>> model = VAE()
            >>> model.compile(backend="eager")
            >>> sorted(model.loss(torch.rand(2, 1, 28, 28)))
            ['kl', 'loss', 'nll']
        """
        self._compile_options = kwargs
        options = {"fullgraph": True, **_ISOLATED, **kwargs}
        super().compile(**options)
        uncompiled = type(self).loss.__get__(self)
        compiled = torch.compile(uncompiled, **options)

        @profiling.annotate("forward and loss")
        @functools.wraps(uncompiled)
        def loss(x: Tensor, *more: Any, seed: int | Tensor | None = None, **rest: Any) -> dict[str, Tensor]:
            # An int would be a constant of the graph: compiled anew for every seed.
            return compiled(x, *more, seed=seed if seed is None else as_seed(seed, x.device), **rest)

        self.loss = loss

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if "_compile_options" in state:
            # It is bound to this object: a copy that carried it along would train this object's weights.
            state.pop("loss", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_compile_options" in state:
            self.compile(**self._compile_options)

    def config_json(self, extra: dict[str, Any] | None = None) -> str:
        """The text of ``config.json``: the class, its arguments, and ``extra`` under that name, which loading ignores.

        Example:
            >>> from genfast.models import VAE
            >>> json.loads(VAE(latent_dim=2).config_json())["latent_dim"]
            2
        """
        arguments = {key: value for key, value in self._hub_mixin_config.items() if key not in self.own_networks}
        own = {"own_networks": list(self.own_networks)} if self.own_networks else {}
        more = {_EXTRA_KEY: extra} if extra else {}
        return json.dumps({"model_type": type(self).__name__, **arguments, **own, **more}, indent=2) + "\n"

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: dict[str, Any] | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write ``model.safetensors`` and ``config.json`` into a folder, which is made if need be.

        Each file is written under a temporary name and renamed, so an interrupted save never leaves half a file.

        Args:
            save_directory: the folder.
            config: what JSON can hold, written under ``"extra"`` in config.json; loading ignores it.
            repo_id, push_to_hub, push_to_hub_kwargs: upload it as well, as in huggingface_hub's mixin; the repository
                is named after the folder unless ``repo_id`` is given.
            model_card_kwargs: a README.md with a model card is written where this is not None.

        Returns:
            The address of the commit on the Hub if it was uploaded, else None.

        Example:
            >>> import tempfile
            >>> from genfast.models import VAE
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     VAE(latent_dim=2).save_pretrained(folder)
            ...     VAE.from_pretrained(folder).latent_dim
            2
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        # Own copies, because safetensors refuses tensors that share memory, as tied weights do.
        tensors = {
            key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, value in self.state_dict().items()
        }
        text = self.config_json(config)
        with replacing(folder / WEIGHTS_NAME) as temporary:
            temporary.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
        with replacing(folder / CONFIG_NAME) as temporary:
            temporary.write_text(text)
        if model_card_kwargs is not None:
            self.generate_model_card(**model_card_kwargs).save(folder / "README.md")
        if push_to_hub:
            card = {"model_card_kwargs": model_card_kwargs}
            return self.push_to_hub(repo_id or folder.name, config=config, **card, **push_to_hub_kwargs)
        return None

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> str:
        """Upload to the Hugging Face Hub, with a model card; arguments as in huggingface_hub's mixin."""
        return super().push_to_hub(repo_id, model_card_kwargs=model_card_kwargs or {}, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **arguments: Any,
    ) -> Self:
        """Build the model that `save_pretrained` wrote, with its weights, in eval mode.

        Only safetensors are read: a pickle can run code, and is refused.

        Args:
            pretrained_model_name_or_path: a folder, or a repository of the Hugging Face Hub.
            device: where the weights go.
            revision, token, cache_dir, force_download, local_files_only: as in huggingface_hub.
            arguments: constructor arguments that replace the saved ones; own networks must be passed here.

        Raises:
            FileNotFoundError: the folder, the repository or a file is missing, or there are only pickles.
            ValueError: a file is damaged, belongs to another model, or does not fit the model of its config.

        Example:
            >>> import tempfile
            >>> from genfast.models import VAE
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     VAE().save_pretrained(folder)
            ...     VAE.from_pretrained(folder, fused=False).fused
            False
        """
        hub = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        source = pretrained_model_name_or_path
        config_path, config = read_config(source, **hub)
        if config["model_type"] != cls.__name__:
            raise ValueError(f"{config_path}: expected model_type {cls.__name__!r}, got {config['model_type']!r}")
        model = cls._from_config(config_path, config, arguments)
        weights_path = _fetch(source, WEIGHTS_NAME, **hub)
        model.load_state_dict(_read_weights(weights_path, model.state_dict()))
        return model.to(device).eval()

    @classmethod
    def _from_config(cls, path: Path, config: dict[str, Any], arguments: dict[str, Any]) -> Self:
        config = {key: value for key, value in config.items() if key not in ("model_type", _EXTRA_KEY)}
        missing = [name for name in config.pop("own_networks", []) if arguments.get(name) is None]
        if missing:
            example = ", ".join(f"{name}=..." for name in missing)
            raise ValueError(
                f"{path}: saved with its own {' and '.join(missing)}, which no file holds: "
                f"{cls.__name__}.from_pretrained(path, {example})"
            )
        known = inspect.signature(cls).parameters
        unknown = [key for key in config if key not in known]
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        if unknown and not takes_any:
            raise ValueError(f"{path}: unknown keys {unknown}; {cls.__name__} takes {list(known)}")
        try:
            return cls(**{**config, **arguments})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


def read_config(source: str | Path, **hub: Any) -> tuple[Path, dict[str, Any]]:
    """The path and the contents of the ``config.json`` in a folder or Hub repository; it names a ``model_type``.

    Raises:
        FileNotFoundError: the folder, the repository or the file is missing.
        ValueError: the file is not a genfast config.
    """
    path = _fetch(source, CONFIG_NAME, **hub)
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path}: not the config of a genfast model: it names no model_type")
    return path, config


def _fetch(source: str | Path, name: str, **hub: Any) -> Path:
    """The file of that name in a local folder, or downloaded from a repository of the Hub."""
    folder = Path(source).expanduser()
    if (folder / name).is_file():
        return folder / name
    if folder.is_dir():
        pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _PICKLE_SUFFIXES)
        hint = f"; {', '.join(pickles)}: pickles can run code and are refused" if pickles else ""
        raise FileNotFoundError(f"{folder / name}: no such file{hint}")
    if folder.exists():
        raise FileNotFoundError(f"{folder}: expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, got a file")
    if folder.parent != Path() and folder.parent.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    try:
        return Path(hf_hub_download(str(source), name, **hub))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{source}: no such folder, nor {name} on the Hugging Face Hub ({reason})") from error


def _read_weights(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors from a safetensors file, whose names and shapes must be the expected ones."""
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    problems = [f"{key} is missing" for key in expected.keys() - tensors.keys()]
    problems += [f"{key} is unknown" for key in tensors.keys() - expected.keys()]
    problems += [
        f"{key} expected shape {list(expected[key].shape)}, got {list(tensors[key].shape)}"
        for key in expected.keys() & tensors.keys()
        if expected[key].shape != tensors[key].shape
    ]
    if problems:
        raise ValueError(f"{path}: does not fit the model that {CONFIG_NAME} describes: {'; '.join(sorted(problems))}")
    return tensors


class LatentImageModel(Model):
    """Images in [0, 1] to a latent code and back: what the autoencoder and the VAE have in common.

    Networks come from a preset or from the user. The preset ``"mlp"`` registers its layers on the model itself, named
    as in the tutorials: ``fc1`` (further hidden layers ``fc1_2``, ...), the heads that give the code, ``fc3``
    (``fc3_2``, ...) and ``fc4``; it decodes to flat images [B, C * H * W]. The preset ``"conv"`` and own networks are
    ``encoder`` and ``decoder``, and decode to [B, C, H, W].
    """

    _heads: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        latent_dim: int = 20,
        hidden_dims: Sequence[int] | None = None,
        image_shape: Sequence[int] = (1, 28, 28),
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        sigma: float | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        preset: Literal["mlp", "conv"] = "mlp",
        fused: bool = True,
    ) -> None:
        super().__init__()
        check_choice("preset", preset, tuple(_DEFAULT_WIDTHS))
        check_choice("likelihood", likelihood, ("bernoulli", "gaussian"))
        widths = _DEFAULT_WIDTHS[preset] if hidden_dims is None else hidden_dims
        _check_sizes("latent_dim", [latent_dim])
        _check_sizes("hidden_dims", widths)
        _check_sizes("image_shape", image_shape, count=3)
        if preset == "conv" and not widths:
            raise ValueError("hidden_dims: expected at least one width for the preset 'conv', got none")
        if sigma is not None and (likelihood != "gaussian" or not isinstance(sigma, (int, float)) or not sigma > 0):
            raise ValueError(f"sigma: expected None, or a positive float with likelihood='gaussian', got {sigma!r}")
        self.latent_dim = latent_dim
        self.image_shape = tuple(image_shape)
        self.likelihood = likelihood
        self.fused = fused
        self.own_networks = tuple(
            name for name, network in (("encoder", encoder), ("decoder", decoder)) if network is not None
        )
        self._pixels = math.prod(self.image_shape)
        self._largest = largest_activation(preset, latent_dim, widths, self.image_shape)
        if self.own_networks:
            self._largest = max(self._largest, _OWN_CHANNELS * self._pixels)
        self._latent_shape: tuple[int, ...] | None = None if encoder is not None else (latent_dim,)

        self.encoder, self.decoder = encoder, decoder
        if encoder is None and preset == "conv":
            self.encoder = conv_encoder(self.image_shape, widths, latent_dim * len(self._heads))
        elif encoder is None:
            self._encoder_layers = add_mlp(self, "fc1", (self._pixels, *widths))
            for head in self._heads:
                self.add_module(head, nn.Linear((self._pixels, *widths)[-1], latent_dim))
        if decoder is None and preset == "conv":
            self.decoder = conv_decoder(latent_dim, widths, self.image_shape)
        elif decoder is None:
            self._decoder_layers = add_mlp(self, "fc3", (latent_dim, *reversed(widths)))
            self.fc4 = nn.Linear((*widths, latent_dim)[0], self._pixels)
        if likelihood == "gaussian":
            self.log_sigma = nn.Parameter(torch.zeros(())) if sigma is None else math.log(sigma)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the code of one image; an own encoder is asked once, with a black image.

        Example:
            >>> from genfast.models import VAE
            >>> encoder, decoder = nn.Conv2d(3, 8, 4, stride=4), nn.ConvTranspose2d(4, 3, 4, stride=4)
            >>> VAE(encoder=encoder, decoder=decoder, image_shape=(3, 32, 32)).latent_shape
            (4, 8, 8)
        """
        if self._latent_shape is None:
            # A copy in eval mode: the question must not touch the running statistics of a batch norm.
            encoder, image = copy.deepcopy(self.encoder).eval(), torch.zeros(1, *self.image_shape)
            with torch.no_grad():
                code = self._check_code(encoder(image.to(self.device, self.dtype)), 1)
            self._latent_shape = (code.shape[1] // len(self._heads), *code.shape[2:])
        return self._latent_shape

    def decode(self, z: Tensor) -> Tensor:
        """Codes to images: the probability of each pixel, or its mean under a Gaussian likelihood.

        Args:
            z: codes [B, latent_dim], or [B, *latent_shape] for own networks.

        Returns:
            [B, C * H * W] for the preset ``"mlp"``, as in the tutorials, else [B, C, H, W]; in [0, 1], except for an
            own decoder with a Gaussian likelihood, whose output is the mean as it is.

        Raises:
            ValueError: the codes, or what an own decoder makes of them, have another shape.

        Example:
            >>> from genfast.models import VAE
            >>> VAE().decode(torch.randn(3, 20)).shape
            torch.Size([3, 784])
        """
        return self._mean(self._decode(z))

    @profiling.annotate("sampling step")
    def sample(
        self,
        n: int,
        *,
        mode: Literal["mean", "bernoulli"] = "mean",
        seed: int | Tensor | None = None,
        row_offset: int = 0,
    ) -> Tensor:
        """Draw images: z from N(0, I), decoded. One seed gives the same images in one call or in many.

        Args:
            n: how many.
            mode: ``"mean"`` for the decoder's output, ``"bernoulli"`` for pixels 0 or 1 drawn from it.
            seed: None (drawn from torch's generator), an int, or an int64 tensor [1] on the model's device.
            row_offset: global index of the first image, so that pieces continue one another.

        Returns:
            Images [n, C, H, W].

        Raises:
            ValueError: an unknown mode, or pixels drawn under a Gaussian likelihood.

        Example:
            >>> from genfast.models import VAE
            >>> model = VAE()
            >>> whole, piece = model.sample(8, seed=0), model.sample(3, seed=0, row_offset=5)
            >>> whole.shape, torch.allclose(whole[5:], piece, atol=1e-6)
            (torch.Size([8, 1, 28, 28]), True)
        """
        check_choice("mode", mode, ("mean", "bernoulli"))
        if mode == "bernoulli" and self.likelihood != "bernoulli":
            raise ValueError(f"mode: expected 'mean' for a {self.likelihood} likelihood, got 'bernoulli'")
        seed = as_seed(seed, self.device)
        z = normal(seed, n, math.prod(self.latent_shape), Stream.PRIOR, row_offset)
        with evaluating(self):
            images = self._decode_images(z.reshape(n, *self.latent_shape))
        if mode == "mean":
            return images
        u = uniform(seed, n, self._pixels, Stream.PIXEL, row_offset)
        return (u.reshape(images.shape) < images).to(images.dtype)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode images and decode their (mean) codes: [B, C, H, W] for images as `loss` takes them.

        Example:
            >>> from genfast.models import VAE
            >>> VAE().reconstruct(torch.rand(3, 784)).shape
            torch.Size([3, 1, 28, 28])
        """
        with evaluating(self):
            return self._decode_images(self._mean_code(x))

    def interpolate(self, x0: Tensor, x1: Tensor, steps: int = 10) -> Tensor:
        """Decode evenly spaced points on the lines between the (mean) codes of two batches, ends included.

        Args:
            x0, x1: two batches of as many images, as `loss` takes them.
            steps: images along each line, at least 2.

        Returns:
            [B, steps, C, H, W].

        Raises:
            ValueError: batches of different size, or fewer than 2 steps.

        Example:
            >>> from genfast.models import VAE
            >>> VAE().interpolate(torch.rand(3, 784), torch.rand(3, 784), steps=5).shape
            torch.Size([3, 5, 1, 28, 28])
        """
        if steps < 2:
            raise ValueError(f"steps: expected at least 2, got {steps}")
        if len(x0) != len(x1):
            raise ValueError(f"x1: expected as many images as x0, {len(x0)}, got {len(x1)}")
        with evaluating(self):
            start, end = self._mean_code(x0, "x0").unsqueeze(1), self._mean_code(x1, "x1").unsqueeze(1)
            weight = torch.linspace(0, 1, steps, device=start.device, dtype=start.dtype)
            z = torch.lerp(start, end, weight.view(1, steps, *[1] * (start.dim() - 2)))
            return self._decode_images(z.flatten(0, 1)).unflatten(0, (len(x0), steps))

    def manifold(self, n: int = 20, extent: float = 4.0) -> Tensor:
        """Decode a grid over a two-dimensional latent space, laid out as it is plotted.

        Args:
            n: points along each axis.
            extent: both axes run from -extent to extent.

        Returns:
            [n, n, C, H, W]: the first coordinate grows to the right, the second upwards (row 0 is +extent).

        Raises:
            ValueError: the latent space has not two dimensions.

        Example:
            >>> from genfast.models import VAE
            >>> VAE(latent_dim=2).manifold(n=5).shape
            torch.Size([5, 5, 1, 28, 28])
        """
        if self.latent_shape != (2,):
            raise ValueError(f"manifold: expected a model of latent_dim 2, got latent shape {list(self.latent_shape)}")
        axis = torch.linspace(-extent, extent, n, device=self.device)
        z = torch.cartesian_prod(axis.flip(0), axis).flip(1)
        with evaluating(self):
            return self._decode_images(z).unflatten(0, (n, n))

    def _check_images(self, x: Tensor, name: str = "x") -> Tensor:
        """[B, C, H, W], from that shape, [B, C * H * W], or [B, H, W] where C is 1."""
        bools = self.likelihood == "bernoulli"
        x = check_images(name, x, self.image_shape, bools)
        return x.to(self.dtype) if x.dtype == torch.bool else x

    def _network_input(self, x: Tensor) -> Tensor:
        """Floats in [0, 1] of the parameters' dtype."""
        return x.to(self.dtype) / 255 if x.dtype == torch.uint8 else x.to(self.dtype)

    def _code(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each head says of checked images."""
        if self.encoder is not None:
            return self._packed_code(x).chunk(len(self._heads), dim=1)
        h = run_mlp(self, self._encoder_layers, self._network_input(x).flatten(1))
        return tuple(getattr(self, head)(h) for head in self._heads)

    def _packed_code(self, x: Tensor) -> Tensor:
        """The encoder's output for checked images: all heads along dim 1."""
        return self._check_code(self.encoder(self._network_input(x)), x.shape[0])

    def _check_code(self, code: Tensor, rows: int) -> Tensor:
        heads = len(self._heads)
        if "decoder" not in self.own_networks and code.shape != (rows, heads * self.latent_dim):
            expected = f"[B, {heads * self.latent_dim}]"
        elif code.dim() < 2 or code.shape[0] != rows or code.shape[1] % heads:
            expected = f"[B, {'2 L' if heads == 2 else 'L'}, ...]"
        else:
            return code
        what = "mu and logvar along dim 1" if heads == 2 else "the code"
        raise ValueError(f"encoder: expected {what}, of shape {expected}, for B = {rows}, got {list(code.shape)}")

    def _decode(self, z: Tensor) -> Tensor:
        """What the decoder says before `_mean`: logits, or what becomes the mean of a Gaussian."""
        if "decoder" not in self.own_networks and (z.dim() != 2 or z.shape[1] != self.latent_dim):
            raise ValueError(f"z: expected shape [B, {self.latent_dim}], got {list(z.shape)}")
        z = z.to(self.dtype)
        if self.decoder is None:
            return self.fc4(run_mlp(self, self._decoder_layers, z))
        out = self.decoder(z)
        if tuple(out.shape) not in ((z.shape[0], *self.image_shape), (z.shape[0], self._pixels)):
            expected = str(["B", *self.image_shape]).replace("'", "")
            raise ValueError(f"decoder: expected images of shape {expected}, got {list(out.shape)}")
        return out.reshape(-1, *self.image_shape)

    def _mean(self, out: Tensor) -> Tensor:
        if self.likelihood == "gaussian" and "decoder" in self.own_networks:
            return out
        return torch.sigmoid(out)

    def _decode_images(self, z: Tensor) -> Tensor:
        return self.decode(z).reshape(-1, *self.image_shape)

    def _mean_code(self, x: Tensor, name: str = "x") -> Tensor:
        return self._code(self._check_images(x, name))[0]

    def _nll(self, out: Tensor, x: Tensor, reduction: Literal["none", "mean"]) -> Tensor:
        """-log p(x | z) in nats, from the decoder's output and checked images: fp32 [B], or the batch mean."""
        x = x.reshape(out.shape)
        if self.likelihood == "bernoulli" and self.fused:
            return bernoulli_nll(out, x, reduction=reduction)
        target = x.float() / 255 if x.dtype == torch.uint8 else x
        if self.likelihood == "bernoulli":
            nll = F.binary_cross_entropy_with_logits(wide(out), target.to(wide(out).dtype), reduction="none")
        else:
            learned = isinstance(self.log_sigma, Tensor)
            scale = torch.exp(-self.log_sigma) if learned else math.exp(-self.log_sigma)
            error = (target - wide(self._mean(out))) * scale
            nll = 0.5 * error.square() + self.log_sigma + 0.5 * math.log(2 * math.pi)
        nll = nll.flatten(1).sum(1)
        return nll.mean() if reduction == "mean" else nll


def wide(x: Tensor) -> Tensor:
    """At least fp32: what sums over a sample are made of."""
    return x if x.dtype == torch.float64 else x.float()


def on_the_arc(z0: Tensor, z1: Tensor, t: float) -> Tensor:
    """A point of the arc between codes [B, D]: those of N(0, I) lie near a sphere, which a straight line leaves."""
    cosine = torch.cosine_similarity(z0, z1, dim=1, eps=1e-12).clamp(-1, 1).unsqueeze(1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    first, second = torch.sin((1 - t) * angle) / sine, torch.sin(t * angle) / sine
    # Where the codes are one, or opposite, there is no arc.
    flat = sine < 1e-4
    return torch.where(flat, 1 - t, first) * z0 + torch.where(flat, t, second) * z1


def check_images(name: str, x: Tensor, image_shape: tuple[int, ...], bools: bool = False) -> Tensor:
    """[B, C, H, W], from that shape, [B, C * H * W], or [B, H, W] where C is 1; floats, uint8 or (if allowed) bool."""
    if x.dtype != torch.uint8 and not x.is_floating_point() and not (bools and x.dtype == torch.bool):
        kinds = ", uint8 or bool" if bools else " or uint8"
        raise ValueError(f"{name}: expected floats in [0, 1]{kinds}, got {x.dtype}")
    accepted = [image_shape, (math.prod(image_shape),), image_shape[1:] if image_shape[0] == 1 else ()]
    if x.dim() < 2 or tuple(x.shape[1:]) not in accepted:
        shapes = " or ".join(str(["B", *shape]).replace("'", "") for shape in accepted if shape)
        raise ValueError(f"{name}: expected images of shape {shapes}, got {list(x.shape)}")
    return x.reshape(-1, *image_shape)


def _check_sizes(name: str, sizes: Sequence[int], count: int | None = None) -> None:
    # Exactly int: JSON cannot hold numpy's, and the saved config would silently fall back to the default.
    ints = isinstance(sizes, Sequence) and all(type(size) is int and size > 0 for size in sizes)
    if not ints or count not in (None, len(sizes)):
        number = "" if count is None else f"{count} "
        raise ValueError(f"{name}: expected {number}positive ints, got {sizes!r}")
