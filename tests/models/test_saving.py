"""Saving and loading: whole round trips, and one clear refusal for everything else."""

import json
import os

import pytest
import torch
from torch import nn

from genfast import VAE, AutoEncoder
from genfast.models import FAMILIES, get_family, load
from tests.models.vae_tutorial import blobs


@pytest.fixture
def x():
    return blobs(4)


@pytest.fixture
def saved(tmp_path):
    VAE(latent_dim=3, hidden_dims=(8,)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def networks():
    return {"encoder": nn.Conv2d(3, 8, 4, stride=4), "decoder": nn.ConvTranspose2d(4, 3, 4, stride=4)}


@pytest.mark.parametrize(
    "model",
    [
        VAE(),
        VAE(2, (30, 20), likelihood="gaussian"),
        VAE(preset="conv", hidden_dims=(4, 8), image_shape=(3, 9, 10), likelihood="gaussian", sigma=0.1),
        AutoEncoder(latent_dim=5, fused=False),
    ],
    ids=["default", "learned-sigma", "conv", "autoencoder"],
)
def test_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors"]
    x = torch.rand(2, *model.image_shape)
    for again in (type(model).from_pretrained(tmp_path / "new" / "folder"), load(str(tmp_path / "new" / "folder"))):
        assert type(again) is type(model)
        assert not again.training
        assert again.fused == model.fused
        torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(again.loss(x, seed=0), model.loss(x, seed=0), rtol=0, atol=0)


def test_config_is_readable(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "VAE"
    assert config["latent_dim"] == 3
    assert config["image_shape"] == [1, 28, 28]


def test_saved_arguments_can_be_replaced(saved):
    assert VAE.from_pretrained(saved, fused=False).fused is False


def test_saving_over_an_older_checkpoint(saved, x):
    newer = VAE(latent_dim=7)
    newer.save_pretrained(saved)
    torch.testing.assert_close(VAE.from_pretrained(saved).reconstruct(x), newer.reconstruct(x))


def test_failed_save_leaves_the_older_checkpoint(saved, x):
    before = VAE.from_pretrained(saved).reconstruct(x)
    broken = VAE(latent_dim=3, hidden_dims=(8,))
    broken.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises((ValueError, RuntimeError)):
        broken.save_pretrained(saved)
    torch.testing.assert_close(VAE.from_pretrained(saved).reconstruct(x), before)
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]


def test_compiled_tied_and_half_precision_models(tmp_path, x):
    model = VAE(latent_dim=3, hidden_dims=(8,))
    model.compile(backend="eager")
    model.loss(x)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(VAE.from_pretrained(tmp_path).reconstruct(x), model.reconstruct(x))
    model.bfloat16().save_pretrained(tmp_path)
    torch.testing.assert_close(VAE.from_pretrained(tmp_path).fc1.weight, model.fc1.weight.float())
    tied = VAE(latent_dim=3, hidden_dims=(3,))
    tied.fc22.weight = tied.fc21.weight
    tied.save_pretrained(tmp_path)
    torch.testing.assert_close(VAE.from_pretrained(tmp_path).reconstruct(x), tied.reconstruct(x))


def test_own_networks_are_passed_again(tmp_path):
    x = torch.rand(2, 3, 16, 16)
    model = VAE(image_shape=(3, 16, 16), **networks())
    model.save_pretrained(tmp_path)
    again = VAE.from_pretrained(tmp_path, **networks())
    torch.testing.assert_close(again.reconstruct(x), model.reconstruct(x))
    with pytest.raises(ValueError, match=r"config.json: saved with its own encoder and decoder.*encoder=..., decoder="):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"config.json: saved with its own decoder"):
        VAE.from_pretrained(tmp_path, encoder=networks()["encoder"])


def test_subclasses_save_their_own_arguments(tmp_path, x):
    class WideVAE(VAE):
        def __init__(self, width):
            super().__init__(hidden_dims=(width, width))

    model = WideVAE(12)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(WideVAE.from_pretrained(tmp_path).reconstruct(x), model.reconstruct(x))
    with pytest.raises(ValueError, match="unknown model_type 'WideVAE'"):
        load(tmp_path)


def test_a_downloaded_repository_loads_offline(saved, tmp_path, x):
    cache = tmp_path / "cache"
    snapshot = cache / "models--someone--digits" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    for name in os.listdir(saved):
        os.replace(saved / name, snapshot / name)
    model = VAE.from_pretrained("someone/digits", cache_dir=cache, local_files_only=True)
    assert model.latent_dim == 3
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"someone/digits: no such folder, nor model.safetensors on"):
        VAE.from_pretrained("someone/digits", cache_dir=cache, local_files_only=True)


