"""The ranges that really arrive: a tool of our own stands in for Nsight, and NVTX loads it as it would load that."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from genfast import VAE, profiling
from genfast.functional import kl_normal, reparameterize_kl
from genfast.training import TrainStep

pytest.importorskip("nvtx", reason="ranges need the package nvtx, a dependency of genfast")

ROOT = Path(__file__).parents[1]

SETUP = """
import threading

import torch

import genfast
from genfast import profiling
from genfast.functional import kl_normal
from genfast.training import TrainStep

images = torch.rand(8, 1, 28, 28)
model = genfast.VAE(latent_dim=3, hidden_dims=(16,))
step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=1e-3))


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError
"""


@dataclass
class Range:
    """A range as the tool saw it."""

    name: str
    thread: int
    registered: bool
    inner: list[Range] = field(default_factory=list)

    def find(self, name: str) -> Range:
        return next(range for range in self.inner if range.name == name)


def names(ranges):
    return [range.name for range in ranges]


def flat(ranges):
    """All ranges, an outer one before its inner ones."""
    return [each for range in ranges for each in (range, *flat(range.inner))]


def read(log):
    """The outermost ranges of the domain in the order of their opening; every thread must close what it opens."""
    outermost, open_on = [], {}
    for line in log.read_text().splitlines():
        thread, event, domain, text, kind = line.split("\t")
        if domain != "genfast":
            continue
        assert event in ("push", "pop"), line
        stack = open_on.setdefault(thread, [])
        if event == "pop":
            stack.pop()
            continue
        new = Range(text, int(thread), kind == "registered")
        (stack[-1].inner if stack else outermost).append(new)
        stack.append(new)
    assert not any(open_on.values()), open_on
    return outermost


def nvtx_headers():
    """The include folder of the wheel that torch's CUDA builds require, if it is there."""
    for name in ("nvidia-nvtx", "nvidia-nvtx-cu12"):
        try:
            files = metadata.distribution(name).files or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == "nvToolsExt.h":
                return Path(file.locate()).parents[1]
    return None


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    """The library that NVTX loads."""
    compiler, headers = shutil.which("cc") or shutil.which("gcc"), nvtx_headers()
    if not sys.platform.startswith("linux") or compiler is None or headers is None:
        pytest.skip("needs Linux, a C compiler, and the headers that come with torch's CUDA builds (nvidia-nvtx)")
    library = tmp_path_factory.mktemp("tool") / "libtool.so"
    source = ROOT / "tests" / "nvtx_injection.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-I", headers], check=True)
    return library


