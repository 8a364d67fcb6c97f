"""`fit` and `evaluate` on several processes: started by torchrun, on the CPU, talking by gloo."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import genfast
from genfast.cases import LOSS
from genfast.training import launched, read, shard
from tests.training import ranks_program
from tests.training.ranks_program import BATCH, SETTINGS, SHARDED, counted

ROOT = Path(__file__).parents[2]
PROGRAM = Path(ranks_program.__file__)

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo, by which CPUs talk"
)


def run(task, processes, folder, *options):
    """(exit code, what was printed) of a task; one that hangs fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        # Else restarted processes meet the addresses of those before: github.com/pytorch/pytorch/issues/135712.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [*command, str(PROGRAM), task, str(folder)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    try:
        # A process that hangs ends itself after PATIENCE, with its traceback.
        output, _ = process.communicate(timeout=ranks_program.PATIENCE + 60)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate()
        pytest.fail(f"{task} hung:\n{output}")
    return process.returncode, output


def results(task, processes, folder, *options):
    """What each process returned."""
    code, output = run(task, processes, folder, *options)
    assert code == 0, output
    return [torch.load(folder / f"{task}-{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def one():
    return ranks_program.everything_equal()


@pytest.fixture(scope="module")
def uninterrupted():
    return ranks_program.train(counted(), epochs=3)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return results("two", 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return results("sharded", 2, folder), folder


@pytest.fixture(scope="module")
def terminated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminated")
    return *run("terminated", 2, folder), folder


@pytest.fixture(scope="module")
def four(tmp_path_factory, terminated, sharded):
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(terminated[-1] / "checkpoints", folder / "checkpoints")
    shutil.copytree(sharded[-1] / "for four", folder / "shards")
    return results("four", 4, folder)


@pytest.fixture(scope="module", params=["two", "four"])
def many(request):
    return request.getfixturevalue(request.param)


def same(runs):
    """One of several results, which must agree bit for bit."""
    for other in runs[1:]:
        assert other["history"] == runs[0]["history"]
        assert_equal_weights(other["weights"], runs[0]["weights"])
    return runs[0]


def assert_equal_weights(weights, others):
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def assert_agree(run, other):
    """To rounding."""
    assert len(run["history"]) == len(other["history"])
    for row, expected in zip(run["history"], other["history"], strict=True):
        assert row == pytest.approx(expected, rel=LOSS.rtol)
    assert_close(run["weights"], other["weights"])


def assert_close(tensors, others):
    for name, tensor in tensors.items():
        assert (tensor - others[name]).norm() <= LOSS.rtol * others[name].norm(), name


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("what", ["pixels", "noise"])
def test_a_sample_gets_its_pixels_and_noise_on_whichever_process(what, pieces, one, many):
    expected = one["drawn"][pieces][what]
    assert len(expected) == 10
    assert expected.shape[1] == BATCH
    assert len(expected.flatten(0, 1).unique(dim=0)) > 100
    assert torch.equal(torch.cat([process["drawn"][pieces][what] for process in many], 1), expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_history_does_not_depend_on_the_number_of_processes(name, one, many):
    assert_agree(same([process["histories"][name] for process in many]), one["histories"][name])


@pytest.mark.parametrize("pieces", [1, 2])
def test_gradients_are_the_mean_over_the_processes(pieces, one, many):
    for process in many:
        assert_equal_weights(process["gradients"][pieces], many[0]["gradients"][pieces])
    assert_close(many[0]["gradients"][pieces], one["gradients"][pieces])


def test_every_process_has_the_evaluation_of_all_images(one, many):
    for process in many:
        assert process["evaluated"] == many[0]["evaluated"]
        for size, means in process["evaluated"].items():
            assert means == pytest.approx(one["evaluated"][size], rel=LOSS.rtol)


def test_a_stream_trains(one, many):
    assert_agree(same([process["uneven stream"] for process in many]), one["uneven stream"])


def test_networks_that_take_turns(one, many):
    assert_agree(same([process["turns"] for process in many]), one["turns"])


def test_a_streams_last_smaller_batch_is_left_out(two):
    for process in two:
        assert process["shorter stream"]["history"] == process["uneven stream"]["history"]
        assert process["short stream"].startswith("data: no images came in a whole epoch, or fewer than a batch of")


def test_a_loader_brings_its_own_sampler(two):
    run = same([process["loader"] for process in two])
    assert run["history"][1]["loss"] < run["history"][0]["loss"]
    half = len(run["got"]) // 2
    epochs = [sorted(image for process in two for image in process["loader"]["got"][part])
              for part in (slice(half), slice(half, None))]  # fmt: skip
    assert epochs == [list(range(5 * BATCH))] * 2
    assert run["got"][:half] != run["got"][half:]


def test_a_batch_that_cannot_be_split_evenly_is_refused(two):
    for process in two:
        for where in ("indivisible", "indivisible tests"):
            assert process[where] == f"batch_size: expected a multiple of the 2 processes, got {BATCH + 1}"


def test_all_skip_a_step_that_is_nan_on_one(two):
    for process in two:
        first, second, third = process["skipped"]["weights"]
        assert_equal_weights(first, second)
        assert not torch.equal(second["fc1.weight"], third["fc1.weight"])
        assert process["skipped"]["failed"] == [0, 2, 2]
        for weights, others in zip(process["skipped"]["weights"], two[0]["skipped"]["weights"], strict=True):
            assert_equal_weights(weights, others)


def test_all_stop_at_a_nan_that_one_has(two):
    hit = set()
    for runs in zip(*(process["failures"] for process in two), strict=True):
        assert runs[0]["message"] == runs[1]["message"]
        had, = (rank for rank, run in enumerate(runs) if any(run["had"]))
        step = runs[had]["had"].index(True) + 1
        assert f"step {step} (epoch 1, batch {step} of 5): the loss or a gradient is NaN" in runs[0]["message"]
        assert_equal_weights(runs[0]["weights"], runs[1]["weights"])
        assert all(weight.isfinite().all() for weight in runs[0]["weights"].values())
        hit.add(had)
    assert hit == {0, 1}


def test_the_first_process_alone_prints_and_writes(two):
    first, second = (process["printed"] for process in two)
    assert [line.split("  ")[0] for line in first["lines"]] == ["epoch 1/2", "epoch 2/2"]
    assert first["rows"] == 2
    assert any(path.endswith("state.json") for path in first["written"])
    assert second == {"lines": [], "written": [], "rows": 0}


def test_a_signal_to_one_process_stops_all_and_the_resume_is_bit_for_bit(two):
    for process in two:
        assert process["stopped"]["message"] == "stopped by SIGTERM"
        assert process["stopped"]["steps"] == ["step-00000004", "step-00000008"]
    stopped, whole = (same([process[name] for process in two]) for name in ("stopped", "uninterrupted"))
    assert stopped["history"] == whole["history"]
    assert_equal_weights(stopped["weights"], whole["weights"])


def test_terminating_torchrun_and_all_its_processes_leaves_one_checkpoint(terminated):
    code, output, folder = terminated
    assert code != 0
    assert {path.name for path in folder.iterdir()} == {"checkpoints", "twice-0", "twice-1"}
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]
    assert output.count("Interrupted: stopped by SIGTERM") == 2


def test_a_run_is_resumed_on_another_number_of_processes(terminated, four, uninterrupted, tmp_path):
    assert_agree(same([process["resumed"] for process in four]), uninterrupted)
    shutil.copytree(terminated[-1] / "checkpoints", tmp_path / "checkpoints")
    assert_agree(ranks_program.resumed(tmp_path / "checkpoints"), uninterrupted)


def test_a_process_that_dies_ends_the_run_and_no_checkpoint_is_damaged(uninterrupted, tmp_path):
    code, output = run("killed", 2, tmp_path)
    assert code != 0
    assert "exitcode  : -9" in output
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step-{step:08d}" for step in (6, 8, 10)]
    assert [read(path).state["place"]["steps"] for path in sorted(checkpoints.iterdir())] == [6, 8, 10]
    assert_agree(ranks_program.resumed(checkpoints), uninterrupted)


def test_torchrun_restarts_a_run_whose_process_died(uninterrupted, tmp_path):
    assert_agree(same(results("restarted", 2, tmp_path, "--max-restarts=1")), uninterrupted)
    assert (tmp_path / "died").exists()


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_model_trains_as_a_whole_one(name, sharded):
    assert_agree(*(same([process[kind][name] for process in sharded[0]]) for kind in ("fsdp", "ddp")))


def test_a_sharded_model_is_evaluated_where_a_process_has_no_images(sharded):
    for process in sharded[0]:
        whole, split = process["evaluated"]
        assert split == pytest.approx(whole, rel=LOSS.rtol)


def test_a_sharded_models_resume_is_bit_for_bit(sharded):
    for process in sharded[0]:
        assert process["message"] == "stopped by SIGTERM"
        # The signal comes in step 7, and is seen at the next common look: at once where steps are slow.
        assert process["steps"] in (["step-00000004", f"step-0000000{seen}"] for seen in (7, 8))
        assert process["resumed"]["history"] == process["fsdp"]["plain"]["history"]
        assert_equal_weights(process["resumed"]["weights"], process["fsdp"]["plain"]["weights"])


def test_a_sharded_model_is_resumed_on_another_number_of_processes(sharded, four):
    assert_agree(same([process["resumed shards"] for process in four]), sharded[0][0]["fsdp"]["plain"])


def test_what_a_sharded_model_refuses(sharded):
    for process in sharded[0]:
        assert process["ema"] == "ema_decay: expected None for a model that is sharded, got 0.9"
        message = process["whole resumed by shards"]
        assert message.startswith("resume: expected a checkpoint of a sharded model, got ")
        assert message.endswith("step-00000005 of a whole one")
        assert process["shards resumed whole"].startswith("resume: expected a checkpoint of a whole model, got ")
        assert process["failure"].startswith("step ")


def test_one_process_needs_no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with launched("cpu") as device:
        assert device == torch.device("cpu")
        assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match=r"shard: expected torch\.distributed to be initialised"):
        shard(genfast.VAE())


def test_processes_choose_their_gpus_themselves(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(ValueError, match="device: expected cuda, of which each process takes its own, got cuda:1"), \
            launched("cuda:1"):  # fmt: skip
        pass
    expected = f"device: expected a GPU for each process of this machine, got {torch.cuda.device_count()}"
    with pytest.raises(ValueError, match=expected), launched("cuda"):
        pass
