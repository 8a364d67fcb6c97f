"""Signals: noted inside the block, met between two steps, and as before afterwards."""

import signal
import threading
from functools import partial

import pytest
import torch

import genfast
from genfast.models import VAE
from genfast.training import Checkpoints, Interrupted
from genfast.training.signals import StopRequests
from tests.stopping import calls_in_steps

IMAGES = torch.randint(0, 256, (24, 1, 6, 6), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
BOTH = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(autouse=True)
def handlers():
    """Those of an ordinary program, of which a test must find each again at its end."""
    before = {number: signal.getsignal(number) for number in BOTH}
    # Where the tests run in the background, SIGINT may be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    after = [signal.getsignal(number) for number in BOTH]
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == [before[signal.SIGTERM], signal.default_int_handler]


@pytest.fixture
def in_step():
    """`in_step(2, signal.SIGINT, ...)`: these are raised one after the other within the second step from then on."""
    with calls_in_steps() as register:
        yield lambda step, *numbers: register(step, *(partial(signal.raise_signal, number) for number in numbers))


def fit(folder, **options):
    torch.manual_seed(0)
    model = VAE(latent_dim=2, hidden_dims=(8,), image_shape=(1, 6, 6))
    return genfast.fit(
        model, IMAGES, **{"epochs": 3, "batch_size": 6, "seed": 5, "progress": False, "checkpoints": folder, **options}
    )


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_noted(number):
    with StopRequests() as requests:
        assert requests.received == 0
        signal.raise_signal(number)
        assert requests.received == number
    assert StopRequests().received == 0


def test_a_second_ctrl_c_does_what_it_did_before():
    with StopRequests() as requests:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert requests.received == signal.SIGINT


def test_a_second_sigterm_does_no_more():
    with StopRequests() as requests:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert requests.received in BOTH


def test_the_handlers_before_come_back_after_an_error():
    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(RuntimeError), StopRequests():
            raise RuntimeError
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert seen == [signal.SIGTERM]


def test_another_thread_leaves_the_handlers_alone():
    seen = []

    def enter():
        with StopRequests() as requests:
            seen.extend(signal.getsignal(number) for number in BOTH)
            seen.append(requests.received)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL, signal.default_int_handler, 0]


@pytest.mark.parametrize("number", BOTH)
def test_fit_saves_after_the_step_and_stops(number, in_step, tmp_path):
    in_step(6, number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name}$") as stopped:
        fit(tmp_path)
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert stopped.value.signal == number
    assert Checkpoints(tmp_path).steps()[-1] == 6


def test_fit_at_a_second_ctrl_c_stops_at_once(in_step, tmp_path):
    in_step(6, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        fit(tmp_path, checkpoint_every=5)
    assert not isinstance(stopped.value, Interrupted)
    assert Checkpoints(tmp_path).steps() == [5]


def test_a_signal_between_two_epochs_stops_after_the_next_step(tmp_path):
    with pytest.raises(Interrupted):
        fit(tmp_path, on_epoch=lambda row: signal.raise_signal(signal.SIGTERM))
    assert Checkpoints(tmp_path).steps()[-1] == 5


def test_a_signal_after_the_last_step_comes_too_late(tmp_path):
    def terminate(row):
        if row["epoch"] == 3:
            signal.raise_signal(signal.SIGTERM)

    assert fit(tmp_path, on_epoch=terminate).reason == "finished"
    assert Checkpoints(tmp_path).steps()[-1] == 12


def test_without_checkpoints_ctrl_c_stops_at_once(in_step):
    in_step(2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        fit(None)
    assert not isinstance(stopped.value, Interrupted)


def test_fit_in_another_thread(in_step, tmp_path):
    seen = []
    in_step(3)
    thread = threading.Thread(target=lambda: seen.append(fit(tmp_path).reason))
    thread.start()
    thread.join()
    assert seen == ["finished"]
