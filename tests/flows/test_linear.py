"""ActNorm and the invertible 1 x 1 convolution: Jacobians, halves, folding, and an initialisation that happens once."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from genfast.flows import ActNorm, InvertibleConv1x1, divide
from genfast.flows.linear import ActNormConv1x1, inverted
from tests.flows import ranks_program
from tests.flows.networks import assert_is_a_transform, whole

ROOT = Path(__file__).parents[2]
SPLITS = {
    "channel": ("channel", (4, 2, 4)),
    "channel of vectors": ("channel", (4,)),
    "checkerboard": ("checkerboard", (3, 2, 4)),
    "mask": ([True, False, False, True, True], (5, 3)),
    "mask of vectors": ([True, False, False, True, True], (5,)),
}


def trained_norm(channels):
    norm = ActNorm(channels).double()
    norm(3 + 2 * torch.randn(20, channels, dtype=torch.float64))
    return norm


def trained_conv(channels, form):
    conv = InvertibleConv1x1(channels, form).double()
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return conv


BUILDS = {
    "actnorm": trained_norm,
    "lu": lambda channels: trained_conv(channels, "lu"),
    "plain": lambda channels: trained_conv(channels, "plain"),
    "folded": lambda channels: ActNormConv1x1(trained_norm(channels), trained_conv(channels, "lu")),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 2, 2), (1, 2, 2)], ids=str)
def test_logdet_is_that_of_the_jacobian(build, shape):
    assert_is_a_transform(build(shape[0]), torch.randn(2, *shape, dtype=torch.float64))


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize(("split", "shape"), SPLITS.values(), ids=SPLITS)
def test_halves_give_what_the_whole_gives(build, split, shape):
    transform, x = build(shape[0]), torch.randn(3, *shape, dtype=torch.float64)
    y, logdet = transform(x)
    halves, same = transform(divide(x, split))
    torch.testing.assert_close(whole(halves), y)
    torch.testing.assert_close(same, logdet)
    torch.testing.assert_close(whole(transform.inverse(halves)), x)


@pytest.mark.parametrize("form", ["lu", "plain"])
def test_folding_changes_nothing(form):
    norm, conv, x = trained_norm(4), trained_conv(4, form), torch.randn(3, 4, 2, 2, dtype=torch.float64)
    h, first = norm(x)
    y, second = conv(h)
    folded, logdet = ActNormConv1x1(norm, conv)(x)
    torch.testing.assert_close((folded, logdet), (y, first + second))
    parameters = [*norm.parameters(), *conv.parameters()]
    expected = torch.autograd.grad((y * y).sum() + (first + second).sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad((folded * folded).sum() + logdet.sum(), parameters), expected)


def test_both_forms_start_as_rotations():
    for form in ("lu", "plain"):
        weight, logdet = InvertibleConv1x1(6, form).matrix()
        torch.testing.assert_close(weight @ weight.T, torch.eye(6), rtol=1e-5, atol=1e-5)
        assert logdet.abs() < 1e-5


@pytest.mark.parametrize("conv", [InvertibleConv1x1(4), InvertibleConv1x1(4, "plain")], ids=["lu", "plain"])
def test_the_state_keeps_fp32_under_autocast(conv):
    x = torch.randn(2, 4, 4, 4)
    for transform in (conv, ActNormConv1x1(ActNorm(4), conv)):
        expected = transform(x)
        with torch.autocast("cpu", torch.bfloat16):
            for state in (x, divide(x, "channel")):
                y, logdet = transform(state)
                torch.testing.assert_close((whole(y), logdet), expected)
                torch.testing.assert_close(whole(transform.inverse(y)), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["lu", "plain"])
def test_the_logdet_of_narrow_dtypes_is_fp32(dtype, weights, form):
    norm, conv = trained_norm(4).to(weights), trained_conv(4, form).to(weights)
    x = torch.randn(3, 4, 8, 8)
    for transform in (norm, conv, ActNormConv1x1(norm, conv)):
        wide = copy.deepcopy(transform)
        for part in (wide.norm, wide.conv) if isinstance(wide, ActNormConv1x1) else (wide,):
            part.double()
        expected = wide(x.double())[1].float()
        for state in (x.to(dtype), divide(x.to(dtype), "channel")):
            y, logdet = transform(state)
            assert whole(y).dtype == dtype
            torch.testing.assert_close(logdet, expected, rtol=1e-4, atol=1e-3)


@pytest.fixture(params=["highest", "high"])
def matmul_precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7), (5, 6, 3, 4)], ids=str)
@pytest.mark.parametrize("as_halves", [False, True])
def test_no_product_may_be_rounded_to_tf32(matmul_precision, shape, as_halves):
    """Only fp64 ones where PyTorch would be free to do so, and no convolution, whose rounding has another switch."""
    norm, conv, x = trained_norm(6).float(), trained_conv(6, "lu").float(), torch.randn(shape)
    for transform in (conv, ActNormConv1x1(norm, conv)):
        expected = transform(x)[0]
        for run in (transform, transform.inverse):
            products = Products()
            products.seen(run)(divide(x, "channel") if as_halves else x)
            assert set(products.dtypes) == {UNROUNDED[matmul_precision]}
        y = transform(divide(x, "channel") if as_halves else x)[0]
        torch.testing.assert_close(whole(y), expected)


def test_no_product_of_a_graph_may_be_rounded_to_tf32(matmul_precision):
    products, step = Products(), ActNormConv1x1(ActNorm(6).eval(), InvertibleConv1x1(6))
    there_and_back = torch.compile(lambda x: step.inverse(step(x)[0]), backend=products.backend, fullgraph=True)
    x = torch.randn(2, 6, 3, 4)
    torch.testing.assert_close(there_and_back(x), x, rtol=0, atol=1e-5)
    assert set(products.dtypes) == {UNROUNDED[matmul_precision]}


UNROUNDED = {"highest": torch.float32, "high": torch.float64}


class Products(TorchDispatchMode):
    """The dtypes of the products that run; a convolution is an error."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def seen(self, function):
        def run(*arguments):
            with self:
                return function(*arguments)

        return run

    def backend(self, graph, inputs):
        return self.seen(graph)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert "conv" not in name
        if name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv"):
            self.dtypes.append(args[-1].dtype)
        return function(*args, **(kwargs or {}))


