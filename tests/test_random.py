"""The noise: known answers, its definition, invariance to how it is asked for, and its statistics."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from genfast.random import (
    Stream,
    as_seed,
    box_muller,
    derive_seed,
    derive_seeds,
    integers,
    new_seed,
    normal,
    philox4x32,
    uniform,
    unit,
)

MASK = 0xFFFFFFFF
# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK, MASK, MASK, MASK), (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
DRAWS = 10_000_000
SEED = torch.tensor([-7234567890123456789])


def _tensors(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, words):
    assert tuple(int(word) for word in philox4x32(_tensors(*key), _tensors(*counter))) == words


def test_derived_seeds_use_the_same_rounds():
    """derive_seed(0, 0) is the first 64 bits of Philox at the SEED stream; chains and neighbours differ."""
    words = philox4x32(_tensors(0, 0), _tensors(0, 0, 0, int(Stream.SEED)))
    assert derive_seed(0, 0) & (2**64 - 1) == int(words[0]) | int(words[1]) << 32
    seeds = {derive_seed(seed, step) for seed in range(-2, 3) for step in range(1000)}
    assert len(seeds) == 5000
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2, 3) != derive_seed(1, 3, 2)
    assert derive_seed(2**63, 1) == derive_seed(-(2**63), 1)


@pytest.mark.parametrize("first", [0, 1, 2**32 - 3, 2**40 + 7, 2**63 - 2, 2**64 - 5])
@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 + 11, 2**64 - 1, 2**70 + 3])
def test_many_seeds_at_once(seed, first):
    seeds = derive_seeds(seed, first, 5)
    assert seeds.dtype == torch.int64
    assert seeds.tolist() == [derive_seed(seed, first + index) for index in range(5)]


def test_many_seeds_say_what_they_expected():
    assert derive_seeds(0, 3, 0).shape == (0,)
    with pytest.raises(ValueError, match="count: expected a non-negative int, got -1"):
        derive_seeds(0, 0, -1)
    for first, count in ((-1, 2), (2**64, 0), (2**64 - 1, 2)):
        with pytest.raises(ValueError, match="first: expected indices from 0 to 2\\^64 - 1"):
            derive_seeds(0, first, count)


def test_definition_by_hand():
    """Element j of row i is lane j % 4 of Philox at (j // 4, i mod 2^32, i >> 32, stream | salt << 8)."""
    row, salt, stream = 2**35 + 5, 77, Stream.TIMESTEP
    noise = normal(SEED, 1, 10, stream, row_offset=row, salt=salt)
    value = int(SEED) & (2**64 - 1)
    for j in range(10):
        counter = _tensors(j // 4, row & MASK, row >> 32, stream | salt << 8)
        words = [int(word) for word in philox4x32(_tensors(value & MASK, value >> 32), counter)]
        first, second = words[j % 4 // 2 * 2], words[j % 4 // 2 * 2 + 1]
        u = first * 2.0**-32 + 2.0**-33
        theta = (second - 2**32 if second >= 2**31 else second) * math.pi / 2**31
        want = math.sqrt(-2 * math.log(u)) * (math.sin(theta) if j % 2 else math.cos(theta))
        assert noise[0, j].item() == pytest.approx(want, abs=2e-6)


@pytest.mark.parametrize("draw", [normal, uniform])
def test_traced_and_eager_paths_agree(draw, device):
    """numpy (or a kernel) in eager, torch where something traces: uniform is exact, normal within rounding."""
    seed = SEED.to(device)
    compiled = torch.compile(lambda s: draw(s, 6, 22, 3, 2**33 + 1, 9, 5), fullgraph=True, backend="aot_eager")
    got, want = compiled(seed), draw(seed, 6, 22, 3, 2**33 + 1, 9, 5)
    if draw is uniform:
        assert torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 if device == "cpu" else 2e-5)


def test_inductor_draws_the_same():
    compiled = torch.compile(lambda s: normal(s, 8, 20, Stream.LATENT), fullgraph=True)
    torch.testing.assert_close(compiled(SEED), normal(SEED, 8, 20, Stream.LATENT), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("draw", [normal, uniform])
def test_any_window_of_the_noise_is_the_same(draw, device):
    seed = SEED.to(device)
    whole = draw(seed, 40, 50, Stream.LATENT, row_offset=2**32 - 20)
    for rows, cols, row, col in ((1, 1, 0, 0), (40, 3, 0, 47), (7, 20, 11, 13), (8, 9, 32, 1), (20, 50, 19, 0)):
        part = draw(seed, rows, cols, Stream.LATENT, row_offset=2**32 - 20 + row, col_offset=col)
        assert torch.equal(part, whole[row : row + rows, col : col + cols])


def test_a_salt_may_live_on_the_device(device):
    seed = SEED.to(device)
    salt = torch.tensor([123], device=device)
    assert torch.equal(normal(seed, 3, 5, 1, salt=salt), normal(seed, 3, 5, 1, salt=123))
    compiled = torch.compile(lambda s, k: normal(s, 3, 5, 1, salt=k), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(seed, salt), normal(seed, 3, 5, 1, salt=123), rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("draw", [normal, uniform])
def test_each_row_may_have_its_own_salt(draw, device):
    """Eager (numpy or a kernel) and traced: row i is row i of the noise of its salt. Only 24 bits of a salt count."""
    seed = SEED.to(device)
    values = [0, 2**24 - 1, 7, 7]
    rows = [draw(seed, 1, 6, 3, 2**33 + i, salt, 5) for i, salt in enumerate(values)]
    salts = torch.tensor(values, device=device)
    got = draw(seed, 4, 6, 3, 2**33, salts, 5)
    assert torch.equal(got, torch.cat(rows))
    assert torch.equal(draw(seed, 4, 6, 3, 2**33, salts - 2**24, 5), got)
    assert torch.equal(draw(seed, 4, 6, 3, 2**33, salts[3:].expand(4), 5)[2:], got[2:])
    compiled = torch.compile(lambda s, k: draw(s, 4, 6, 3, 2**33, k, 5), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(seed, salts), got, rtol=1e-6, atol=1e-6 if device == "cpu" else 2e-5)
    assert draw(seed, 0, 6, 3, salt=salts[:0]).shape == (0, 6)


def test_salts_must_match_the_rows():
    for wrong in (torch.arange(3), torch.arange(0)):
        with pytest.raises(ValueError, match="salt: expected one element, or one for each of 2 rows"):
            normal(SEED, 2, 3, 1, salt=wrong)
    with pytest.raises(TypeError, match=r"salt: expected an int64 tensor, got torch\.float32"):
        normal(SEED, 2, 3, 1, salt=torch.rand(2))


@pytest.mark.parametrize("bits", [1, 15, 23])
def test_uniforms_of_fewer_bits(bits, device):
    """((word >> (32 - bits)) + 0.5) 2^-bits of the words that the counter gives; eager and traced."""
    seed, value = SEED.to(device), int(SEED) & (2**64 - 1)
    got = uniform(seed, 3, 6, 4, 2**33, 9, 5, bits=bits)
    for i, j in ((0, 5), (1, 7), (2, 10)):
        words = philox4x32(_tensors(value & MASK, value >> 32), _tensors(j // 4, i, 2, 4 | 9 << 8))
        assert got[i, j - 5].item() == ((int(words[j % 4]) >> 32 - bits) + 0.5) * 2.0**-bits
    compiled = torch.compile(lambda s: uniform(s, 3, 6, 4, 2**33, 9, 5, bits), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(seed), got)
    with pytest.raises(ValueError, match="bits: expected an int from 1 to 23, got 24"):
        uniform(seed, 3, 6, 4, bits=24)


@pytest.mark.parametrize("high", [1, 2, 1000, 2**24, 2**31 - 1, 2**31])
def test_integers_are_scaled_words(high, device):
    """(bits * high) >> 32, of the words that the counter gives; eager, traced, and in any window."""
    seed, value = SEED.to(device), int(SEED) & (2**64 - 1)
    got = integers(seed, 3, 6, high, 4, 2**33, 9, 5)
    assert (got.dtype, got.shape) == (torch.int64, (3, 6))
    for i, j in ((0, 5), (1, 7), (2, 10)):
        words = philox4x32(_tensors(value & MASK, value >> 32), _tensors(j // 4, i, 2, 4 | 9 << 8))
        assert got[i, j - 5].item() == int(words[j % 4]) * high >> 32
    compiled = torch.compile(lambda s: integers(s, 3, 6, high, 4, 2**33, 9, 5), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(seed), got)
    assert torch.equal(integers(seed, 1, 2, high, 4, 2**33 + 2, torch.tensor([9], device=device), 8), got[2:, 3:5])
    salts = torch.tensor([1, 9, 3], device=device)
    assert torch.equal(integers(seed, 3, 6, high, 4, 2**33, salts, 5)[1], got[1])


def test_integers_pass_chi_square():
    counts = torch.bincount(integers(SEED, DRAWS // 1000, 1000, 997, Stream.TIMESTEP).flatten(), minlength=997)
    assert len(counts) == 997
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_integers_say_which_bounds_they_know():
    for high in (0, -5, 2**31 + 1):
        with pytest.raises(ValueError, match=f"high: expected an int from 1 to 2\\^31, got {high}"):
            integers(0, 2, 3, high, 1)


def test_empty_noise(device):
    assert normal(SEED.to(device), 0, 5, 1).shape == (0, 5)
    assert normal(SEED.to(device), 5, 0, 1).shape == (5, 0)


@pytest.fixture(scope="module")
def normals() -> torch.Tensor:
    return normal(SEED, DRAWS // 1000, 1000, Stream.LATENT).flatten().double()


def test_moments_to_the_fourth_order(normals):
    """Each within 5 standard errors; the k-th moment of a normal has variance (E x^2k - (E x^k)^2) / n."""
    for k, expected, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        error = (normals.pow(k).mean().item() - expected) / math.sqrt(variance / DRAWS)
        assert abs(error) < 5, (k, error)


def test_normals_pass_kolmogorov_smirnov(normals):
    assert scipy.stats.kstest(normals.numpy(), "norm").pvalue > 1e-4


def test_normals_pass_chi_square(normals):
    """1000 bins of equal probability."""
    bins = (scipy.stats.norm.cdf(normals.numpy()) * 1000).astype(int).clip(0, 999)
    counts = torch.bincount(torch.from_numpy(bins), minlength=1000)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_uniforms_pass_chi_square_and_kolmogorov_smirnov():
    u = uniform(SEED, DRAWS // 1000, 1000, Stream.PIXEL).flatten().double()
    assert scipy.stats.chisquare(torch.bincount((u * 4096).long(), minlength=4096).numpy()).pvalue > 1e-4
    assert scipy.stats.kstest(u.numpy(), "uniform").pvalue > 1e-4


def test_tails_are_reachable_and_never_infinite():
    """The smallest and largest words: beyond 6 sigma, finite, and no NaN next to 1."""
    words = torch.tensor([0, 1, 2, 2**31 - 1, 2**31, MASK - 1, MASK])
    first, second = (grid.flatten() for grid in torch.meshgrid(words, words, indexing="ij"))
    for draws in box_muller(first, second):
        assert draws.isfinite().all()
    radius = torch.hypot(*box_muller(first, second))
    assert radius.max().item() == pytest.approx(math.sqrt(2 * 33 * math.log(2)), rel=1e-6)
    assert radius.max() > 6.7
    assert radius[first == MASK].max() == 0.0


def test_uniform_never_reaches_zero_or_one():
    """The extreme words of the definition ((bits >> 9) + 0.5) 2^-23."""
    lowest, highest = unit(torch.tensor([0, MASK])).tolist()
    assert lowest == 2.0**-24
    assert highest == 1.0 - 2.0**-24


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In standard errors."""
    return (a * b).mean().item() * math.sqrt(a.numel())


def test_rows_streams_salts_and_seeds_are_uncorrelated():
    base = normal(SEED, 1000, 1000, 1).double()
    others = {
        "next row": normal(SEED, 1000, 1000, 1, row_offset=1),
        "next group": normal(SEED, 1000, 1000, 1, col_offset=4),
        "next lane": normal(SEED, 1000, 1000, 1, col_offset=1),
        "row 2^32": normal(SEED, 1000, 1000, 1, row_offset=2**32),
        "stream": normal(SEED, 1000, 1000, 2),
        "salt": normal(SEED, 1000, 1000, 1, salt=1),
        "high salt": normal(SEED, 1000, 1000, 1, salt=2**23),
        "next seed": normal(SEED + 1, 1000, 1000, 1),
        "high half of the seed": normal(SEED ^ (1 << 40), 1000, 1000, 1),
    }
    for name, other in others.items():
        for power in (1, 2):
            centred = base.pow(power) - (power - 1), other.double().pow(power) - (power - 1)
            # The product of two squared normals, each less 1, has a standard deviation of 2.
            assert abs(_correlation(*centred)) / power < 5, (name, power)


def test_new_seed_is_governed_by_torch(device):
    torch.manual_seed(11)
    seeds = [new_seed(device) for _ in range(100)]
    assert len({int(seed) for seed in seeds}) == 100
    assert {int(seed) >> 63 for seed in seeds} == {-1, 0}
    torch.manual_seed(11)
    assert torch.equal(new_seed(device), seeds[0])
    generator = torch.Generator(device).manual_seed(5)
    first = new_seed(device, generator)
    assert torch.equal(first, new_seed(generator=torch.Generator(device).manual_seed(5)))
    assert first.device.type == device


def test_new_seed_compiles_to_the_eager_draws(device):
    compiled = torch.compile(lambda: (new_seed(device), new_seed(device)), fullgraph=True)
    torch.manual_seed(2)
    eager = new_seed(device), new_seed(device)
    for _ in range(2):
        torch.manual_seed(2)
        got = compiled()
        assert torch.equal(got[0], eager[0])
        assert torch.equal(got[1], eager[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_replayed_graph_draws_afresh():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed = new_seed("cuda")
    drawn = set()
    for _ in range(5):
        graph.replay()
        drawn.add(int(seed))
    assert len(drawn) == 5


def test_seeds_of_64_bits_signed_or_not():
    assert torch.equal(as_seed(2**64 - 1), torch.tensor([-1]))
    assert torch.equal(as_seed(-(2**63)), torch.tensor([-(2**63)]))
    assert as_seed(torch.tensor(3)).shape == (1,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": -1}, "rows: expected a non-negative int, got -1"),
        ({"col_offset": -4}, "col_offset: expected a non-negative int, got -4"),
        ({"stream": 256}, "stream: expected a value of genfast.random.Stream"),
        ({"salt": 2**24}, "salt: expected an int of 24 bits, got 16777216"),
    ],
)
@pytest.mark.parametrize("draw", [normal, uniform, lambda **rest: integers(high=5, **rest)])
def test_bad_input(draw, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(**{"seed": 0, "rows": 2, "cols": 3, "stream": 1, **arguments})