def test_a_model_card_where_it_is_asked_for(saved):
    VAE().save_pretrained(saved, model_card_kwargs={})
    assert "genfast" in (saved / "README.md").read_text()


def test_missing_things_are_refused(saved, tmp_path):
    for load_it in (load, VAE.from_pretrained):
        with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder"):
            load_it(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"config.json: expected a folder with .*, got a file"):
            load_it(saved / "config.json")
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match=r"empty/config.json: no such file$"):
            load_it(tmp_path / "empty")
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such file$"):
        load(saved)


def test_pickles_are_refused(saved):
    weights = VAE.from_pretrained(saved).state_dict()
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such file; pytorch_model.bin: pickles"):
        load(saved)
    os.replace(saved / "pytorch_model.bin", saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: not a whole safetensors file"):
        load(saved)


def test_truncated_files_are_refused(saved):
    whole = (saved / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        (saved / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.safetensors: not a whole safetensors file"):
            load(saved)
    text = (saved / "config.json").read_text()
    for part in ("", text[:20], "[]", "{}", "\x80"):
        (saved / "config.json").write_bytes(part.encode("latin-1"))
        with pytest.raises(ValueError, match=r"config.json: not "):
            load(saved)


def test_other_models_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"config.json: expected model_type 'AutoEncoder', got 'VAE'"):
        AutoEncoder.from_pretrained(saved)
    edit(saved / "config.json", model_type="Diffusion")
    with pytest.raises(ValueError, match=r"config.json: unknown model_type 'Diffusion': expected one of"):
        load(saved)


def test_configs_that_do_not_fit_are_refused(saved):
    edit(saved / "config.json", latent_dim=4)
    with pytest.raises(ValueError, match=r"model.safetensors: does not fit .*fc21.bias expected shape \[4\], got"):
        load(saved)
    edit(saved / "config.json", latent_dim=3, hidden_dims=[8, 8])
    with pytest.raises(ValueError, match=r"model.safetensors: does not fit .*fc1_2.bias is missing"):
        load(saved)
    edit(saved / "config.json", hidden_dims=[])
    with pytest.raises(ValueError, match=r"model.safetensors: does not fit .*fc1.bias is unknown"):
        load(saved)
    edit(saved / "config.json", hidden_dims=[8], likelihood="poisson")
    with pytest.raises(ValueError, match=r"config.json: likelihood: expected one of"):
        load(saved)
    edit(saved / "config.json", likelihood="bernoulli", warmth=3)
    with pytest.raises(ValueError, match=r"config.json: unknown keys \['warmth'\]"):
        load(saved)


def test_families():
    assert list(FAMILIES) == ["vae", "ae", "ddpm", "flow", "gan"]
    for name in ("vae", "ae"):
        family = get_family(name)
        model = family.build([3, 8, 8], latent_dim=2, hidden_dims=(4,), preset="conv", likelihood="gaussian")
        parts = model.loss(torch.rand(2, 3, 8, 8), **dict.fromkeys(family.loss_options, 0.5))
        assert torch.isfinite(parts["loss"])
    with pytest.raises(ValueError, match="unknown model family 'gann': expected one of vae, ae, ddpm"):
        get_family("gann")
    with pytest.raises(ValueError, match=r"ae: unknown options \['beta'\]; it takes"):
        get_family("ae").build((1, 28, 28), beta=2)


def test_further_entries_of_the_config_do_not_stand_in_the_way(saved):
    VAE(latent_dim=3).save_pretrained(saved, config={"dataset": "digits", "latent_dim": 9})
    assert json.loads((saved / "config.json").read_text())["extra"]["dataset"] == "digits"
    assert load(saved).latent_dim == 3


def test_a_subclass_may_take_any_arguments(tmp_path):
    class Flexible(VAE):
        def __init__(self, hidden=8, **options):
            super().__init__(hidden_dims=(hidden,), **options)

    Flexible(hidden=5, latent_dim=3, likelihood="gaussian").save_pretrained(tmp_path)
    again = Flexible.from_pretrained(tmp_path)
    assert (again.fc1.out_features, again.latent_dim, again.likelihood) == (5, 3, "gaussian")


def test_the_upload_has_the_model_card_that_was_asked_for(tmp_path):
    class Recorder(VAE):
        def push_to_hub(self, repo_id, **options):
            return repo_id, options

    card = {"language": "en"}
    repo_id, options = Recorder().save_pretrained(
        tmp_path / "name", push_to_hub=True, model_card_kwargs=card, private=True
    )
    assert repo_id == "name"
    assert options == {"config": None, "model_card_kwargs": card, "private": True}