def test_settings_of_both_kinds_of_precision_at_once():
    conv, x = trained_conv(4, "lu").float(), torch.randn(2, 4, 3)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        products = Products()
        products.seen(conv)(x)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert set(products.dtypes) == {torch.float64}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 needs a GPU")
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_32_steps_are_undone_whatever_may_be_tf32(matmul_precision, folded, compiled):
    pairs = [(ActNorm(12).cuda(), InvertibleConv1x1(12).cuda()) for _ in range(32)]
    steps = [ActNormConv1x1(*pair) for pair in pairs] if folded else [step for pair in pairs for step in pair]
    x = torch.randn(16, 12, 16, 16, device="cuda")

    def there_and_back(y):
        for step in steps:
            y, _ = step(y)
        for step in reversed(steps):
            y = step.inverse(y)
        return y

    back = there_and_back(x)
    if compiled:
        back = torch.compile(there_and_back)(x)
    assert (back - x).abs().max() <= 1e-5


def test_a_singular_matrix_has_no_inverse():
    conv = InvertibleConv1x1(3, "plain")
    with torch.no_grad():
        conv.weight[1] = 0
    for transform in (conv, ActNormConv1x1(ActNorm(3), conv)):
        for y in (torch.randn(2, 3), torch.randn(2, 3, 2, 2)):
            with pytest.raises(ValueError, match="weight: expected an invertible matrix, got a singular one"):
                transform.inverse(y)
    compiled = torch.compile(conv.inverse, backend="eager", fullgraph=True)
    assert not compiled(torch.randn(2, 3)).isfinite().all()