@pytest.fixture
def record(tool, tmp_path):
    """Runs code in a process of its own: (what it printed, its outermost ranges)."""

    def run(code, **environment):
        log = tmp_path / "events"
        log.touch()
        inherited = {name: value for name, value in os.environ.items() if name != "GENFAST_NVTX"}
        done = subprocess.run(
            [sys.executable, "-c", SETUP + textwrap.dedent(code)],
            cwd=ROOT,
            env={**inherited, "NVTX_INJECTION64_PATH": str(tool), "NVTX_LOG": str(log), **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split(), read(log)

    return run


def test_nothing_arrives_until_it_is_enabled(record):
    printed, ranges = record(
        """
        import sys

        step(images)
        print("nvtx" in sys.modules)
        with profiling.enabled(), profiling.range("outer"):
            with profiling.enabled():
                pass
            kept = model.loss(images)["loss"]
            profiling.backward(kept, retain_graph=True)
            profiling.disable()
            # What is open still closes, and no hook is left on the graph.
            kept.backward()
            step(images)
        step(images)
        """
    )
    assert printed == ["False"]
    assert names(ranges) == ["outer"]
    assert names(ranges[0].inner) == ["forward", "loss", "backward"]


def test_a_step_and_a_sample(record):
    _, ranges = record(
        """
        step(images)
        model.sample(4)
        model(images)
        half = torch.zeros(2, 4, 5, dtype=torch.bfloat16)
        kl_normal(half, half, half, half)
        genfast.functional.bernoulli_nll(torch.nn.Parameter(torch.zeros(6, 7)), torch.zeros(6, 7))
        """,
        GENFAST_NVTX="1",
    )
    assert names(ranges) == [
        "step", "sampling step", "forward", "kl_normal [2, 4, 5] bf16", "bernoulli_nll [6, 7] fp32"
    ]  # fmt: skip
    step = ranges[0]
    assert names(step.inner) == ["forward", "loss", "backward", "optimizer"]
    assert names(step.find("forward").inner) == ["reparameterize_kl [8, 3] fp32"]
    assert names(step.find("loss").inner) == ["bernoulli_nll_with_grad [8, 784] fp32"]
    assert names(step.find("optimizer").inner) == []
    nodes = step.find("backward").inner
    assert names(nodes).count("backward AccumulateGrad") == 10
    assert names(nodes).count("backward AddmmBackward0") == 5
    launched = {inner.name: node.name for node in nodes for inner in node.inner}
    assert launched.keys() == {"loss_rescale [8, 784] fp32", "reparameterize_kl_backward [8, 3] fp32"}
    assert "reparameterize_kl" in launched["reparameterize_kl_backward [8, 3] fp32"]
    # Nsight Systems captures by the names of registered strings alone.
    assert all(range.registered for range in flat(ranges))
    assert len({range.thread for range in flat(ranges)}) == 1


def test_fit_shows_its_data(record):
    _, ranges = record(
        """
        pixels = torch.zeros(16, 1, 28, 28, dtype=torch.uint8)
        with profiling.enabled():
            genfast.fit(model, pixels, epochs=1, batch_size=8, progress=False, seed=0)
        """
    )
    assert names(ranges) == ["data", "step", "data", "step", "data"]


def test_a_compiled_model_shows_the_phases_of_the_step_alone(record):
    _, ranges = record(
        """
        model.compile(fullgraph=True, backend="aot_eager")
        with profiling.enabled():
            step(images)
            step(images)
            model(images)
        """
    )
    assert names(ranges) == ["step", "step"]
    for step in ranges:
        assert names(step.inner) == ["forward and loss", "backward", "optimizer"]
        inner = names(flat(step.inner))
        assert set(inner) - set(names(step.inner)) == {"backward CompiledFunctionBackward", "backward AccumulateGrad"}


def test_the_ranges_of_nodes_are_on_the_thread_that_runs_them(record):
    printed, ranges = record(
        """
        def elsewhere(function, *arguments):
            thread = threading.Thread(target=function, args=arguments)
            thread.start()
            thread.join()
            print(thread.native_id)

        def fail_and_go_on():
            mu = torch.zeros(2, 3, requires_grad=True)
            failing = kl_normal(Fails.apply(mu), mu, mu, mu).sum()
            try:
                profiling.backward(failing)
            except ValueError:
                profiling.backward(mu.exp().sum())

        with profiling.enabled():
            loss = model.loss(images)["loss"]
            elsewhere(profiling.backward, loss)
            elsewhere(fail_and_go_on)
        """
    )
    other, third = map(int, printed)
    assert [(range.name, range.thread) for range in ranges if range.thread == other] == [("backward", other)]
    inner = flat(range for range in ranges if range.thread == other)
    assert {"backward AccumulateGrad", "reparameterize_kl_backward [8, 3] fp32"} <= set(names(inner))
    assert ranges[0].thread not in (other, third)
    failed, later = (range for range in ranges if range.thread == third and range.name == "backward")
    assert names(failed.inner)[-1] == "backward FailsBackward"
    assert names(later.inner) == ["backward SumBackward0", "backward ExpBackward0", "backward AccumulateGrad"]


def test_a_range_left_open_on_a_thread_of_autograd_is_closed_there(record):
    """The hooks by hand: without a GPU, autograd has no thread of its own."""
    _, ranges = record(
        """
        profiling.enable()
        failed, later = profiling._Pass(), profiling._Pass()
        turn, done = threading.Event(), threading.Event()

        def device_thread():
            failed.open("Fails")
            done.set()
            turn.wait()
            later.open("Later")
            later.close()

        thread = threading.Thread(target=device_thread)
        thread.start()
        done.wait()
        failed.over = True
        profiling._close_left_open()
        turn.set()
        thread.join()
        """
    )
    assert names(ranges) == ["backward Fails", "backward Later"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: only there autograd has a thread of its own")
def test_the_backward_of_an_op_is_named_on_the_thread_that_launches_it(record):
    printed, ranges = record(
        """
        mu = torch.zeros(8, 3, device="cuda", requires_grad=True)
        with profiling.enabled():
            profiling.backward(kl_normal(mu, mu, mu, mu).sum())
            try:
                profiling.backward(Fails.apply(mu).sum())
            except ValueError:
                profiling.backward(mu.exp().sum())
        print(threading.get_native_id())
        """
    )
    caller = int(printed[0])
    assert [range.thread for range in ranges if range.name == "backward"] == [caller] * 3
    launches = [range for range in flat(ranges) if range.name == "kl_normal_backward [8, 3] fp32"]
    assert len(launches) == 1
    assert launches[0].thread != caller
    assert not any(range.inner for range in ranges if range.name == "backward")


@pytest.fixture
def enabled():
    with profiling.enabled():
        yield


@pytest.fixture
def step():
    model = VAE(latent_dim=3, hidden_dims=(16,))
    return TrainStep(model, torch.optim.SGD(model.parameters(), lr=1e-3))


@pytest.fixture
def images():
    return torch.rand(8, 1, 28, 28)


def profiled(function, *arguments):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        function(*arguments)
    return trace.events()


def test_torch_profiler_shows_them_too(step, images):
    assert not {"step", "forward"} & {event.name for event in profiled(step, images)}
    with profiling.enabled():
        events = {event.name: event for event in profiled(step, images)}
    for path in (
        ("step", "forward", "reparameterize_kl [8, 3] fp32"),
        ("step", "backward", "backward AccumulateGrad"),
        ("step", "optimizer"),
    ):
        for outer, inner in pairwise(path):
            found = {parent.name for parent in ancestors(events[inner])}
            assert outer in found, (outer, inner, found)


def ancestors(event):
    while (event := event.cpu_parent) is not None:
        yield event


def test_it_does_not_compile_anew_when_switched(step, images):
    step.model.compile(backend="eager")
    step(images)
    step.model(images)
    with torch.compiler.set_stance("fail_on_recompile"), profiling.enabled():
        step(images)
        step.model(images)


def test_graphs_hold_no_ranges(enabled):
    zeros = torch.zeros(4, 3)

    def gradient(mu):
        mu = mu.detach().requires_grad_()
        return torch.autograd.grad(reparameterize_kl(mu, zeros, seed=0)[1].sum(), mu)

    with torch.profiler.profile():
        traced = make_fx(gradient)(zeros)
        exported = torch.export.export(VAE(latent_dim=3, hidden_dims=(16,)), (torch.rand(8, 784),), strict=False)
        torch.library.opcheck(torch.ops.genfast.kl_normal.default, (zeros, zeros, zeros, zeros, "digest"))
    for graph in (traced.graph, exported.graph):
        assert not [node for node in graph.nodes if "record_function" in str(node.target)]


def test_compiled_autograd_takes_no_ranges(enabled):
    from torch._dynamo.compiled_autograd import _enable

    mu = torch.ones(4, 3, requires_grad=True)
    with _enable(lambda graph: torch.compile(graph, backend="eager", fullgraph=True)):
        profiling.backward(kl_normal(mu, mu, mu, mu).sum() + mu.sum())
    torch.testing.assert_close(mu.grad, torch.ones(4, 3))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("options", [{"create_graph": True}, {"inputs": "x"}, {"gradient": torch.tensor(2.0)}])
def test_backward_is_that_of_torch(enabled, options):
    x, other = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    if "inputs" in options:
        options = {"inputs": [x]}
    profiling.backward((x.square() * other).sum(), **options)
    assert torch.equal(x.grad.detach(), 2 * torch.ones(3) * options.get("gradient", 1))
    assert (other.grad is None) == ("inputs" in options)
    if "create_graph" in options:
        x.grad.sum().backward()
        assert torch.equal(other.grad.detach(), 3 * torch.ones(3))


def test_decorated_methods_keep_their_signatures():
    assert list(inspect.signature(VAE.forward).parameters) == ["self", "x", "seed", "row_offset"]
    assert list(inspect.signature(TrainStep.__call__).parameters) == ["self", "batch", "seed", "row_offset"]
    model = VAE(latent_dim=3, hidden_dims=(16,))
    uncompiled = inspect.signature(model.loss)
    model.compile(backend="eager")
    assert inspect.signature(model.loss) == uncompiled


def test_without_the_package_nvtx(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ImportError, match="pip install nvtx"):
        profiling.enable()
    assert not profiling.on
    code = "import sys; sys.modules['nvtx'] = None; import genfast.functional"
    for environment, message in (({"GENFAST_NVTX": "1"}, "pip install nvtx"), ({"GENFAST_NVTX": "0"}, "")):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
        )
        assert (done.returncode == 0) == (not message), done.stderr
        assert message in done.stderr
