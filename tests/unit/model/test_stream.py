"""The numbers behind secret initial weights: exact bits, and the distributions they claim."""

import math
import statistics

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from pmp_ds.model.stream import inverse_normal, normals, uniforms

KEY = bytes(range(32))


def test_uniforms_come_from_rfc_8439_keystream() -> None:
    keystream = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1a")  # appendix A.1
    words = [int.from_bytes(keystream[i : i + 8], "little") for i in (0, 8, 16)]
    expected = [((word >> 12) + 0.5) / 2**52 for word in words]
    assert uniforms(bytes(32), 0, 3).tolist() == expected


GOLDEN_UNIFORMS = ["0x1.a8671765f4afep-2", "0x1.252b72e1dc0eep-2"]
GOLDEN_NORMALS = ["-0x1.ba9179f2f6465p-3", "-0x1.20e2d9dc78db1p-1", "0x1.ac2ef26d9357bp-1"]
GOLDEN_EXTREMES = [
    "-0x1.06b48528cea51p+3",
    "-0x1.80993fb2838ddp+2",
    "-0x1.79cd70d9c27f0p+0",
    "0x0.0p+0",
    "0x1.79cd70d9c27f3p+0",
    "0x1.06b48528cea51p+3",
]


def test_golden_values() -> None:
    assert [u.hex() for u in uniforms(KEY, 0, 2).tolist()] == GOLDEN_UNIFORMS
    assert [z.hex() for z in normals(KEY, 0, 3).tolist()] == GOLDEN_NORMALS
    extremes = np.array([2.0**-53, 2.0**-30, 0.07, 0.5, 0.93, 1 - 2.0**-53])
    assert [z.hex() for z in inverse_normal(extremes).tolist()] == GOLDEN_EXTREMES


@pytest.mark.parametrize(("start", "count"), [(0, 5), (7, 20), (8, 8), (9000, 9000), (16383, 2)])
def test_any_stretch_can_be_drawn_alone(start: int, count: int) -> None:
    assert normals(KEY, start, count).tolist() == normals(KEY, 0, start + count)[start:].tolist()


def test_streams_go_on_beyond_the_counter_of_the_cipher() -> None:
    """It counts 2^32 blocks of 8 numbers: 34.4 billion. Then the nonce changes."""
    border = 1 << 35
    across = uniforms(KEY, border - 20, 40).tolist()
    assert across == uniforms(KEY, border - 20, 20).tolist() + uniforms(KEY, border, 20).tolist()
    assert normals(KEY, 3 * border + 5, 8).tolist() == normals(KEY, 3 * border, 13)[5:].tolist()
    spans = [uniforms(KEY, number * border, 20).tolist() for number in range(4)]
    assert len({value for span in spans for value in span}) == 80
    nonce = bytes(4) + (1).to_bytes(12, "little")
    cipher = Cipher(algorithms.ChaCha20(KEY, nonce), mode=None).encryptor()
    word = int.from_bytes(cipher.update(bytes(8)), "little")
    assert across[20] == ((word >> 12) + 0.5) / 2**52


def test_inverse_normal_against_the_standard_library() -> None:
    random = uniforms(KEY, 0, 20_000)
    tails = 2.0 ** -np.linspace(2, 53, 2_000)
    p = np.concatenate([random, tails, 1.0 - tails])
    inv_cdf = statistics.NormalDist().inv_cdf
    expected = np.array([inv_cdf(x) for x in p.tolist()])
    np.testing.assert_allclose(inverse_normal(p), expected, rtol=1e-14, atol=1e-15)


def test_inverse_normal_is_odd() -> None:
    p = uniforms(KEY, 0, 1000)
    assert inverse_normal(1.0 - p).tolist() == (-inverse_normal(p)).tolist()


def test_uniforms_stay_inside_and_are_even() -> None:
    u = uniforms(KEY, 0, 1 << 20)
    assert 0.0 < u.min() < 1e-5
    assert 1.0 - 1e-5 < u.max() < 1.0
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / u.size)


def test_normals_are_normal() -> None:
    z = normals(KEY, 0, 1 << 20)
    n = z.size
    # Four standard errors of mean, variance, skewness and kurtosis.
    assert abs(z.mean()) < 4 * math.sqrt(1 / n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert abs((z[1:] * z[:-1]).mean()) < 4 * math.sqrt(1 / n)


def test_kolmogorov_smirnov() -> None:
    z = np.sort(normals(KEY, 0, 1 << 17))
    cdf = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z.tolist()])
    steps = np.arange(z.size + 1) / z.size
    distance = max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())
    assert distance < 1.95 / math.sqrt(z.size)  # exceeded by chance once in 1000 keys