class OfApple(torch.Tensor):
    """A tensor that says it lies on a GPU without fp64, and keeps to that."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return torch.device("mps")
        result = super().__torch_function__(function, types, args, kwargs)
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_device_without_fp64(dtype):
    rotation = torch.linalg.qr(torch.randn(4, 4))[0].to(dtype)
    inverse = inverted(rotation.as_subclass(OfApple)).as_subclass(torch.Tensor)
    torch.testing.assert_close(inverse, inverted(rotation))


def batches():
    torch.manual_seed(7)
    return [torch.tensor([1.0, -20.0, 3.0]).view(3, 1, 1) * (1 + torch.randn(6, 3, 4, 4)) for _ in range(2)]


def assert_normalises(norm, x):
    y = norm(x)[0]
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-4, atol=1e-4)


def fresh():
    norm = ActNorm(3)
    assert not norm.initialized
    return norm


def through_a_file(norm):
    stream = io.BytesIO()
    torch.save(norm.state_dict(), stream)
    stream.seek(0)
    again = ActNorm(3)
    again.load_state_dict(torch.load(stream))
    return again


def loaded_over(norm):
    other = ActNorm(3)
    for batch in batches():
        other(batch)
    other.load_state_dict(norm.state_dict())
    return other


PATHS = {
    "itself": lambda norm: norm,
    "deepcopy": copy.deepcopy,
    "saved and loaded": through_a_file,
    "loaded into one that was initialised otherwise": loaded_over,
    "eval and train again": lambda norm: norm.eval().train(),
    "moved": lambda norm: norm.double().float(),
    "in a list": lambda norm: copy.deepcopy(nn.Sequential(norm))[0],
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("as_halves", [False, True])
def test_initialised_once_and_never_again(path, as_halves):
    first, second = batches()
    norm = fresh()
    norm(divide(first, [True, False, True]) if as_halves else first)
    assert_normalises(norm, first)
    values = [parameter.clone() for parameter in norm.parameters()]
    again = path(norm).train()
    for _ in range(3):
        again(second)
    assert again.initialized
    assert all(torch.equal(value, parameter) for value, parameter in zip(values, again.parameters(), strict=True))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_what_was_not_initialised_still_waits(path):
    norm = path(fresh())
    x = batches()[0]
    assert torch.equal(norm.eval()(x)[0], x)
    assert not norm.initialized
    norm.train()
    assert_normalises(norm, x)


def test_a_first_batch_that_is_not_finite_is_not_taken():
    norm, (x, _) = fresh(), batches()
    bad = x.clone()
    bad[0, 0, 0, 0] = torch.nan
    norm(bad)
    assert not norm.initialized
    assert not norm.bias.any()
    assert_normalises(norm, x)


def test_a_step_that_takes_its_buffers_back_leaves_it_waiting():
    norm, (first, second) = fresh(), batches()
    norm(first)
    norm.initialized.fill_(False)
    assert_normalises(norm, second)


def test_statistics_far_from_zero():
    norm, x = ActNorm(2), 1000 + torch.randn(64, 2, 4, 4)
    y, _ = norm(x)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(2), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(norm.log_scale, -x.std((0, 2, 3), correction=0).log(), rtol=1e-3, atol=1e-4)


FIRST = {
    "one value": torch.tensor([[5.0, -2.0, 1e6]]),
    "always the same": torch.tensor([5.0, 0.1, 1e6]).expand(64, 3),
    "rounding": torch.tensor([5.0, 0.1, 1e6]) * (1 + 1e-6 * torch.tensor([[0.0], [1.0], [0.0], [-1.0]])),
    "hardly anything": torch.tensor([[0.0, 0.0, 0.0], [1e-4, 5e-4, -1e-5]]),
}


@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("places", [(), (2, 2)], ids=["vectors", "images"])
def test_a_channel_that_hardly_varies_is_shifted_only(first, places):
    norm, second = fresh(), batches()[0].movedim(1, -1).reshape(-1, 3)
    y, logdet = norm(first.view(*first.shape, *[1] * len(places)).expand(*first.shape, *places))
    assert norm.initialized
    assert y.abs().max() <= 2
    assert not logdet.any()
    y, logdet = norm(first.mean(0) + second)
    torch.testing.assert_close(y, second, rtol=1e-4, atol=0.5)
    assert not logdet.any()


def test_one_channel_that_hardly_varies_leaves_the_others_alone():
    norm, x = fresh(), batches()[0]
    x[:, 1] = 7
    y = norm(x)[0]
    assert not y[:, 1].any()
    torch.testing.assert_close(y[:, ::2].std((0, 2, 3), correction=0), torch.ones(2), rtol=1e-4, atol=1e-4)


def test_narrow_statistics_are_taken_in_fp32():
    norm, x = ActNorm(2), (100 + torch.randn(256, 2, 8, 8)).half()
    norm(x)
    torch.testing.assert_close(norm.bias, -x.double().mean((0, 2, 3)).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.log_scale.exp(), 1 / x.float().std((0, 2, 3)), rtol=1e-3, atol=0)


def test_processes_initialise_from_the_batches_of_all(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo, by which CPUs talk")
    program = Path(ranks_program.__file__)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(tmp_path)], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks_program.WORLD)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=ranks_program.PATIENCE + 60)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks_program.WORLD)]
    for memory in ranks_program.MEMORIES:
        model, before, expected = ranks_program.flow(memory), ranks_program.images(), {}
        model(before)
        expected["initialised"] = {name: value.clone() for name, value in model.state_dict().items()}
        model.loss(before)["loss"].backward()
        expected["gradients"] = {name: parameter.grad for name, parameter in model.named_parameters()}
        for process in found:
            torch.testing.assert_close(process[memory], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: ActNorm(0), "channels: expected a positive int, got 0"),
        (lambda: ActNorm(3)(torch.randn(2, 4)), r"x: expected shape \[B, 3, ...\], got \[2, 4\]"),
        (lambda: ActNorm(3).eval()(torch.randn(2, 4)), r"x: expected shape \[B, 3, ...\], got \[2, 4\]"),
        (lambda: ActNorm(3).eval()(divide(torch.randn(2, 4), "channel")), r"x: expected 3 channels, got 2 \+ 2"),
        (lambda: InvertibleConv1x1(2.0), "channels: expected a positive int, got 2.0"),
        (lambda: InvertibleConv1x1(2, "qr"), "form: expected one of 'lu', 'plain', got 'qr'"),
        (lambda: InvertibleConv1x1(2)(torch.randn(2, 3, 4, 4)), r"x: expected shape \[B, 2, ...\]"),
        (lambda: InvertibleConv1x1(2)(divide(torch.randn(2, 4), "channel")), r"x: expected 2 channels, got 2 \+ 2"),
    ],
)
def test_bad_input_names_the_argument(run, message):
    with pytest.raises(ValueError, match=message):
        run()
